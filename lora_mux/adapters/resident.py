"""The adapters of an attached model, all of them resident."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from ..checkpoints import StoredAdapter
from ..core import LoraWeights, Slots, slot_of
from ..errors import AdapterError
from ..layers import (
    MuxLinear,
    check_reservation,
    check_room,
    cut_and_check,
    cut_and_check_shapes,
    follow_materialised,
    store,
)
from ..routes import Route, Router
from .memory_report import MemoryReport, report_memory

AnyRoute = TypeVar("AnyRoute", bound=Route | None)


class Adapters:
    """Every loaded adapter is resident, and the pools grow with them.

    One lock serialises changes. Forward passes do not take it: adapters that they may still ask for
    (`Router.reachable`) stay where they are, and are freed later.
    """

    def __init__(self, layers: Mapping[str, MuxLinear], slots: Slots, router: Router) -> None:
        self._layers = layers
        self._pools = {path: layer.mux_pool for path, layer in layers.items()}
        self._slots = slots
        self._router = router
        self._pinned: set[int] = set()  # handles; nothing needs a pin where all are resident
        self._nameless: set[int] = set()  # handles that lost their name, and may still be in use

    @property
    def _lock(self) -> AbstractContextManager[bool]:
        return self._router.changes

    def settle(self) -> None:
        """Let the current stream wait for all adapters that are on their way to the device."""

    def load(self, name: str, stored: StoredAdapter, replace: bool = False) -> int:
        """Read an adapter and load it under a name; returns its handle."""
        self._cut_shapes(stored)  # which raises before anything is read
        return self.add(name, stored.weights(stored.read(False)), stored.source, replace)

    def add(
        self, name: str, weights: Mapping[str, LoraWeights], source: str, replace: bool = False
    ) -> int:
        """Load an adapter under a name; returns its handle.

        Everything is checked before anything is written, and a failure leaves nothing behind.

        Args:
            name: a new name.
            weights: path -> factors.
            source: what error messages call them.
            replace: the name may be that of a loaded adapter.
        """
        cut = self._cut(weights, source)
        with self._lock:
            self._slots.check_new(name, replace)
            self._free_unused()
            for path, part in cut.items():
                check_room(self._slots, self._pools[path], part, f"{source}[{path!r}]")
            handle = store(
                self._slots, ((pool, cut.get(path)) for path, pool in self._pools.items())
            )
            self._bind(name, handle)
        return handle

    def remove(self, name: str) -> None:
        """Forget a name. Its handle is dead from now on."""
        with self._lock:
            self._retire(self._slots.unbind(name))

    def resident(
        self, make: Callable[[], AnyRoute], leaving: bool = False
    ) -> AbstractContextManager[AnyRoute]:
        """A block in which a new route can be put in force: its adapters are resident and stay.

        Inside the block nothing else changes. Afterwards the route itself keeps its adapters where
        they are, if it is in force.

        Args:
            make: makes the route. It is called with the lock held, so that names mean the same when
                the route is put in force.
            leaving: the route that the new one replaces is not used any more.
        """
        return self._locked(make)

    @contextmanager
    def _locked(self, make: Callable[[], AnyRoute]) -> Iterator[AnyRoute]:
        with self._lock:
            yield make()

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        self._slots.lookup(list(names))

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so."""
        self._slots.lookup([name])

    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        self._slots.lookup([name])

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank."""
        with self._lock:
            check_reservation(self._slots, adapters, rank)
            self._slots.capacity = max(self._slots.capacity, adapters)
            for layer in self._layers.values():
                follow_materialised(layer)
                pool = layer.mux_pool
                # Bounded pools have all their rank rows from the beginning.
                rank_rows = adapters * rank if pool.fixed is None else 0
                pool.reserve(rank_rows, self._slots.capacity, rank)

    def memory(self) -> MemoryReport:
        """How much memory the pools and the adapters take."""
        with self._lock:
            self._free_unused()
            return report_memory(self._pools, self._slots, self._pinned, self._nameless)

    def _touched_layers(
        self, weights: Mapping[str, LoraWeights], source: str
    ) -> dict[str, MuxLinear]:
        """The layers that an adapter touches, ready to hold it."""
        if not weights:
            raise AdapterError(f"`{source}` must hold at least one target, got none")
        unknown = [path for path in weights if path not in self._layers]
        if unknown:
            raise AdapterError(
                f"`{source}`: {unknown[0]!r} must be a target of the attached model, but is not "
                f"({len(unknown)} of {len(weights)} paths are not); attach with targets that cover "
                "it"
            )
        with self._lock:
            for layer in self._layers.values():
                follow_materialised(layer)
        return {path: layer for path, layer in self._layers.items() if path in weights}

    def _cut_shapes(self, stored: StoredAdapter) -> dict[str, LoraWeights]:
        """Path -> checked factors without values, as the pool is to hold them."""
        shapes = stored.shapes()
        return {
            path: cut_and_check_shapes(
                layer.mux_pool, layer.mux_shard, shapes[path], f"{stored.source}[{path!r}]"
            )
            for path, layer in self._touched_layers(shapes, stored.source).items()
        }

    def _cut(self, weights: Mapping[str, LoraWeights], source: str) -> dict[str, LoraWeights]:
        """Path -> checked factors, as the pool is to hold them."""
        return {
            path: cut_and_check(
                layer.mux_pool, layer.mux_shard, weights[path], f"{source}[{path!r}]"
            )
            for path, layer in self._touched_layers(weights, source).items()
        }

    def _bind(self, name: str, handle: int) -> None:
        before = self._slots.bind(name, handle)
        if before is not None:
            self._router.replace_sticky(before, handle)
            self._retire(before)

    def _retire(self, handle: int) -> None:
        """Free an adapter that lost its name, now or once no forward pass uses it."""
        self._nameless.add(handle)
        self._free_unused()

    def _free_unused(self) -> None:
        """Free the adapters without a name that no forward pass uses any more."""
        if not self._nameless:
            return
        reachable, in_use = self._router.reachable(), self._router.in_use()
        for handle in list(self._nameless):
            # A pass that begins now cannot use a handle that is not live.
            users = reachable if self._slots.is_live(handle) else in_use
            if users is not None and handle not in users:
                self._free(handle)

    def _free(self, handle: int) -> None:
        """Free the slot and the rank rows of an adapter without a name."""
        self._nameless.remove(handle)
        self._erase(handle)
        self._slots.free(handle)

    def _erase(self, handle: int) -> None:
        for pool in self._pools.values():
            pool.erase(slot_of(handle))
