"""What is put before transformers' manager. The class of the manager is changed, as a target's is.

It notes what each request was added with, and lets transformers' scheduler have those requests
whose adapters fit into the memory. Each batch is routed by token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import cache, partial
from typing import Any

from ...errors import InputError, LoraMuxError, RoutingError
from ...routes import Route, Rows
from ..given_rows import KEYWORD, GivenRows
from .in_flight import InFlight, Request, Residents
from .lengths import check_length, most_tokens, too_long
from .overflows import Overflows
from .request_rows import (
    NOBODY,
    NOT_GIVEN,
    RequestRow,
    due_rows,
    requests_due,
    route_of_tokens,
    row_of_request,
    rows_of_requests,
)


class MuxManager:
    """Put before transformers' ContinuousBatchingManager, whose methods these replace."""

    model: Any
    num_return_sequences: int
    batch_processor: Any
    input_queue: Any
    is_tp_driver: bool
    distributed_helper: Any
    mux: GivenRows
    mux_requests: InFlight
    mux_residents: Residents
    mux_overflows: Overflows

    def add_requests(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Add one request for each entry of `adapter_names`, or of the route in force, in order."""
        given: Rows | None = kwargs.pop(KEYWORD, None)
        add = super().add_requests  # type: ignore[misc]
        if due_rows() is not None:  # called by generate_batch()
            return add(inputs, *args, **kwargs)
        inputs = [self._fitting(input_ids) for input_ids in inputs]
        with requests_due(self._checked(rows_of_requests(self.mux, len(inputs), given))):
            return add(inputs, *args, **kwargs)

    def add_request(
        self, input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Add a request with its own entry, the only one of the block, or the next one due.

        Its adapters stay until it is over, whatever happens to their names.

        Raises:
            RoutingError: a request of this name is in flight.
            PoolCapacityError: its adapters can never be resident together.
            InputError: it has no tokens, or the cache can never hold them.
        """
        due, own = due_rows(), kwargs.pop(KEYWORD, NOT_GIVEN)
        if due is None:  # else they were looked at together, or fail alone in generate_batch()
            input_ids = self._fitting(input_ids)
        row = next(due) if due is not None else self._checked([row_of_request(self.mux, own)])[0]
        if request_id is None:  # it must be known before the manager's thread sees the request
            with self._request_lock:  # type: ignore[attr-defined]
                request_id = f"req_{self._request_counter}"  # type: ignore[has-type]
                self._request_counter = self._request_counter + 1  # type: ignore[has-type]
        children = (f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1))
        request = Request(row, (request_id, *children))
        added = None
        try:
            self.mux_requests.add(request, self._is_alive)
            added = super().add_request(input_ids, request_id, *args, **kwargs)  # type: ignore[misc]
            request.is_put = True
        finally:
            if added is None:  # refused, or interrupted
                self.mux_requests.drop(request)
        return added

    def cancel_request(self, request_id: str) -> None:
        """Cancel a request, if it is in flight, with all its sequences.

        transformers would end whoever has this name when its thread looks.
        """
        if self.distributed_helper.tp_size > 1:  # all processes must learn of it at once
            super().cancel_request(request_id)  # type: ignore[misc]
        else:
            self.mux_requests.cancel(request_id)

    def _fitting(self, input_ids: Any) -> list[Any]:
        tokens, processor = [*input_ids], self.batch_processor
        check_length(tokens, None if processor is None else most_tokens(processor))
        return tokens

    def _checked(self, rows: list[RequestRow]) -> list[RequestRow]:
        if any(row.handles for row in rows):
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
        # On the instance: Python does not change the class of an abstract one's.
        scheduler = processor.scheduler
        process, clear = (
            getattr(type(scheduler), name).__get__(scheduler)
            for name in ("_process_candidates", "clear_cancelled_requests")
        )
        scheduler._process_candidates = partial(self._process_candidates, processor, process)
        scheduler.clear_cancelled_requests = partial(
            self._clear_cancelled_requests, scheduler, clear
        )
        offloading = processor.offloading_manager
        offload = type(offloading).offload_requests.__get__(offloading)
        offloading.offload_requests = partial(self._offload_requests, processor, offload)
        self.mux_overflows = Overflows(processor, partial(self._fail, processor))
        return processor

    def _fail(self, processor: Any, state: Any, error: LoraMuxError) -> None:
        """End a request, and its further sequences, which nobody begins any more."""
        forks = processor.scheduler._requests_to_fork
        forks[:] = [other for other in forks if other is not state]
        for i in range(state.num_children):
            child = copy(state)
            child.request_id, child.num_children = f"{state.request_id}__child#{i}", 0
            processor._handle_request_error(error, child)
        state.num_children = 0
        processor._handle_request_error(error, state)
        processor.scheduler.set_request_cancellation(state.request_id)  # which cleans up after it

    def _process_candidates(
        self, processor: Any, process: Callable[..., Any], candidates: Any, *args: Any
    ) -> Any:
        """Let the scheduler have the candidates whose adapters fit, and whose tokens ever do."""
        scheduler, fail = processor.scheduler, partial(self._fail, processor)
        there = (s for s in candidates if not scheduler.request_is_cancelled(s.request_id))
        short = self._short(processor, there, fail)
        new = scheduler.waiting_requests.__contains__
        scheduled, is_full, *rest = process(
            self.mux_residents.fitting(short, self._row, new, fail), *args
        )
        # Where one that runs is kept back by its adapters, others wait for its cache.
        is_full &= not scheduler.active_requests or bool(scheduler.starved_requests)
        return scheduled, is_full, *rest

    def _short(
        self, processor: Any, candidates: Iterable[Any], fail: Callable[[Any, LoraMuxError], None]
    ) -> Iterator[Any]:
        most = most_tokens(processor)
        for state in candidates:
            try:
                check_length(state.initial_tokens, most)
            except InputError as error:
                fail(state, error)
            else:
                yield state

    def _offload_requests(self, processor: Any, offload: Callable[[], Any]) -> Any:
        """Make room in the cache. The only request that runs has all of it: it fails alone."""
        found, scheduler = offload(), processor.scheduler
        if found or not scheduler.starved_requests or len(scheduler.active_requests) > 1:
            return found
        state = scheduler.starved_requests[0][0]
        self._fail(processor, state, too_long(most_tokens(processor), "more"))
        for gone in scheduler.clear_cancelled_requests():
            processor.offloading_manager.free_request_cpu_cache(gone)
        return True

    def _clear_cancelled_requests(self, scheduler: Any, clear: Callable[[], Any]) -> Any:
        """Forget what is over. Nothing is between the queue and the scheduler at this moment."""
        self.mux_residents.let_go()
        for name in filter(self._is_alive, self.mux_requests.cancelled()):
            scheduler.set_request_cancellation(name)
        cancelled = clear()
        for state in cancelled:  # it may be in a batch that is computed, of which nothing is taken
            state.status = type(state.status).FINISHED
        forks = scheduler._requests_to_fork
        forks[:] = [state for state in forks if not any(state is gone for gone in cancelled)]
        if not scheduler.active_requests:  # transformers waits until one of them ends by itself
            scheduler.block_new_requests = False
        self.mux_residents.forget(self._row, scheduler.waiting_requests.__contains__)
        self.mux_requests.forget(self._queued, self._is_alive)
        return cancelled

    def _queued(self) -> set[str]:
        with self.input_queue.mutex:
            return {state.request_id for state in self.input_queue.queue}

    def _is_alive(self, name: str) -> bool:
        if self.batch_processor is None:
            return False
        scheduler = self.batch_processor.scheduler
        return name in scheduler.active_requests or name in scheduler.waiting_requests

    def _row(self, name: str) -> RequestRow | None:
        """What a request asks for; None = nobody can know."""
        row = self.mux_requests.row(name)
        # A model is not detached while requests have adapters. With tensor parallelism only one
        # process learns which requests there are; they cannot have adapters there.
        plain = self.mux._router.is_detached or not self.is_tp_driver
        return NOBODY if row is None and plain else row

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous: prepares one batch while another computes
            batch = batch.io_pairs[batch.current_pair].host_io
        lengths = {r.state.request_id: r.query_length for r in batch.requests_in_batch}
        rows = [row for name in lengths if (row := self._row(name)) is not None]
        assert len(rows) == len(lengths)  # the scheduler got no others
        route = route_of_tokens(rows, list(lengths.values()), batch.num_q_tokens)
        self.mux_overflows.begin(any(row.handles for row in rows))
        with self._serving(route):
            super()._generation_step()  # type: ignore[misc]
        self.mux_residents.let_go()

    def _serving(self, route: Route | None) -> AbstractContextManager[Route | None]:
        """Inside, the model computes the manager's batch, with this route."""
        if self.mux._router.is_detached:
            return nullcontext()
        return self.mux._under(lambda: route, "call")

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_generation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:  # transformers has answered all requests, if only with an error
            self.mux_residents.let_go()
            self.mux_residents.forget(self._row, lambda name: False)
            self.mux_requests.forget(set, lambda name: False)


@cache
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
        vars(manager).update(mux_requests=InFlight())
    # The model may have another Mux by now.
    vars(manager).update(mux=mux, mux_residents=Residents(mux))


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
    processes = manager.distributed_helper.tp_size
    if processes > 1:
        raise RoutingError(
            f"the manager must run in one process to serve adapters, got one of {processes} with "
            "tensor parallelism, of which the others do not learn what a request asks for; use "
            "generate() with adapter_names="
        )
