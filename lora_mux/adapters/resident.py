"""The adapters of an attached model, all of them resident."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import TypeVar

import torch

from ..checkpoints import StoredAdapter
from ..core import (
    LoraWeights,
    Slots,
    Stream,
    has_streams,
    slot_of,
    synchronized,
)
from ..errors import AdapterError
from ..layers import (
    MuxLinear,
    check_reservation,
    check_room,
    cut_and_check,
    cut_and_check_shapes,
    follow_materialised,
    write,
)
from ..routes import Route, Router
from .changes import Change, Claims, Prepared
from .memory_report import MemoryReport, report_memory

AnyRoute = TypeVar("AnyRoute", bound=Route | None)
Result = TypeVar("Result")


class Adapters:
    """Every loaded adapter is resident, and the pools grow with them.

    One lock serialises changes. Forward passes do not take it: adapters that they may still ask for
    (`Router.reachable`) stay where they are, and are freed later.

    An adapter is prepared first, under a handle that nobody knows. Publishing it is one step. What
    an interrupt leaves of a change, at whatever line it comes, is mended by `_mend`.
    """

    def __init__(self, layers: dict[str, MuxLinear], slots: Slots, router: Router) -> None:
        self._layers = layers  # the Mux's own
        self._pools = {path: layer.mux_pool for path, layer in layers.items()}
        self._slots = slots
        self._router = router
        self._pinned: set[int] = set()  # handles; nothing needs a pin where all are resident
        # Handles without a name: of adapters that lost it and may still be in use, or that are
        # being prepared.
        self._nameless: set[int] = set()
        self._claims = Claims()
        self._binding: dict[str, int] = {}  # names that are being given, all of them or none
        self._change = Change(self._mend)

    @property
    def _lock(self) -> AbstractContextManager[bool]:
        return self._router.changes

    @synchronized
    def settle(self) -> None:
        """Before a copy is made: everything is in order, and the current stream waits for it."""
        self._change.recover()
        self._router.order.copied()

    @synchronized
    def include(self, path: str, layer: MuxLinear) -> None:
        """Let one more layer carry adapters; those that are loaded leave it alone."""
        self._change.recover()
        layer.mux_pool.reserve(0, self._slots.capacity, 0)
        self._pools[path] = layer.mux_pool
        self._layers[path] = layer

    def prepare(self, stored: StoredAdapter) -> Prepared:
        """Read an adapter, and bring it to its place."""
        self._cut_shapes(stored)  # which raises before anything is read
        weights = stored.weights(stored.read(False))
        return self.prepare_weights(weights, stored.source, stored.saved)

    def prepare_weights(
        self,
        weights: Mapping[str, LoraWeights],
        source: str,
        saved: StoredAdapter | None = None,
    ) -> Prepared:
        """Bring an adapter to its place.

        Everything is checked before anything is written, and a failure leaves nothing behind.

        Args:
            weights: path -> factors.
            source: what error messages call them.
            saved: the modules that it saved, which become its companion.
        """
        cut = self._cut(weights, source)
        if saved is None:
            return self._placed(cut, source)
        modules = self._cut(saved.weights(saved.read(False)), saved.source)
        return self._placed(cut, source, modules, saved.digest)

    @synchronized
    def _placed(
        self,
        cut: Mapping[str, LoraWeights],
        source: str,
        saved: Mapping[str, LoraWeights] = MappingProxyType({}),
        digest: bytes = b"",
    ) -> Prepared:
        self._change.recover()
        with self._change:
            self._free_unused()

            def hold() -> int:
                held = self._written(saved, source)
                with self._writing([slot_of(held)]):
                    self._slots.make_live(held)
                return held

            companion = self._slots.companions.of_modules(saved, digest, hold) if saved else None
            handle = self._written(cut, source)
            if companion is not None:
                self._slots.accompany(handle, companion)
            return self._claimed(handle)

    def _written(self, cut: Mapping[str, LoraWeights], source: str) -> int:
        """A new handle, whose rank rows are in their places."""
        for path, part in cut.items():
            check_room(self._slots, self._pools[path], part, f"{source}[{path!r}]")
        handle = self._slots.allot()
        parts = ((pool, cut.get(path)) for path, pool in self._pools.items())
        with self._growing([slot_of(handle)]):
            write(self._slots, handle, parts)
        return handle

    def _claimed(self, handle: int) -> Prepared:
        prepared = self._claims[handle] = Prepared(handle)
        self._nameless.add(handle)
        return prepared

    @synchronized
    def publish(self, prepared: Mapping[str, Prepared], replace: bool = False) -> dict[str, int]:
        """Give prepared adapters their names, all or none; returns name -> handle.

        Args:
            prepared: by name.
            replace: the names may be those of loaded adapters.
        """
        self._change.recover()
        self._check_names(prepared, replace)
        handles = {name: one.handle for name, one in prepared.items()}
        with self._change:
            with self._writing(map(slot_of, handles.values())):
                for handle in handles.values():
                    self._slots.make_live(handle)
            self._bind(handles)
        return handles

    @synchronized
    def abandon(self, prepared: Iterable[Prepared]) -> None:
        """Take prepared adapters away again, those that got no name."""
        self._change.recover()
        for one in prepared:
            self._claims.pop(one.handle, None)
        with self._change:
            self._free_unused()

    def _check_names(self, prepared: Mapping[str, Prepared], replace: bool) -> None:
        for name, new in prepared.items():
            self._slots.check_new(name, replace)
            old, sticky = self._slots.get(name), self._router.sticky.route
            if old is not None and sticky is not None and self._router.is_sticky(old):
                sticky.with_replaced(old, new.handle, self._slots)  # which raises

    @synchronized
    def remove(self, name: str) -> None:
        """Forget a name. Its handle is dead from now on."""
        self._change.recover()
        self._slots.lookup([name])
        with self._change:
            self._unbind(name)

    def _unbind(self, name: str) -> None:
        with self._writing([slot_of(self._slots.lookup([name])[name])]):
            self._nameless.add(self._slots.unbind(name))
        self._free_unused()

    @synchronized
    def resident(
        self,
        make: Callable[[], AnyRoute],
        publish: Callable[[AnyRoute], Result],
        leaving: bool = False,
    ) -> Result:
        """Put a new route in force, whose adapters are resident and stay.

        Nothing else changes meanwhile. Afterwards the route itself keeps its adapters where they
        are, as long as it is in force.

        Args:
            make: makes the route. It is called with the lock held, so that names mean the same when
                the route is put in force.
            publish: puts it in force.
            leaving: the route that the new one replaces is not used any more.

        Returns:
            What `publish` returns.
        """
        self._change.recover()
        return publish(make())

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        self._slots.lookup(list(names))

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so."""
        self._slots.lookup([name])

    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        self._slots.lookup([name])

    @synchronized
    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank."""
        self._change.recover()
        check_reservation(self._slots, adapters, rank)
        with self._change, self._growing():
            self._slots.capacity = max(self._slots.capacity, adapters)
            for layer in self._layers.values():
                follow_materialised(layer)
                pool = layer.mux_pool
                # Bounded pools have all their rank rows from the beginning.
                rank_rows = adapters * rank if pool.fixed is None else 0
                pool.reserve(rank_rows, self._slots.capacity, rank)

    @synchronized
    def memory(self) -> MemoryReport:
        """How much memory the pools and the adapters take."""
        self._change.recover()
        with self._change:
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
        self._follow_materialised()
        return {path: layer for path, layer in self._layers.items() if path in weights}

    def _cut_shapes(self, stored: StoredAdapter) -> dict[str, LoraWeights]:
        """Path -> checked factors without values, as the pool is to hold them."""
        shapes = stored.shapes()
        return {
            path: cut_and_check_shapes(
                layer.mux_pool, layer.mux_kind, shapes[path], f"{stored.source}[{path!r}]"
            )
            for path, layer in self._touched_layers(shapes, stored.source).items()
        }

    def _cut(self, weights: Mapping[str, LoraWeights], source: str) -> dict[str, LoraWeights]:
        """Path -> checked factors, as the pool is to hold them."""
        return {
            path: cut_and_check(
                layer.mux_pool, layer.mux_kind, weights[path], f"{source}[{path!r}]"
            )
            for path, layer in self._touched_layers(weights, source).items()
        }

    @synchronized
    def _follow_materialised(self) -> None:
        for layer in self._layers.values():
            follow_materialised(layer)

    def _devices(self) -> set[torch.device]:
        return {pool.A_rows.device for pool in self._pools.values()}

    def _stream(self, device: torch.device) -> Stream:
        """The stream on which the pools of a device are written."""
        return torch.cuda.current_stream(device) if has_streams(device) else None

    @contextmanager
    def _writing(self, slots: Iterable[int] | None = None) -> Iterator[None]:
        """Inside, pools and tables are written, as far as they concern these slots; None = all."""
        concerned = None if slots is None else frozenset(slots)
        with ExitStack() as stack:
            for device in self._devices():
                stream, order = self._stream(device), self._router.order
                stack.enter_context(order.writing(device, stream, concerned))
                if has_streams(device):
                    self._slots.live(device)  # made before anybody reads it
            yield

    @contextmanager
    def _growing(self, slots: Iterable[int] = ()) -> Iterator[None]:
        """As `_writing`, where pools may grow: who reads the old buffers goes on doing so."""
        before = [(pool, pool._buffers.copy()) for pool in self._pools.values()]
        with self._writing(slots):
            yield
        for pool, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None and buffer is not pool._buffers[name]:
                    self._router.order.keep(buffer)

    def _bind(self, handles: dict[str, int]) -> None:
        """Give live adapters their names, and free those that had them."""
        self._binding = handles  # from here on it happens, even if an interrupt comes
        self._finish_binding()
        self._free_unused()

    def _finish_binding(self) -> None:
        for name, handle in self._binding.items():
            before = self._slots.bind(name, handle)
            if before not in (None, handle):
                assert before is not None
                self._nameless.add(before)
                self._pinned.discard(before)
                self._router.replace_sticky(before, handle)
        # A new set. In one that has held thousands, Python looks for the few through the room of
        # all: 50 us of each route, where 5,000 adapters were loaded at once.
        self._nameless = self._nameless.difference(self._binding.values())
        self._binding = {}

    def _mend(self) -> None:
        """Put in order what an interrupt has left. It may itself be interrupted, and begin again.

        What has begun to be published is published; all else that was begun is undone.
        """
        self._finish_binding()
        with self._writing():
            self._mend_pools()
        self._router.mend_sticky()
        self._free_unused()

    def _mend_pools(self) -> None:
        self._slots.mend()
        named = set(self._slots.handles.values())
        self._nameless = self._slots.tenants - named - self._slots.companions.handles
        self._pinned &= named
        kept = {slot_of(handle) for handle in self._slots.tenants if self._is_whole(handle)}
        for pool in self._pools.values():
            pool.mend(kept)

    def _is_whole(self, handle: int) -> bool:
        """Whether the rank rows of a handle are all there, or may be in use."""
        return True

    def _free_unused(self) -> None:
        """Free the adapters without a name that no forward pass uses any more."""
        while self._nameless:  # companions that nobody has any more come after their adapters
            reachable, in_use = self._router.reachable(), self._router.in_use()
            unused = []
            for handle in self._nameless - self._claims.alive():
                # A pass that begins now cannot use a handle that is not live.
                users = reachable if self._slots.is_live(handle) else in_use
                if users is not None and handle not in users:
                    unused.append(handle)
            if not unused:
                return
            self._free(unused)

    def _free(self, handles: Iterable[int]) -> None:
        """Free the slots and the rank rows of adapters without a name."""
        concerned = self._slots.companions.beside(handles)
        with self._writing(map(slot_of, concerned)):
            self._erase(handles)
            for handle in handles:
                companion = self._slots.free(handle)
                self._nameless.discard(handle)
                if companion is not None:
                    self._nameless.add(companion)

    def _erase(self, handles: Iterable[int]) -> None:
        slots = [slot_of(handle) for handle in handles]
        for pool in self._pools.values():
            pool.erase(slots)
