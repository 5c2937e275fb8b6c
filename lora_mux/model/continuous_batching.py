"""transformers' continuous batching: a request has the adapters of the route that it was added in.

A manager computes batches that are the tokens of whatever requests are due, one after the other in
one sample, in a thread of its own. Its class is changed, as that of a target is: it writes down
what each request was added with, and routes each of its batches by token.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import NONE, Routing
from ..errors import RoutingError
from ..routes import Route, Router

# Adapters.enter: makes a route, its adapters resident, and puts it in force.
Enter: TypeAlias = Callable[[Callable[[], Route | None], Callable[[Route | None], None]], object]


class MuxManager:
    """In front of transformers' ContinuousBatchingManager, whose methods these are."""

    model: Any
    num_return_sequences: int
    batch_processor: Any
    mux_router: Router
    mux_enter: Enter
    mux_lock: threading.Lock  # of the next two, which the threads of users and manager share
    mux_rows: dict[str, tuple[Tensor, Tensor]]  # request -> its row of index and weight, each [J]
    mux_started: set[str]  # the requests that were in a batch
    mux_due: threading.local  # .rows: those of the add_requests in progress in a thread

    def add_requests(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """One entry of `rows` for each input, in order."""
        self.mux_due.rows = iter(self._rows(len(inputs)))
        try:
            return super().add_requests(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.mux_due.rows

    def add_request(
        self, input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The one entry of `rows`, or the next of those of add_requests()."""
        due = getattr(self.mux_due, "rows", None)
        row = self._rows(1)[0] if due is None else next(due)
        if request_id is None:  # it has to be known before the manager's thread meets it
            with self._request_lock:  # type: ignore[attr-defined]
                request_id = f"req_{self._request_counter}"  # type: ignore[has-type]
                self._request_counter = self._request_counter + 1  # type: ignore[has-type]
        children = [f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1)]
        with self.mux_lock:
            self.mux_rows.update(dict.fromkeys([request_id, *children], row))
            self.mux_started -= {request_id, *children}  # another request had the name
        return super().add_request(input_ids, request_id, *args, **kwargs)  # type: ignore[misc]

    def _rows(self, requests: int) -> list[tuple[Tensor, Tensor]]:
        rows = rows_of(self.mux_router, requests)
        if any(len(index) for index, _ in rows):
            _check_config(self)
        return rows

    def warmup(self) -> None:
        """Runs made-up requests, of nobody."""
        with self._serving(None):
            super().warmup()  # type: ignore[misc]

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()  # type: ignore[misc]
        if hasattr(self.model.get_output_embeddings(), "mux_pool"):
            # Else the head, a target, would be called with the last token of each request alone.
            processor.model_runner._model_supports_logits_to_keep = False
        return processor

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous: one is prepared while the other computes
            batch = batch.io_pairs[batch.current_pair].host_io
        lengths = {r.state.request_id: r.query_length for r in batch.requests_in_batch}
        with self.mux_lock:
            rows = [self.mux_rows[name] for name in lengths]
        route = route_of_tokens(rows, list(lengths.values()), batch.num_q_tokens)
        with self._serving(route):
            super()._generation_step()  # type: ignore[misc]
        self._forget_finished(lengths)

    def _serving(self, route: Route | None) -> AbstractContextManager[None]:
        """The batch's adapters resident, and in force."""
        return self.mux_router.serving(lambda put: self.mux_enter(lambda: route, put))

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


def follow_requests(manager: Any, router: Router, enter: Enter) -> None:
    """Let the requests of a manager have adapters of their own, from now on.

    Raises:
        RoutingError: the model has adapters, and the manager a way of working that knows none.
    """
    if router.slots.handles:
        _check_config(manager)
    if not isinstance(manager, MuxManager):  # one that is kept comes here again
        manager.__class__ = _mux_class(type(manager))  # type: ignore[arg-type]
        vars(manager).update(mux_rows={}, mux_started=set())
        vars(manager).update(mux_lock=threading.Lock(), mux_due=threading.local())
    # Those of the Mux that the model has now.
    vars(manager).update(mux_router=router, mux_enter=enter)


def rows_of(router: Router, requests: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of the route that the user has put in force, for that many requests.

    Raises:
        RoutingError: the route has another number of rows.
        UnknownAdapterError: it selects an adapter that was removed.
    """
    route = router.chosen
    if route is None or not route.selects:
        return [(torch.empty(0, dtype=torch.int64), torch.empty(0))] * requests
    if route.per_token or not (route.uniform or route.routing.rows == requests):
        got = "one for each token" if route.per_token else str(route.routing.rows)
        raise RoutingError(f"`rows` must have one entry per request, here {requests}, got {got}")
    given = route.routing.expand_rows(requests) if route.uniform else route.routing
    index, weight = given.index.cpu(), given.weight.detach().cpu()
    router.slots.check_loaded(index)
    return list(zip(index, weight, strict=True))


def route_of_tokens(
    rows: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], tokens: int
) -> Route:
    """The route of a batch: the requests' tokens one after the other, then some of nobody."""
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
            "`continuous_batching_config` must have allow_block_sharing=False, got True: "
            "requests with other adapters would read what this one's put into the cache"
        )
    if any(config.cuda_graph_booleans):
        raise RoutingError(
            "`continuous_batching_config` must have use_cuda_graph=False, got "
            f"{config.use_cuda_graph}: a graph would keep the adapters of its first requests"
        )
