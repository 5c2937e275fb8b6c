"""What a request asks for: its row, and the promise that its adapters stay until it is over."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapters import Promise
from ...core import BASE, NONE, Routing
from ...errors import RoutingError
from ...routes import Route, Rows
from ..given_rows import KEYWORD, GivenRows

NOT_GIVEN = object()  # None is an entry: the base model


@dataclass(frozen=True)
class RequestRow:
    """The row of one request. Its adapters keep their slots as long as this object lives."""

    index: Tensor  # [J] handles, on the host
    weight: Tensor  # [J]
    promise: Promise

    @property
    def handles(self) -> frozenset[int]:
        """The adapters that it selects."""
        return self.promise.handles


NOBODY = RequestRow(torch.empty(0, dtype=torch.int64), torch.empty(0), Promise(frozenset()))

# The rows of the requests that transformers' own code will add next in this context, in order.
_DUE: ContextVar[Iterator[RequestRow] | None] = ContextVar("lora_mux_due", default=None)


@contextmanager
def requests_due(rows: Sequence[RequestRow]) -> Iterator[None]:
    """Inside, transformers adds requests with these rows, one after the other."""
    token = _DUE.set(iter(rows))
    try:
        yield
    finally:
        _DUE.reset(token)


def due_rows() -> Iterator[RequestRow] | None:
    """The rows of the requests that are added next, where transformers adds several."""
    return _DUE.get()


def row_of_request(mux: GivenRows, entry: Any) -> RequestRow:
    """The row of one request.

    Args:
        mux: of the model.
        entry: one entry of `rows` in `Mux.route`, or a list that holds it; or an index tensor [J]
            or [1, J]. NOT_GIVEN = what is in force.

    Raises:
        RoutingError: it is None where rows are in force, which may be meant, or not.
    """
    if entry is NOT_GIVEN:
        return rows_of_requests(mux, 1)[0]
    if entry is None:
        in_force = mux._router.rows_of_generate()
        if in_force is not None and in_force.selects:
            raise RoutingError(
                f'`{KEYWORD}` must be "{BASE}" for the base model, or be left out for the rows in '
                "force, got None while a route is in force, which may mean either"
            )
    if isinstance(entry, Tensor):
        rows: Rows = entry[None] if entry.ndim == 1 else entry
    else:
        rows = entry if isinstance(entry, list) and len(entry) == 1 else [entry]
    return rows_of_requests(mux, 1, rows)[0]


def rows_of_requests(mux: GivenRows, requests: int, given: Rows | None = None) -> list[RequestRow]:
    """A row for each of that many requests, whose adapters are promised from now on.

    Args:
        mux: of the model.
        requests: how many there are.
        given: rows that were given with the call; None = those in force.

    Raises:
        RoutingError: the route has another number of rows.
        UnknownAdapterError: it selects an adapter that was removed.
        PoolCapacityError: the adapters of one request can never be resident together.
    """
    rows: list[tuple[Tensor, Tensor]] = []

    def find() -> list[set[int]]:
        rows[:] = _made(mux, requests, given)
        return [{*index.tolist()} - {NONE} for index, _ in rows]

    if given is not None:
        mux._router.check_attached()
    promises = mux._adapters.promise(find)
    return [RequestRow(*row, promise) for row, promise in zip(rows, promises, strict=True)]


def _made(mux: GivenRows, requests: int, given: Rows | None) -> list[tuple[Tensor, Tensor]]:
    route = mux._router.rows_of_generate() if given is None else mux._route_of_call(given)
    if route is None:
        return [(NOBODY.index, NOBODY.weight)] * requests
    if route.per_token or not (route.uniform or route.routing.rows == requests):
        got = "one for each token" if route.per_token else str(route.routing.rows)
        raise RoutingError(
            f"`{route.argument}` must have one entry per request ({requests}), got {got}"
        )
    routing = route.routing.expand_rows(requests) if route.uniform else route.routing
    index, weight = routing.index.cpu(), routing.weight.detach().cpu()
    mux._slots.check_loaded(index)
    return list(zip(index, weight, strict=True))


def route_of_tokens(rows: Sequence[RequestRow], lengths: Sequence[int], tokens: int) -> Route:
    """The route of a batch: the tokens of one request after the other, then padding.

    Args:
        rows: of the requests.
        lengths: how many tokens each request has.
        tokens: how many tokens the batch has, with its padding.
    """
    places = max([1, *(len(row.index) for row in rows)])
    index = torch.full((len(rows) + 1, places), NONE)
    weight = torch.zeros(len(rows) + 1, places)
    for i, row in enumerate(rows):
        index[i, : len(row.index)], weight[i, : len(row.weight)] = row.index, row.weight
    times = torch.tensor([*lengths, tokens - sum(lengths)])
    routing = Routing(index, weight).repeat_interleave(times)
    return Route(routing, per_token=True, promised=True)
