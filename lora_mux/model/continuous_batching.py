"""transformers' continuous batching: a request has the adapters of the route it was added under.

A manager computes its batches in a thread of its own. A batch is one sample that holds the tokens
of all requests that are due, one request after the other. The class of the manager is changed, as
that of a target is: it notes what each request was added with, and routes each batch by token.
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..adapters import Adapters
from ..core import NONE, Routing
from ..errors import RoutingError
from ..routes import Route, Router

RequestRow: TypeAlias = tuple[Tensor, Tensor]  # a request's index [J] and weight [J]


class MuxManager:
    """Put before transformers' ContinuousBatchingManager, whose methods these replace."""

    model: Any
    num_return_sequences: int
    batch_processor: Any
    mux_router: Router
    mux_adapters: Adapters
    mux_lock: threading.Lock  # of the next two, which users' threads and the manager's share
    mux_rows: dict[str, RequestRow]  # by request
    mux_started: set[str]  # the requests that have been in a batch
    mux_due: threading.local  # .rows: those left for an add_requests() that runs in this thread

    def add_requests(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Add one request for each entry of `rows`, in order."""
        self.mux_due.rows = iter(self._rows(len(inputs)))
        try:
            return super().add_requests(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.mux_due.rows

    def add_request(
        self, input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a request for the only entry of `rows`, or for the next one of add_requests()."""
        due = getattr(self.mux_due, "rows", None)
        row = self._rows(1)[0] if due is None else next(due)
        if request_id is None:  # it must be known before the manager's thread sees the request
            with self._request_lock:  # type: ignore[attr-defined]
                request_id = f"req_{self._request_counter}"  # type: ignore[has-type]
                self._request_counter = self._request_counter + 1  # type: ignore[has-type]
        children = [f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1)]
        with self.mux_lock:
            self.mux_rows.update(dict.fromkeys([request_id, *children], row))
            self.mux_started -= {request_id, *children}  # an earlier request may have had the name
        return super().add_request(input_ids, request_id, *args, **kwargs)  # type: ignore[misc]

    def _rows(self, requests: int) -> list[RequestRow]:
        rows = rows_of_requests(self.mux_router, requests)
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

    @contextmanager
    def _serving(self, route: Route | None) -> Iterator[None]:
        """Inside, the model computes the manager's batch, with this route."""
        with self.mux_adapters.resident(lambda: route):
            self.mux_router.serve(route)
        try:
            yield
        finally:
            self.mux_router.stop_serving()

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


def follow_requests(manager: Any, router: Router, adapters: Adapters) -> None:
    """From now on, give each request of a manager adapters of its own.

    Raises:
        RoutingError: the model has adapters, and the manager's configuration cannot serve them.
    """
    if router.slots.handles:
        _check_config(manager)
    if not isinstance(manager, MuxManager):  # transformers may hand out the same one again
        manager.__class__ = _mux_class(type(manager))  # type: ignore[arg-type]
        vars(manager).update(mux_rows={}, mux_started=set())
        vars(manager).update(mux_lock=threading.Lock(), mux_due=threading.local())
    # The model may have another Mux by now.
    vars(manager).update(mux_router=router, mux_adapters=adapters)


def rows_of_requests(router: Router, requests: int) -> list[RequestRow]:
    """The rows of the user's route, one for each of that many requests.

    Raises:
        RoutingError: the route has another number of rows.
        UnknownAdapterError: it selects an adapter that was removed.
    """
    route = router.chosen
    if route is None or not route.selects:
        return [(torch.empty(0, dtype=torch.int64), torch.empty(0))] * requests
    if route.per_token or not (route.uniform or route.routing.rows == requests):
        got = "one for each token" if route.per_token else str(route.routing.rows)
        raise RoutingError(f"`rows` must have one entry per request ({requests}), got {got}")
    given = route.routing.expand_rows(requests) if route.uniform else route.routing
    index, weight = given.index.cpu(), given.weight.detach().cpu()
    router.slots.check_loaded(index)
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
