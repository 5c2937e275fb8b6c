"""transformers' continuous batching: a request has the adapters that it was added with.

They are given with the call (`adapter_names=`), or are those in force where it is added. A manager
computes its batches in a thread of its own. A batch is one sample that holds the tokens of all
requests that are due, one request after the other. The class of the manager is changed, as that of
a target is: it notes what each request was added with, and routes each batch by token.
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import BASE, NONE, Routing
from ..errors import RoutingError
from ..routes import Route, Rows
from .given_rows import KEYWORD, GivenRows

RequestRow: TypeAlias = tuple[Tensor, Tensor]  # a request's index [J] and weight [J]
NOT_GIVEN = object()  # None is an entry: the base model

# The rows of the requests that transformers' own code will add next in this context, in order.
_DUE: ContextVar[Iterator[RequestRow] | None] = ContextVar("lora_mux_due", default=None)


class MuxManager:
    """Put before transformers' ContinuousBatchingManager, whose methods these replace."""

    model: Any
    num_return_sequences: int
    batch_processor: Any
    mux: GivenRows
    mux_lock: threading.Lock  # of the next two, which users' threads and the manager's share
    mux_rows: dict[str, RequestRow]  # by request
    mux_started: set[str]  # the requests that have been in a batch

    def add_requests(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Add one request for each entry of `adapter_names`, or of the route in force, in order."""
        given, add = kwargs.pop(KEYWORD, None), super().add_requests  # type: ignore[misc]
        if _DUE.get() is not None:  # called by generate_batch()
            return add(inputs, *args, **kwargs)
        with requests_due(self._checked(rows_of_requests(self.mux, len(inputs), given))):
            return add(inputs, *args, **kwargs)

    def add_request(
        self, input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a request with its own entry, the only one of the block, or the next one due."""
        due, own = _DUE.get(), kwargs.pop(KEYWORD, NOT_GIVEN)
        row = next(due) if due is not None else self._checked([row_of_request(self.mux, own)])[0]
        if request_id is None:  # it must be known before the manager's thread sees the request
            with self._request_lock:  # type: ignore[attr-defined]
                request_id = f"req_{self._request_counter}"  # type: ignore[has-type]
                self._request_counter = self._request_counter + 1  # type: ignore[has-type]
        children = [f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1)]
        with self.mux_lock:
            self.mux_rows.update(dict.fromkeys([request_id, *children], row))
            self.mux_started -= {request_id, *children}  # an earlier request may have had the name
        return super().add_request(input_ids, request_id, *args, **kwargs)  # type: ignore[misc]

    def _checked(self, rows: list[RequestRow]) -> list[RequestRow]:
        if any(len(index) for index, _ in rows):
            _check_config(self)
        return rows

    def warmup(self) -> None:
        """Run made-up requests, which have no adapters."""
        with self._serving(None):
            super().warmup()  # type: ignore[misc]

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()  # type: ignore[misc]
        if hasattr(self.model.get_output_embeddings(), "mux_pool"):
            # The head is a target, and must see all tokens, not only the last of each request.
            processor.model_runner._model_supports_logits_to_keep = False
        return processor

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous: prepares one batch while another computes
            batch = batch.io_pairs[batch.current_pair].host_io
        lengths = {r.state.request_id: r.query_length for r in batch.requests_in_batch}
        with self.mux_lock:
            rows = [self.mux_rows[name] for name in lengths]
        route = route_of_tokens(rows, list(lengths.values()), batch.num_q_tokens)
        with self._serving(route):
            super()._generation_step()  # type: ignore[misc]
        self._forget_finished(lengths)

    def _serving(self, route: Route | None) -> AbstractContextManager[Route | None]:
        """Inside, the model computes the manager's batch, with this route."""
        return self.mux._under(lambda: route, "call")

    def _forget_finished(self, batch: Mapping[str, int]) -> None:
        scheduler = self.batch_processor.scheduler
        with self.mux_lock:
            self.mux_started.update(batch)
            known = scheduler.active_requests.keys() | scheduler.waiting_requests.keys()
            for name in self.mux_started - known:
                self.mux_started.remove(name)
                self.mux_rows.pop(name)


@functools.cache
def _mux_class(manager_class: Any) -> type:
    return type(f"Mux{manager_class.__name__}", (MuxManager, manager_class), {})


def follow_requests(manager: Any, mux: GivenRows) -> None:
    """From now on, give each request of a manager adapters of its own.

    Raises:
        RoutingError: the model has adapters, and the manager's configuration cannot serve them.
    """
    if mux.adapters:
        _check_config(manager)
    if not isinstance(manager, MuxManager):  # transformers may hand out the same one again
        manager.__class__ = _mux_class(type(manager))  # type: ignore[arg-type]
        vars(manager).update(mux_rows={}, mux_started=set())
        vars(manager).update(mux_lock=threading.Lock())
    # The model may have another Mux by now.
    vars(manager).update(mux=mux)


@contextmanager
def requests_due(rows: Sequence[RequestRow]) -> Iterator[None]:
    """Inside, transformers adds requests with these rows, one after the other."""
    token = _DUE.set(iter(rows))
    try:
        yield
    finally:
        _DUE.reset(token)


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
    """A row for each of that many requests.

    Args:
        mux: of the model.
        requests: how many there are.
        given: rows that were given with the call; None = those in force.

    Raises:
        RoutingError: the route has another number of rows.
        UnknownAdapterError: it selects an adapter that was removed.
    """
    route = mux._router.rows_of_generate() if given is None else mux._route_of_call(given)
    if route is None:
        return [(torch.empty(0, dtype=torch.int64), torch.empty(0))] * requests
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
    places = max([1, *(len(index) for index, _ in rows)])
    index = torch.full((len(rows) + 1, places), NONE)
    weight = torch.zeros(len(rows) + 1, places)
    for i, row in enumerate(rows):
        index[i, : len(row[0])], weight[i, : len(row[1])] = row
    times = torch.tensor([*lengths, tokens - sum(lengths)])
    return Route(Routing(index, weight).repeat_interleave(times), per_token=True)


def _check_config(manager: Any) -> None:
    config = manager.continuous_batching_config
    if config.allow_block_sharing:
        raise RoutingError(
            "`continuous_batching_config` must have allow_block_sharing=False, got True: requests "
            "with other adapters would read the cache of this one"
        )
    if any(config.cuda_graph_booleans):
        raise RoutingError(
            "`continuous_batching_config` must have use_cuda_graph=False, got "
            f"{config.use_cuda_graph}: a graph would keep the adapters of its first requests"
        )
