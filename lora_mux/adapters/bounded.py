"""Adapters beyond the memory of the device: pools of a fixed size, and the rest on the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from typing import Any, TypeVar

import torch

from ..checkpoints import PackedTensors, StoredAdapter, copy_to_host
from ..core import LoraWeights, Pool, Slots, rank_rows
from ..errors import PoolCapacityError
from ..layers import MuxLinear, check_room, write
from ..routes import Route, Router
from .copy_stream import CopyStream
from .memory_budget import rank_rows_within
from .placement import Placement, find_room
from .resident import Adapters, AnyRoute

Result = TypeVar("Result")


@dataclass
class LoadedAdapter:
    """An adapter that was loaded, resident or not."""

    stored: StoredAdapter
    rank_rows: Mapping[str, int]  # path -> the rank rows that it takes there
    # Of a resident adapter: the marks after its copies.
    arrivals: dict[torch.device, torch.cuda.Event | None] = field(default_factory=dict)


class BoundedAdapters(Adapters):
    """Loading registers an adapter. Routing, prefetching or pinning it makes it resident.

    The pools have their size from the beginning and never move, so that a CUDA graph may read them.
    When a pool is full, the adapters that were routed least recently make room, except those that
    are pinned or that a forward pass may still ask for.
    """

    def __init__(
        self, layers: Mapping[str, MuxLinear], slots: Slots, router: Router, memory: int
    ) -> None:
        super().__init__(layers, slots, router)
        rows = rank_rows_within(memory, list(self._pools.values()))
        for pool in self._pools.values():
            pool.fix(rows)
        self._loaded: dict[int, LoadedAdapter] = {}  # by handle
        self._resident: dict[int, None] = {}  # handles, the one that was routed last at the end
        self._streams: dict[torch.device, CopyStream] = {}

    def settle(self) -> None:
        """Let the current stream wait for all adapters that are on their way to the device."""
        with self._lock:
            for handle in self._resident:
                self._wait_for(handle)

    def __getstate__(self) -> dict[str, Any]:
        loaded = {h: with_changes(adapter, arrivals={}) for h, adapter in self._loaded.items()}
        return {**vars(self), "_loaded": loaded, "_streams": {}}

    def add(
        self, name: str, weights: Mapping[str, LoraWeights], source: str, replace: bool = False
    ) -> int:
        """Load a copy of an adapter, which stays on the host."""
        self._cut(weights, source)
        return self.load(name, copy_to_host(source, weights, self._on_gpu()), replace)

    def load(self, name: str, stored: StoredAdapter, replace: bool = False) -> int:
        """Register an adapter; its values are read when it becomes resident.

        It becomes resident at once if it replaces an adapter that is pinned or in force by name.
        """
        shapes = self._cut_shapes(stored)
        with self._lock:
            self._slots.check_new(name, replace)
            self._free_unused()
            for path, part in shapes.items():
                check_room(self._slots, self._pools[path], part, f"{stored.source}[{path!r}]")
            handle = self._slots.allot()
            rows = {path: rank_rows(part) for path, part in shapes.items()}
            for path, pool in self._pools.items():  # so that a graph can read it in any slot
                pool.reserve(0, self._slots.capacity, rows.get(path, 0))
            self._loaded[handle] = LoadedAdapter(stored, rows)
        try:
            self._name(handle, name, replace)
        except BaseException:
            with self._lock:
                self._put_out([handle] if handle in self._resident else [])
                del self._loaded[handle]
                self._slots.free(handle)
            raise
        return handle

    def _name(self, handle: int, name: str, replace: bool) -> None:
        """Give a registered adapter its name, and the residence and pin of the one before."""

        def before_and_needed() -> tuple[int | None, Iterable[int]]:
            self._slots.check_new(name, replace)
            before = self._slots.get(name)
            stays = before is not None and (
                before in self._pinned or self._router.is_sticky(before)
            )
            return before, [handle] if stays else []

        with self._made_resident(before_and_needed) as before:
            if before in self._pinned:
                self._pinned.add(handle)
            self._bind(name, handle)

    def remove(self, name: str) -> None:
        """Forget a name. Its handle is dead from now on."""
        with self._lock, self._writing():
            super().remove(name)

    def resident(
        self, make: Callable[[], AnyRoute], leaving: bool = False
    ) -> AbstractContextManager[AnyRoute]:
        """A block in which a new route can be put in force: its adapters are resident and stay."""

        def route_and_handles() -> tuple[AnyRoute, Iterable[int]]:
            route = make()
            return route, self._handles_of(route)

        return self._made_resident(route_and_handles, leaving)

    def _handles_of(self, route: Route | None) -> Iterable[int]:
        if route is None or not route.handles:
            return ()
        if not (route.handles <= self._loaded.keys() and route.handles.isdisjoint(self._nameless)):
            route.check_loaded(self._slots)  # which raises
        return route.handles

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        wanted = list(names)
        with self._made_resident(lambda: (None, self._slots.lookup(wanted).values())):
            pass

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so."""

        def handle_of_name() -> tuple[int, Iterable[int]]:
            handle = self._slots.lookup([name])[name]
            return handle, [handle]

        with self._made_resident(handle_of_name) as handle:
            self._pinned.add(handle)

    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        with self._lock:
            self._pinned.discard(self._slots.lookup([name])[name])

    @contextmanager
    def _made_resident(
        self, find: Callable[[], tuple[Result, Iterable[int]]], leaving: bool = False
    ) -> Iterator[Result]:
        """A block that holds the lock, and in which adapters are resident.

        Files are read without the lock. Names and routes may change meanwhile, so that `find` is
        called again afterwards.

        Args:
            find: returns the result that the block yields, and the handles that it needs.
            leaving: as in `resident`.
        """
        read: dict[int, PackedTensors] = {}
        while True:
            with self._lock:
                result, needed = find()
                handles = list(needed)
                arriving = [handle for handle in handles if handle not in self._resident]
                placement = self._find_room(arriving, handles, leaving) if arriving else None
                unread = {h: self._loaded[h].stored for h in arriving if h not in read}
                if not unread:
                    if placement is not None:
                        self._carry_out(placement, read)
                    self._use(handles)
                    yield result
                    return
            for handle, stored in unread.items():
                read[handle] = self._read(stored)

    def _find_room(self, arriving: list[int], wanted: list[int], leaving: bool) -> Placement:
        self._free_unused()
        reachable = self._router.reachable(leaving)
        present = *self._nameless, *self._resident
        # A route that only the device knows may select any adapter that is present.
        idle = [h for h in present if reachable is not None and h not in reachable]
        spared = self._pinned | set(wanted)
        rows = {handle: self._loaded[handle].rank_rows for handle in (*arriving, *idle)}
        return find_room(self._pools, rows, arriving, idle, [h for h in idle if h not in spared])

    def _read(self, stored: StoredAdapter) -> PackedTensors:
        """An adapter's values, checked."""
        values = stored.read(self._on_gpu())
        for path, part in stored.weights(values).items():
            pool = self._pools[path]
            # Otherwise they are known to be finite, since they were read or handed over.
            widest = max(torch.finfo(tensor.dtype).max for tensor in (part.A, part.B))
            if torch.finfo(pool.A_rows.dtype).max < widest or part.bias is not None:
                pool.check_values(part, f"{stored.source}[{path!r}]")
        return values

    def _carry_out(self, placement: Placement, read: Mapping[int, PackedTensors]) -> None:
        streams = self._streams_in_use()
        with self._writing():
            self._put_out(placement.evicted)
            for path, slots in placement.sliding.items():
                for slot in slots:
                    self._pools[path].slide(slot)
        for handle in placement.arriving:
            adapter = self._loaded[handle]
            weights = {
                device: adapter.stored.weights(stream.to_device(read[handle]))
                for device, stream in streams.items()
            }
            with self._writing():
                write(self._slots, handle, self._parts(weights))
            adapter.arrivals = {device: stream.mark() for device, stream in streams.items()}
            self._resident[handle] = None

    def _parts(
        self, weights: Mapping[torch.device, Mapping[str, LoraWeights]]
    ) -> Iterator[tuple[Pool, LoraWeights | None]]:
        """Each pool with what it is to hold of an adapter, whose weights are on every device."""
        for path, layer in self._layers.items():
            part = weights[layer.mux_pool.A_rows.device].get(path)
            if part is not None and layer.mux_shard is not None:
                part = layer.mux_shard.cut(part, path)
            yield layer.mux_pool, part

    def _put_out(self, handles: Iterable[int]) -> None:
        """Take adapters out of the pools; those without a name are gone for good."""
        for handle in handles:
            if handle in self._nameless:
                self._free(handle)
                continue
            self._slots.suspend(handle)
            self._erase(handle)
            del self._resident[handle]

    def _use(self, handles: Iterable[int]) -> None:
        """Note that adapters are used now, and let the current stream wait for their arrival."""
        for handle in handles:
            del self._resident[handle]
            self._resident[handle] = None
            self._wait_for(handle)

    def _wait_for(self, handle: int) -> None:
        for device, mark in self._loaded[handle].arrivals.items():
            self._streams[device].wait(mark)

    def _retire(self, handle: int) -> None:
        self._pinned.discard(handle)
        self._resident.pop(handle, None)
        super()._retire(handle)

    def _free(self, handle: int) -> None:
        with self._writing():
            super()._free(handle)
        del self._loaded[handle]

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

    def _devices(self) -> set[torch.device]:
        return {pool.A_rows.device for pool in self._pools.values()}

    def _on_gpu(self) -> bool:
        """Whether a pool is on a GPU, so that copies from pinned memory pay off."""
        return any(device.type == "cuda" for device in self._devices())

    def _streams_in_use(self) -> dict[torch.device, CopyStream]:
        for device in self._devices() - self._streams.keys():
            self._streams[device] = CopyStream(device)
        return {device: self._streams[device] for device in self._devices()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is written to pools and tables inside goes through the streams, in one order."""
        with ExitStack() as stack:
            for stream in self._streams_in_use().values():
                stack.enter_context(stream.writing())
            yield
