"""Adapters beyond the memory of the device: pools of a fixed size, and the rest on the host."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from ..checkpoints import Outline, PackedTensors, StoredAdapter, copy_to_host
from ..core import (
    LoraWeights,
    Slots,
    Stream,
    has_streams,
    rank_rows,
    slot_of,
    synchronized,
)
from ..errors import PoolCapacityError
from ..layers import MuxLinear, check_room, write
from ..routes import Route, Router
from .changes import Prepared, Promise, Promises
from .memory import check_fit, rank_rows_within
from .placement import Placement, find_room
from .resident import Adapters, AnyRoute, Result
from .trained_adapter import TrainedAdapter

Found = TypeVar("Found")

# What one holding of the lock may do, because routes wait meanwhile: about 5 ms on a CPU.
SLIDES_AT_ONCE = 64
SPANS_AT_ONCE = 8192  # that are erased, over all pools


class BoundedAdapters(Adapters):
    """Loading registers an adapter. Routing, prefetching or pinning it makes it resident.

    The pools have their size from the beginning and never move, so that a CUDA graph may read them.
    When a pool is full, the adapters that were routed least recently make room, except those that
    are pinned or that a forward pass may still ask for.

    A device's pools are written by a stream of their own, so that adapters travel while the model
    computes. What reads them waits, see core/streams.py.
    """

    def __init__(
        self, layers: dict[str, MuxLinear], slots: Slots, router: Router, memory: int
    ) -> None:
        super().__init__(layers, slots, router)
        self._streams: dict[torch.device, Stream] = {}
        rows = rank_rows_within(memory, list(self._pools.values()))
        with self._growing():
            for pool in self._pools.values():
                pool.fix(rows)
        self._loaded: dict[int, StoredAdapter] = {}  # by handle
        # Handles, the one that was routed last at the end. What is here is there with all it needs.
        self._resident: OrderedDict[int, None] = OrderedDict()
        # Of adapters that fit, and for which the pools have room: checked once for each shape.
        self._known: WeakSet[Outline] = WeakSet()
        self._staying = Promises()  # whose adapters are resident

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_known"}
        return {**kept, "_streams": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _known=WeakSet())

    def prepare_weights(
        self,
        weights: Mapping[str, LoraWeights],
        source: str,
        saved: StoredAdapter | None = None,
    ) -> Prepared:
        """Register a copy of an adapter, which stays on the host."""
        self._cut(weights, source)
        return self.prepare(replace(copy_to_host(source, weights, self._on_gpu()), saved=saved))

    def prepare(self, stored: StoredAdapter) -> Prepared:
        """Register an adapter; its values are read when it becomes resident."""
        for part in filter(None, (stored, stored.saved)):
            if part.outline not in self._known:
                self._cut_shapes(part)  # which raises
        if stored.saved is None:
            return self._registered(stored)
        self._cut(stored.saved.weights(stored.saved.read(False)), stored.source)
        return self._registered(stored, stored.saved.digest)

    @synchronized
    def _registered(self, stored: StoredAdapter, digest: bytes = b"") -> Prepared:
        self._change.recover()
        with self._change:
            self._free_unused()
            saved, companion = stored.saved, None
            if saved is not None:
                companion = self._slots.companions.of_modules(
                    saved.outline.keys, digest, lambda: self._held(saved)
                )
            handle = self._held(replace(stored, saved=None))
            if companion is not None:
                self._slots.accompany(handle, companion)
            return self._claimed(handle)

    def _held(self, stored: StoredAdapter) -> int:
        """A new handle, whose values are on the host or in a file."""
        if self._slots.captured:
            for path, part in stored.shapes().items():
                check_room(self._slots, self._pools[path], part, f"{stored.source}[{path!r}]")
        handle = self._slots.allot()
        self._reserve_for(stored.outline)
        self._loaded[handle] = stored
        return handle

    def _reserve_for(self, outline: Outline) -> None:
        """Let every pool have room for an adapter in any slot, so that a graph can read it."""
        *_, last = self._pools.values()
        if outline in self._known and len(last.rank) >= self._slots.capacity:
            return
        shapes = outline.shapes()
        with self._growing():
            for path, pool in self._pools.items():
                pool.expect(shapes.get(path), self._slots.capacity)
        self._known.add(outline)

    def publish(self, prepared: Mapping[str, Prepared], replace: bool = False) -> dict[str, int]:
        """Give prepared adapters their names, all or none; returns name -> handle.

        One becomes resident at once if it replaces an adapter that is pinned or in force by name.
        """
        handles = {name: one.handle for name, one in prepared.items()}

        def before() -> tuple[dict[int, int], Collection[int]]:
            self._check_names(prepared, replace)
            found = {handle: self._slots.get(name) for name, handle in handles.items()}
            follows = {
                handle: old
                for handle, old in found.items()
                if old is not None and (old in self._pinned or self._router.is_sticky(old))
            }
            return follows, self._slots.companions.beside(follows)

        def bind(follows: dict[int, int]) -> dict[str, int]:
            with self._change:
                self._pinned.update(new for new, old in follows.items() if old in self._pinned)
                self._bind(handles)
            return handles

        return self._made_resident(before, bind)

    def resident(
        self,
        make: Callable[[], AnyRoute],
        publish: Callable[[AnyRoute], Result],
        leaving: bool = False,
    ) -> Result:
        """Put a new route in force, whose adapters are resident and stay."""

        def route_and_handles() -> tuple[AnyRoute, Collection[int]]:
            route = make()
            return route, self._handles_of(route)

        return self._made_resident(route_and_handles, publish, leaving)

    def _handles_of(self, route: Route | None) -> Collection[int]:
        if route is None or not route.handles:
            return ()
        there = route.handles <= self._loaded.keys()
        if not (there and (route.promised or route.handles.isdisjoint(self._nameless))):
            route.check_loaded(self._slots)  # which raises
        return route.handles

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        wanted = list(names)
        self._made_resident(
            lambda: (None, self._slots.companions.beside(self._slots.lookup(wanted).values())),
            lambda nothing: nothing,
        )

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so."""

        def handle_of_name() -> tuple[int, Collection[int]]:
            handle = self._slots.lookup([name])[name]
            return handle, self._slots.companions.beside([handle])

        self._made_resident(handle_of_name, self._pinned.add)

    def promise(self, find: Callable[[], Sequence[Collection[int]]]) -> list[Promise]:
        """Promise adapters that fit, beside those that stay in the pools whatever comes."""

        def checked() -> Sequence[Collection[int]]:
            found, kept = find(), self._pinned.union(self.training.handles)
            for wanted in found:
                rows = {h: self._loaded[h].outline.rank_rows for h in kept.union(wanted)}
                check_fit(self._pools, rows, wanted)
            return found

        return super().promise(checked)

    def hold(self, handles: Collection[int]) -> Promise:
        """Make promised adapters resident, and keep them so while the new promise lives.

        Raises:
            PoolCapacityError: there is no room at this moment.
            CheckpointError: their files cannot be read any more.
        """
        held = Promise(frozenset(handles))
        return self._made_resident(lambda: (held, held.handles), self._hold)

    def _hold(self, held: Promise) -> Promise:
        self._staying.add(held)
        return held

    def _parts_of(self, handle: int) -> dict[str, LoraWeights]:
        return self._loaded[handle].shapes()

    def _exact(self, handle: int, name: str) -> dict[str, LoraWeights]:
        return self._loaded[handle].weights(self._read(self._loaded[handle]))

    def train(
        self, name: str, weights: Mapping[str, LoraWeights], dropout: float | None
    ) -> TrainedAdapter:
        """Begin to train an adapter, which stays resident from now on."""

        def handle_of_name() -> tuple[int, Collection[int]]:
            handle = self._slots.lookup([name])[name]
            return handle, [handle]

        def begin(handle: int) -> TrainedAdapter:
            with self._change:
                return self.training.begin(handle, name, weights, dropout)

        return self._made_resident(handle_of_name, begin)

    def _learnt(self, handle: int, stored: StoredAdapter) -> None:
        self._loaded[handle] = stored

    @synchronized
    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        self._change.recover()
        self._pinned.discard(self._slots.lookup([name])[name])

    def _made_resident(
        self,
        find: Callable[[], tuple[Found, Collection[int]]],
        publish: Callable[[Found], Result],
        leaving: bool = False,
    ) -> Result:
        """Make adapters resident, then do what needs them, with the lock held.

        Files are read without the lock, and room is made in steps, between which others can pass.
        Names and routes may change meanwhile, so that `find` is called again at each step.

        Args:
            find: returns what `publish` takes, and the handles that are to be resident.
            publish: is called when they are.
            leaving: as in `resident`.

        Returns:
            What `publish` returns.
        """
        read: dict[int, PackedTensors] = {}
        while True:
            unread, results = self._step(find, publish, leaving, read)
            if results:
                return results[0]
            for handle, stored in unread.items():
                read[handle] = self._read(stored)
            time.sleep(0)  # the lock alone would let this thread take it again

    @synchronized
    def _step(
        self,
        find: Callable[[], tuple[Found, Collection[int]]],
        publish: Callable[[Found], Result],
        leaving: bool,
        read: Mapping[int, PackedTensors],
    ) -> tuple[dict[int, StoredAdapter], list[Result]]:
        """Go on as far as one holding of the lock may: what is still unread, and the result."""
        self._change.recover()
        found, handles = find()
        arriving = [handle for handle in handles if handle not in self._resident]
        if arriving:
            with self._change:
                self._free_unused()
            placement = self._find_room(arriving, handles, leaving)
            unread = {h: self._loaded[h] for h in arriving if h not in read}
            if unread:
                return unread, []
            with self._change:
                if not self._make_room(placement):
                    return {}, []
                self._bring(placement.arriving, read)
        for handle in handles:  # they are used now
            self._resident.move_to_end(handle)
        return {}, [publish(found)]

    def _find_room(self, arriving: list[int], wanted: Collection[int], leaving: bool) -> Placement:
        reachable = self._router.reachable(leaving)
        staying = self._staying.handles
        # A route that only the device knows may select any adapter that is present.
        idle = [
            handle
            for handle in dict.fromkeys([*self._given_up(), *self._resident])
            if reachable is not None and handle not in reachable and handle not in staying
        ]
        kept = self._pinned.union(self.training.handles)
        spared = self._slots.companions.beside(kept).union(wanted)
        rows = {handle: self._loaded[handle].outline.rank_rows for handle in (*arriving, *idle)}
        return find_room(self._pools, rows, arriving, idle, [h for h in idle if h not in spared])

    def _make_room(self, placement: Placement) -> bool:
        """Do what a placement asks for, or a part of it; whether that was all."""
        evictions = max(1, SPANS_AT_ONCE // len(self._pools))
        slides = [(path, slot) for path, slots in placement.sliding.items() for slot in slots]
        self._put_out(placement.evicted[:evictions])
        if len(placement.evicted) > evictions:
            return False
        now = slides[:SLIDES_AT_ONCE]
        if now:
            with self._writing(slot for _, slot in now):
                for path, slot in now:
                    self._pools[path].slide(slot)
        return len(slides) <= SLIDES_AT_ONCE

    def _bring(self, arriving: Iterable[int], read: Mapping[int, PackedTensors]) -> None:
        """Write adapters to the pools, for whom there is room."""
        for handle in arriving:
            stored = self._loaded[handle]
            with self._writing([slot_of(handle)]):
                # By the stream that has the values copied: a file's need not be aligned.
                weights = {
                    device: stored.weights(read[handle].to(device)) for device in self._devices()
                }
                write(self._slots, handle, self._parts(weights))
                self._slots.make_live(handle)
            self._resident[handle] = None

    def _put_out(self, handles: Iterable[int]) -> None:
        """Take adapters out of the pools; those without a name are gone for good."""
        nameless = self._nameless.intersection(handles) - self._promises.handles
        if nameless:
            self._free(nameless)
        evicted = [handle for handle in handles if handle not in nameless]
        if evicted:
            with self._writing(map(slot_of, evicted)):
                for handle in evicted:
                    self._slots.suspend(handle)
                self._erase(evicted)
        for handle in evicted:
            del self._resident[handle]

    def _free(self, handles: Iterable[int]) -> None:
        super()._free(handles)
        for handle in handles:
            for kept in (self._loaded, self._resident):
                kept.pop(handle, None)

    def _mend_pools(self) -> None:
        for handle in self._loaded:
            if self._slots.is_live(handle) and handle not in self._resident:
                self._slots.suspend(handle)  # it was on its way in
        super()._mend_pools()

    def _mend(self) -> None:
        super()._mend()
        tenants = self._slots.tenants
        self._loaded = {h: adapter for h, adapter in self._loaded.items() if h in tenants}
        for handle in [h for h in self._resident if not self._slots.is_live(h)]:
            del self._resident[handle]

    def _is_whole(self, handle: int) -> bool:
        # The values of one with a name, or a promise, are on the host, should it have been on its
        # way in or out.
        gone = handle in self._nameless and handle not in self._promises.handles
        return gone or self._slots.is_live(handle)

    def _cut_shapes(self, stored: StoredAdapter) -> dict[str, LoraWeights]:
        shapes = super()._cut_shapes(stored)
        for path, part in shapes.items():
            capacity = self._pools[path].runs.capacity
            if rank_rows(part) > capacity:
                raise PoolCapacityError(
                    f"`{stored.source}[{path!r}]` must fit into the pool of {capacity} rank rows, "
                    f"got {rank_rows(part)}; attach with more memory"
                )
        return shapes

    def _stream(self, device: torch.device) -> Stream:
        if device not in self._streams:
            made: Stream = torch.cuda.Stream(device) if has_streams(device) else None  # type: ignore[no-untyped-call]
            self._streams[device] = made
        return self._streams[device]
