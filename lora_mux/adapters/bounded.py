"""Adapters beyond the memory of the device: pools of a fixed size, and the rest on the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ..checkpoints import Block, Stored, kept
from ..core import LoraWeights, Pool, Slots, rank_rows
from ..errors import PoolCapacityError
from ..layers import MuxLinear, check_room, write
from ..routes import Router
from .copies import Lane
from .memory_budget import split
from .placement import Placement, place
from .resident import Adapters, R

T = TypeVar("T")


@dataclass
class Known:
    """A loaded adapter, resident or not."""

    stored: Stored
    rows: Mapping[str, int]  # path -> the rank rows that it takes there
    marks: dict[torch.device, torch.cuda.Event | None] = field(default_factory=dict)


class BoundedAdapters(Adapters):
    """Loading registers an adapter; routing, prefetching or pinning makes it resident.

    The pools have their size from the beginning and never move, so that a CUDA graph may read them.
    When one is full, the adapters that were routed least recently make room, except those that are
    pinned or that a forward pass may still ask for.
    """

    def __init__(
        self, layers: Mapping[str, MuxLinear], slots: Slots, router: Router, memory: int
    ) -> None:
        super().__init__(layers, slots, router)
        self._pools = {path: layer.mux_pool for path, layer in layers.items()}
        rows = split(memory, list(self._pools.values()))
        for pool in self._pools.values():
            pool.fix(rows)
        self._known: dict[int, Known] = {}  # by handle
        self._recent: dict[int, None] = {}  # the resident handles, the one routed last at the end
        self._pinned: set[int] = set()
        self._lanes: dict[torch.device, Lane] = {}

    def add(
        self, name: str, weights: Mapping[str, LoraWeights], source: str, replace: bool = False
    ) -> int:
        """Keep a copy of an adapter on the host."""
        self._checked(weights, source)
        return self.load(name, kept(source, weights, self._by_gpu()), replace)

    def load(self, name: str, stored: Stored, replace: bool = False) -> int:
        """Register an adapter, whose values are read when it becomes resident.

        One that replaces an adapter that is pinned or in force by name becomes resident at once.
        """
        shapes = self._fitting(stored)
        with self._lock:
            self._slots.check_new(name, replace)
            self._reap()
            for path, part in shapes.items():
                check_room(self._slots, self._pools[path], part, f"{stored.source}[{path!r}]")
            handle = self._slots.allot()
            rows = {path: rank_rows(part) for path, part in shapes.items()}
            for path, pool in self._pools.items():  # for a graph to read them wherever it ends up
                pool.reserve(0, self._slots.capacity, rows.get(path, 0))
            self._known[handle] = Known(stored, rows)
        try:
            self._settle(name, handle, replace)
        except BaseException:
            with self._lock:
                self._put_out([handle] if handle in self._recent else [])
                del self._known[handle]
                self._slots.free(handle)
            raise
        return handle

    def _settle(self, name: str, handle: int, replace: bool) -> None:
        """Give a registered adapter its name."""

        def needed() -> list[int]:
            self._slots.check_new(name, replace)
            before = self._slots.get(name)
            kept = before is not None and (before in self._pinned or self._router.follows(before))
            return [handle] if kept else []

        def bind() -> None:
            before = self._slots.get(name)
            if before in self._pinned:
                self._pinned.add(handle)
            self._bind(name, handle)

        self._with_resident(needed, bind)

    def remove(self, name: str) -> None:
        """Forget a name; its handle is dead from now on."""
        with self._lock, self._writing():
            super().remove(name)

    def enter(self, make: Callable[[], R], put: Callable[[R], None], leaving: bool = False) -> R:
        """Make a route, its adapters resident, and put it in force."""
        route: R

        def needed() -> Iterable[int]:
            nonlocal route
            route = make()
            handles = None if route is None else route.handles
            if route is not None and handles:
                if not (handles <= self._known.keys() and handles.isdisjoint(self._gone)):
                    self._slots.check_loaded(route.routing.index)  # which raises
            return handles or ()

        def bind() -> R:
            put(route)
            return route

        return self._with_resident(needed, bind, leaving)

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        wanted = list(names)
        self._with_resident(lambda: self._slots.lookup(wanted).values(), lambda: None)

    def pin(self, name: str, pinned: bool) -> None:
        """Keep an adapter resident, or no longer."""
        if pinned:
            self._with_resident(
                lambda: self._slots.lookup([name]).values(),
                lambda: self._pinned.add(self._slots.lookup([name])[name]),
            )
            return
        with self._lock:
            self._pinned.discard(self._slots.lookup([name])[name])

    def _with_resident(
        self,
        needed: Callable[[], Iterable[int]],
        then: Callable[[], T],
        leaving: bool = False,
    ) -> T:
        """Make adapters resident, and call `then` before any of them can be evicted again.

        Files are read without the lock, and what they are needed for is looked at again after.
        """
        blocks: dict[int, Block] = {}
        while True:
            with self._lock:
                handles = list(needed())
                coming = [handle for handle in handles if handle not in self._recent]
                placement = self._place(coming, handles, leaving) if coming else None
                unread = {h: self._known[h] for h in coming if h not in blocks}
                if not unread:
                    if placement is not None:
                        self._carry_out(placement, blocks)
                    self._use(handles)
                    return then()
            for handle, known in unread.items():
                blocks[handle] = self._read(known.stored)

    def _place(self, coming: list[int], wanted: list[int], leaving: bool) -> Placement:
        self._reap()
        held = self._router.held(leaving)
        # What only a device knows may be any that is resident.
        resident = *self._gone, *self._recent
        idle = [h for h in resident if held is not None and h not in held]
        spared = self._pinned | set(wanted)
        rows = {handle: self._known[handle].rows for handle in (*coming, *idle)}
        return place(self._pools, rows, coming, idle, [h for h in idle if h not in spared])

    def _read(self, stored: Stored) -> Block:
        """An adapter's values, checked."""
        block = stored.read(self._by_gpu())
        for path, part in stored.weights(block).items():
            pool = self._pools[path]
            # Else it is known from reading, or from when it was handed over.
            widest = max(torch.finfo(tensor.dtype).max for tensor in (part.A, part.B))
            if torch.finfo(pool.A_rows.dtype).max < widest or part.bias is not None:
                pool.check_values(part, f"{stored.source}[{path!r}]")
        return block

    def _carry_out(self, placement: Placement, blocks: Mapping[int, Block]) -> None:
        lanes = self._lanes_in_use()
        with self._writing():
            self._put_out(placement.evicted)
            for path, slots in placement.sliding.items():
                for slot in slots:
                    self._pools[path].slide(slot)
        for handle in placement.order:
            known = self._known[handle]
            there = {
                device: known.stored.weights(lane.bring(blocks[handle]))
                for device, lane in lanes.items()
            }
            with self._writing():
                write(self._slots, handle, self._cut(there))
            known.marks = {device: lane.mark() for device, lane in lanes.items()}
            self._recent[handle] = None

    def _cut(
        self, there: Mapping[torch.device, Mapping[str, LoraWeights]]
    ) -> Iterator[tuple[Pool, LoraWeights | None]]:
        """Each pool, and what it is to hold of an adapter that was brought to the devices."""
        for path, layer in self._layers.items():
            weights = there[layer.mux_pool.A_rows.device].get(path)
            if weights is not None and layer.mux_shard is not None:
                weights = layer.mux_shard.cut(weights, path)
            yield layer.mux_pool, weights

    def _put_out(self, handles: Iterable[int]) -> None:
        for handle in handles:
            if handle in self._gone:
                self._free(handle)
                continue
            self._slots.sleep(handle)
            self._erase(handle)
            del self._recent[handle]

    def _use(self, handles: Iterable[int]) -> None:
        """Note that adapters are used now, and let the current stream wait for their arrival."""
        for handle in handles:
            del self._recent[handle]
            self._recent[handle] = None
            for device, mark in self._known[handle].marks.items():
                self._lanes[device].wait(mark)

    def _retire(self, handle: int) -> None:
        self._pinned.discard(handle)
        self._recent.pop(handle, None)
        super()._retire(handle)

    def _free(self, handle: int) -> None:
        with self._writing():
            super()._free(handle)
        del self._known[handle]

    def _is_resident(self, handle: int) -> bool:
        return handle in self._recent

    def _is_pinned(self, handle: int) -> bool:
        return handle in self._pinned

    def _reserved(self, rank_rows: int) -> int:
        return 0  # the rank rows are there from the beginning

    def _fitting(self, stored: Stored) -> dict[str, LoraWeights]:
        fitting = super()._fitting(stored)
        for path, part in fitting.items():
            capacity = self._pools[path].runs.capacity
            if rank_rows(part) > capacity:
                raise PoolCapacityError(
                    f"`{stored.source}[{path!r}]` must fit into the pool of {capacity} rank rows, "
                    f"got {rank_rows(part)}; attach with more memory"
                )
        return fitting

    def _devices(self) -> set[torch.device]:
        return {pool.A_rows.device for pool in self._pools.values()}

    def _by_gpu(self) -> bool:
        return any(device.type == "cuda" for device in self._devices())

    def _lanes_in_use(self) -> dict[torch.device, Lane]:
        for device in self._devices() - self._lanes.keys():
            self._lanes[device] = Lane(device)
        return {device: self._lanes[device] for device in self._devices()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, what is written to pools and tables goes by the lanes, in one order for all."""
        with ExitStack() as stack:
            for lane in self._lanes_in_use().values():
                stack.enter_context(lane.writing())
            yield
