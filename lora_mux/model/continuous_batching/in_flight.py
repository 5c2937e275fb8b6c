"""The requests of a manager that are not over yet, and which of them may be in a batch."""

import threading
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...adapters import Promise
from ...errors import LoraMuxError, PoolCapacityError, RoutingError
from ..given_rows import GivenRows
from .request_rows import RequestRow


@dataclass(eq=False)
class Request:
    """A request under its names: its own, and those of its further sequences."""

    row: RequestRow
    names: tuple[str, ...]
    is_put: bool = False  # it is in the manager's queue, or was
    is_seen: bool = False  # it has left that queue, and transformers' scheduler has or had it
    cancelled: set[str] = field(default_factory=set)  # those of its names that are


class InFlight:
    """The requests of one manager, from when they are added until nothing of them is left.

    Users' threads add requests; the manager's own thread forgets them. Only that one takes requests
    out of the manager's queue, so that it knows between two batches where each of them is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[str, Request] = {}  # by name

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._requests])

    def row(self, name: str) -> RequestRow | None:
        """What a request asks for."""
        request = self._requests.get(name)
        return None if request is None else request.row

    def add(self, request: Request, is_alive: Callable[[str], bool]) -> None:
        """Note a request that is about to be put into the queue.

        Args:
            request: the request.
            is_alive: whether transformers' scheduler has a request, by its name.

        Raises:
            RoutingError: one of its names is that of a request in flight.
        """
        with self._lock:
            for name in request.names:
                other = self._requests.get(name)
                if other and not (other.is_seen and not any(map(is_alive, other.names))):
                    gone = name in other.cancelled
                    why = "was cancelled and is not cleared away" if gone else "is still in flight"
                    instead = "try again later" if gone else "wait for the answer"
                    raise RoutingError(
                        f"`request_id` must be new, got {name!r}, which {why}; leave it out, or "
                        f"{instead}"
                    )
            self._requests.update(dict.fromkeys(request.names, request))

    def drop(self, request: Request) -> None:
        """Forget a request, unless others have its names by now."""
        with self._lock:
            for name in request.names:
                if self._requests.get(name) is request:
                    del self._requests[name]

    def cancel(self, name: str) -> None:
        """Note that a request in flight is cancelled, by its own name with all its sequences.

        Not by its name alone: the next one of that name may be added before anybody looks.
        """
        with self._lock:
            request = self._requests.get(name)
            if request is not None:
                request.cancelled.update(request.names if name == request.names[0] else (name,))

    def cancelled(self) -> list[str]:
        """The names that are cancelled, and not forgotten yet."""
        with self._lock:
            return [name for name, r in self._requests.items() if name in r.cancelled]

    def forget(self, queued: Callable[[], Set[str]], is_alive: Callable[[str], bool]) -> None:
        """Forget the requests of which nothing is left.

        Args:
            queued: the names in the queue, from which nobody takes any meanwhile.
            is_alive: whether transformers' scheduler has a request, by its name.
        """
        with self._lock:
            put = [request for request in {*self._requests.values()} if request.is_put]
        waiting = queued()  # afterwards: what is not there was taken out
        for request in put:
            if any(map(is_alive, request.names)):
                request.is_seen = True
            elif waiting.isdisjoint(request.names):
                self.drop(request)


@dataclass(eq=False)
class Waiting:
    """The first new request whose adapters do not fit."""

    name: str
    row: RequestRow
    beside: Promise  # its adapters and those that may pass it: they fit together
    refused: set[frozenset[int]] = field(default_factory=set)  # those that may not


class Residents:
    """The adapters of the batch that is being made, which stay resident until it is computed."""

    def __init__(self, mux: GivenRows) -> None:
        self._adapters, self._slots = mux._adapters, mux._slots
        self._held: Promise | None = None
        self._first: Waiting | None = None

    def fitting(
        self,
        candidates: Iterable[Any],
        row: Callable[[str], RequestRow | None],
        is_new: Callable[[str], bool],
        fail: Callable[[Any, LoraMuxError], None],
    ) -> Iterator[Any]:
        """Those of transformers' candidates whose adapters fit beside those of the ones before.

        The first new one that does not fit keeps room for itself: until it goes, new ones pass it
        only with adapters that fit beside its own and beside those of all that have passed it. So
        it waits no longer than the requests that ran when it came. Those of the base model always
        go.

        Args:
            candidates: the states of requests, in the scheduler's order: it takes them one by one,
                and stops when the batch is full.
            row: what a request asks for, by its name.
            is_new: whether a request has not been in a batch yet, by its name.
            fail: ends a request that cannot be answered, and no other.
        """
        self._held, first = None, self._first
        if first is not None:
            if not self._fit(first, first.beside.handles):  # since others were pinned
                first.beside, first.refused = first.row.promise, set()
            candidates = [*candidates]
            # All at once, so that those of the others may move: what is held does not.
            names = [s.request_id for s in candidates if not is_new(s.request_id)]
            running = [asked.handles for name in names if (asked := row(name))]
            with suppress(LoraMuxError):  # below it shows whose fault it is
                self._hold(first.row.handles.union(*running))
        for state in candidates:
            name = state.request_id
            asked = row(name)
            if asked is None:
                fail(state, RoutingError(f"request {name!r} was added past this model's adapters"))
                continue
            new = is_new(name)
            if first and new and asked.handles and not self._passes(first, asked.handles):
                continue
            try:
                self._hold(asked.handles)
                if self._slots.dropout:
                    slots = self._slots.resolve(asked.index[None], True)
                    self._slots.dropout_of_rows(slots)
            except PoolCapacityError:
                if new and first is None:
                    self._first = first = Waiting(name, asked, asked.promise)
            except LoraMuxError as error:  # its files have changed; unequal dropouts in its row
                fail(state, error)
            else:
                yield state

    def _passes(self, first: Waiting, handles: frozenset[int]) -> bool:
        """Whether a request with these adapters may go before the first one that waits."""
        if handles <= first.beside.handles:
            return True
        if handles not in first.refused and self._fit(first, first.beside.handles | handles):
            return True
        first.refused.add(handles)
        return False

    def _fit(self, first: Waiting, handles: frozenset[int]) -> bool:
        """Let these be beside the first one, if they fit together, and beside what is pinned."""
        try:
            (first.beside,) = self._adapters.promise(lambda: [handles])
        except PoolCapacityError:
            return False
        return True

    def _hold(self, handles: frozenset[int]) -> None:
        held = self._held.handles if self._held is not None else frozenset()
        if not handles <= held:
            self._held = self._adapters.hold(held | handles)

    def let_go(self) -> None:
        """The batch is computed, or there is none."""
        self._held = None

    def forget(
        self, row: Callable[[str], RequestRow | None], is_new: Callable[[str], bool]
    ) -> None:
        """Keep no more room for a request that waits no more.

        Args:
            row, is_new: as in `fitting`.
        """
        first = self._first
        if first is not None and not (is_new(first.name) and row(first.name) is first.row):
            self._first = None
