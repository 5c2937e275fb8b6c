"""The adapters of an attached model: names, handles and rank rows, changed from any thread."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..checkpoints import Stored
from ..core import LoraWeights, Slots, slot_of
from ..errors import AdapterError
from ..layers import (
    MuxLinear,
    check_fit,
    check_reservation,
    check_room,
    checked,
    follow_materialised,
    store,
)
from ..routes import Route, Router
from .memory_report import Holding, Memory, PoolMemory

R = TypeVar("R", bound=Route | None)


class Adapters:
    """All that is loaded is resident, and the pools grow with it.

    One lock serialises changes. Forward passes do not take it: what they may still ask for
    (`Router.held`) is left where it is, and freed once they are done.
    """

    def __init__(self, layers: Mapping[str, MuxLinear], slots: Slots, router: Router) -> None:
        self._layers = layers
        self._slots = slots
        self._router = router
        self._lock = threading.RLock()
        self._gone: set[int] = set()  # handles without a name, whose rank rows are still read

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}  # a copy of model and Mux together has its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def load(self, name: str, stored: Stored, replace: bool = False) -> int:
        """Read an adapter and load it under a name; returns its handle."""
        self._fitting(stored)  # before anything is read
        return self.add(name, stored.weights(stored.read(False)), stored.source, replace)

    def add(
        self, name: str, weights: Mapping[str, LoraWeights], source: str, replace: bool = False
    ) -> int:
        """Check everything, then write everything; a failure on the way leaves nothing behind."""
        fitting = self._checked(weights, source)
        with self._lock:
            self._slots.check_new(name, replace)
            self._reap()
            for path, part in fitting.items():
                check_room(self._slots, self._layers[path].mux_pool, part, f"{source}[{path!r}]")
            handle = store(
                self._slots,
                ((layer.mux_pool, fitting.get(path)) for path, layer in self._layers.items()),
            )
            self._bind(name, handle)
        return handle

    def remove(self, name: str) -> None:
        """Forget a name; its handle is dead from now on."""
        with self._lock:
            self._retire(self._slots.unbind(name))

    def enter(self, make: Callable[[], R], put: Callable[[R], None], leaving: bool = False) -> R:
        """Make a route and put it in force, with all of its adapters resident.

        Args:
            make: is called under the lock, so that names mean what they mean when it is put.
            put: puts it in force, which keeps its adapters where they are.
            leaving: the route that it takes the place of is not used any more.
        """
        with self._lock:
            route = make()
            put(route)
        return route

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        self._slots.lookup(list(names))

    def pin(self, name: str, pinned: bool) -> None:
        """Keep an adapter resident, or no longer."""
        self._slots.lookup([name])

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank."""
        with self._lock:
            check_reservation(self._slots, adapters, rank)
            self._slots.capacity = max(self._slots.capacity, adapters)
            for layer in self._layers.values():
                follow_materialised(layer)
                layer.mux_pool.reserve(self._reserved(adapters * rank), self._slots.capacity, rank)

    def memory(self) -> Memory:
        """What the pools hold."""
        with self._lock:
            self._reap()
            held: dict[int, tuple[int, int]] = {}  # slot -> rank rows, bytes
            pools = {path: layer.mux_pool for path, layer in self._layers.items()}
            for pool in pools.values():
                row_bytes = pool.row_bytes
                for slot, span in pool.spans.items():
                    rows, size = held.get(slot, (0, 0))
                    held[slot] = rows + span.rows, size + span.rows * row_bytes
            return Memory(
                targets={
                    path: PoolMemory(
                        pool.runs.capacity,
                        pool.runs.capacity - pool.runs.free,
                        pool.runs.largest,
                        pool.row_bytes,
                    )
                    for path, pool in pools.items()
                },
                adapters={
                    name: Holding(
                        *held.get(slot_of(handle), (0, 0)),
                        self._is_resident(handle),
                        self._is_pinned(handle),
                    )
                    for name, handle in self._slots.handles.items()
                },
                replaced=sum(held.get(slot_of(handle), (0, 0))[1] for handle in self._gone),
            )

    def _is_resident(self, handle: int) -> bool:
        return True

    def _is_pinned(self, handle: int) -> bool:
        return False

    def _reserved(self, rank_rows: int) -> int:
        return rank_rows

    def _parts(self, weights: Mapping[str, LoraWeights], source: str) -> dict[str, MuxLinear]:
        """The layers that an adapter touches, ready to hold it; refuses one that has others."""
        if not weights:
            raise AdapterError(f"`{source}` must hold at least one target, got none")
        unknown = [path for path in weights if path not in self._layers]
        if unknown:
            raise AdapterError(
                f"`{source}`: {unknown[0]!r} must be a target of the attached model, which it is "
                f"not ({len(unknown)} of {len(weights)} are not); attach with targets that cover it"
            )
        with self._lock:
            for layer in self._layers.values():
                follow_materialised(layer)
        return {path: layer for path, layer in self._layers.items() if path in weights}

    def _fitting(self, stored: Stored) -> dict[str, LoraWeights]:
        """path -> the shapes of what the pool is to hold, which are right."""
        shapes = stored.shapes()
        return {
            path: check_fit(
                layer.mux_pool, layer.mux_shard, shapes[path], f"{stored.source}[{path!r}]"
            )
            for path, layer in self._parts(shapes, stored.source).items()
        }

    def _checked(self, weights: Mapping[str, LoraWeights], source: str) -> dict[str, LoraWeights]:
        """path -> what the pool is to hold."""
        return {
            path: checked(layer.mux_pool, layer.mux_shard, weights[path], f"{source}[{path!r}]")
            for path, layer in self._parts(weights, source).items()
        }

    def _bind(self, name: str, handle: int) -> None:
        before = self._slots.bind(name, handle)
        if before is not None:
            self._router.follow(before, handle)
            self._retire(before)

    def _retire(self, handle: int) -> None:
        self._gone.add(handle)
        self._reap()

    def _reap(self) -> None:
        """Free what lost its name, as far as no forward pass uses it."""
        if not self._gone:
            return
        held, read = self._router.held(), self._router.read()
        for handle in list(self._gone):
            # A handle that is dead can only be used by a pass that had begun before.
            users = held if self._slots.is_awake(handle) else read
            if users is not None and handle not in users:
                self._free(handle)

    def _free(self, handle: int) -> None:
        """Free what lost its name."""
        self._gone.remove(handle)
        self._erase(handle)
        self._slots.free(handle)

    def _erase(self, handle: int) -> None:
        for layer in self._layers.values():
            layer.mux_pool.erase(slot_of(handle))
