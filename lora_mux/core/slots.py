"""Slots and handles: which adapter an index means, now and for ever.

A slot is an adapter's place in the pools of a model. It is used again after a removal. A handle is
what users put into an index tensor. It is never used again: it holds the slot and, above it, the
slot's generation, so that an old index cannot reach the slot's next tenant. A handle is live while
the rank rows of its adapter are in the pools. An adapter that makes room for others keeps its slot
and its handle, and its handle is live again when the adapter comes back.
"""

import difflib
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AdapterError, ArgumentTypeError, UnknownAdapterError
from .routing import BASE, NONE, Routing
from .selections import Companion, Companions
from .streams import has_streams, to_device
from .weights import dropout_of_rows

# handle = generation << 16 | slot fits an int32 index: 65,536 slots with 32,768 tenants each.
SLOT_BITS = 16
SLOTS = 1 << SLOT_BITS
GENERATIONS = 1 << (31 - SLOT_BITS)
FIRST_CAPACITY = 8
MAX_NAMES_IN_ERROR = 20
MAX_NAMES_TO_COMPARE = 200  # with an unknown one, which takes difflib 20 ms
MAX_LENGTH_TO_COMPARE = 80
CPU = torch.device("cpu")


class Slots:
    """The adapters of one model, or of one stand-alone layer: name -> handle -> slot.

    Other threads may read while one thread changes it. Its owner lets one thread change it at a
    time, and calls `mend` after a change that was interrupted.
    """

    def __init__(self, generations: Sequence[int] = ()) -> None:
        # What was given out, and what it is called. All else follows from these; see `mend`.
        self._tenants: dict[int, int] = {}  # slot -> its handle
        self._handles: dict[str, int] = {}
        # Of each slot's present tenant, else of its next one.
        self._generation = list(generations)
        # Of loaded adapters, and of replaced and removed ones that are still live.
        self._names: dict[int, str] = {}
        # Live handles whose name was removed: they mean something to routes of promised adapters.
        self._removed: set[int] = set()
        self.companions = Companions()
        self._free = [s for s, g in reversed([*enumerate(generations)]) if g < GENERATIONS]
        # Slot -> the handle of its tenant, or -1: once for all loaded adapters, and for the live
        # ones once for each device that asked. These tables never move and never grow (256 KB
        # each), so that a CUDA graph always reads the present state.
        self._loaded = _no_tenants().numpy()
        self._live = {CPU: _no_tenants()}
        self.capacity = 0  # slots that the pools have room for; doubles as adapters come
        # How often a live handle was suspended. While this stands still, an index of live handles
        # stays one.
        self.suspensions = 0
        self.name_changes = 0  # how often a name was removed, or given to another adapter
        self.trained: tuple[int, ...] = ()  # those whose parameters autograd may follow, in order
        self.dropout: dict[int, float] = {}  # see dropout_of_rows
        self.captured = False  # a CUDA graph reads the pools, which then cannot grow any more

    def __getstate__(self) -> dict[str, Any]:
        # No graph reads the pools of a copy, and it trains nothing.
        return {**vars(self), "captured": False, "trained": (), "dropout": {}}

    @property
    def next_generations(self) -> list[int]:
        """What the slots of other adapters on the same model begin with, after these."""
        tenants = self._tenants
        return [g + 1 if slot in tenants else g for slot, g in enumerate(self._generation)]

    @property
    def handles(self) -> dict[str, int]:
        """A new dict name -> handle, in the order of loading."""
        return dict(self._handles)

    @property
    def tenants(self) -> set[int]:
        """The handles that have a slot, with a name or without."""
        return set(self._tenants.values())

    def get(self, name: str) -> int | None:
        """The handle of a name, or None."""
        return self._handles.get(name)

    def check_new(self, name: object, replace: bool = False) -> str:
        """`name`, if a new adapter may have it.

        Args:
            replace: a loaded adapter may have the name already.
        """
        if not isinstance(name, str):
            raise ArgumentTypeError(f"`name` must be a str, got {type(name).__name__}")
        if not name or name == BASE:
            raise AdapterError(
                f"`name` must be a non-empty str other than {BASE!r} (the base model), got {name!r}"
            )
        if name in self._handles and not replace:
            raise AdapterError(
                f"`name` must be new, got {name!r}, which is already loaded; remove it first"
            )
        return name

    def next_slot(self) -> int:
        """The slot that the next adapter will get."""
        if not self._free and len(self._generation) == SLOTS:
            raise AdapterError(f"at most {SLOTS} adapters can be loaded at once; remove one first")
        return self._free[-1] if self._free else len(self._generation)

    def allot(self) -> int:
        """A new handle on a free slot. It is not live yet, and has no name."""
        slot = self.next_slot()
        if self._free:
            self._free.pop()
        else:
            self._generation.append(0)
        if slot >= self.capacity:
            self.capacity = max(FIRST_CAPACITY, 2 * self.capacity)
        handle = self._generation[slot] << SLOT_BITS | slot
        self._tenants[slot] = handle
        return handle

    def make_live(self, handle: int) -> None:
        """From now on the handle means the rank rows of its slot."""
        self._write(slot_of(handle), handle)

    def suspend(self, handle: int) -> None:
        """From now on the handle means nothing, so that its rank rows may go."""
        self._write(slot_of(handle), NONE)
        self.suspensions += 1

    def is_live(self, handle: int) -> bool:
        """Whether the handle means rank rows that are in the pools."""
        return bool(self._live[CPU][slot_of(handle)] == handle)

    def bind(self, name: str, handle: int) -> int | None:
        """Let the name mean the handle; returns the handle that it meant before, if any."""
        before = self._handles.get(name)
        self._names[handle] = name
        self._loaded[slot_of(handle)] = handle
        self._handles[name] = handle
        if before is not None and before != handle:
            self._loaded[slot_of(before)] = NONE
            self.name_changes += 1
        return before

    def unbind(self, name: str, promised: bool = False) -> int:
        """Forget `name`; returns its handle, which is dead for ever but still has its slot.

        Args:
            promised: the handle goes on to mean its rank rows, to those it was promised to.
        """
        handle = self.lookup([name])[name]
        if promised:
            self._removed.add(handle)
        else:
            del self._names[handle]  # first: a handle with this name is live, see `mend`
        del self._handles[name]
        self._loaded[slot_of(handle)] = NONE
        self.name_changes += 1
        if promised:
            self.suspensions += 1  # who has found out what it means finds out again
        else:
            self.suspend(handle)
        return handle

    def accompany(self, handle: int, companion: Companion) -> None:
        """Let rows that will select a handle get a companion with it, while it has its slot."""
        self.companions.add(handle, companion)
        self._loaded[slot_of(companion.handle)] = companion.handle

    def with_companions(self, routing: Routing, argument: str) -> Routing:
        """A routing whose rows have the companions of what they select; see `Companions.joined`."""
        return self.companions.joined(routing, argument, self._names)

    def free(self, handle: int) -> int | None:
        """Free the slot of a handle that has no name, for the next adapter.

        Returns:
            The handle of its companion, if nobody else has that. It is dead from now on.
        """
        slot = slot_of(handle)
        self._names.pop(handle, None)
        self._removed.discard(handle)
        if self.is_live(handle):
            self.suspend(handle)
        self._generation[slot] = (handle >> SLOT_BITS) + 1
        del self._tenants[slot]
        if self._generation[slot] < GENERATIONS:  # a slot is retired after its last generation
            self._free.append(slot)
        companion = self.companions.forget(handle)
        if companion is not None:
            self._loaded[slot_of(companion)] = NONE
            self.suspend(companion)
        return companion

    def successor(self, handle: int) -> int:
        """The handle that a replaced adapter's name means now; any other handle itself."""
        name = self._names.get(handle)
        return handle if name is None else self._handles.get(name, handle)

    @property
    def trains(self) -> bool:
        """Whether passes that begin now may train an adapter, or drop something of its x."""
        return bool(self.trained) and (torch.is_grad_enabled() or bool(self.dropout))

    def dropout_of_rows(self, slots: Tensor) -> Tensor:
        """How large a share of each row of x is dropped, [M, 1], for slots [M, J]."""
        return dropout_of_rows(self.dropout, slots)

    def trained_among(self, used: Collection[int] | None) -> tuple[int, ...]:
        """The slots of trained adapters that a batch may select; None = only the device knows."""
        return self.trained if used is None else tuple(s for s in self.trained if s in used)

    def mend(self) -> None:
        """Put in order what a change has left that an interrupt has ended, at whatever line.

        Tenants and names are what is true: each changes in one step, a tenant's generation before
        it. A tenant without a name was not loaded to its end, or was removed or replaced.
        """
        named = {handle: name for name, handle in self._handles.items()}
        tenants = self.tenants
        replaced = {h: n for h, n in self._names.items() if h in tenants}
        self._names = replaced | named
        self._removed = self._removed & replaced.keys() - named.keys()
        self.companions.mend(tenants)
        companions = self.companions.handles
        ends = range(len(self._generation) - 1, -1, -1)
        self._free = [
            s for s in ends if s not in self._tenants and self._generation[s] < GENERATIONS
        ]
        loaded = np.full_like(self._loaded, NONE)
        for handle in named.keys() | companions:
            loaded[slot_of(handle)] = handle
        differs = loaded != self._loaded  # other threads read the rest meanwhile
        self._loaded[differs] = loaded[differs]
        live = self._live[CPU].numpy()
        for handle in live[live != NONE].tolist():
            if handle not in self._names and handle not in companions:
                self.suspend(handle)
        for device in self._live.keys() - {CPU}:
            self._live[device].copy_(to_device([self._live[CPU]], device)[0])
        # What was kept under these may be wrong.
        self.suspensions += 1
        self.name_changes += 1

    def live(self, device: torch.device) -> Tensor:
        """int32 [65536]: the live handle of each slot, or -1. Later changes are made in place."""
        if device not in self._live:
            with torch.inference_mode(False):  # else it could not be written outside of that mode
                (self._live[device],) = to_device([self._live[CPU]], device)
            # Once more: a thread that wrote in the meantime did not see this table.
            self._live[device].copy_(to_device([self._live[CPU]], device)[0])
            if has_streams(device):  # once, so that any stream may read it from now on
                torch.cuda.current_stream(device).synchronize()
        return self._live[device]

    def _write(self, slot: int, handle: int) -> None:
        self._live[CPU].data[slot] = handle  # first, because new tables are copied from this one
        for device, table in list(self._live.items()):
            if device != CPU:
                table.data[slot].fill_(handle)

    def lookup(self, names: Sequence[str]) -> dict[str, int]:
        """Name -> handle.

        Raises:
            ArgumentTypeError: a name is no str.
            UnknownAdapterError: lists every name that is not loaded.
        """
        for name in names:
            if not isinstance(name, str):
                raise ArgumentTypeError(
                    f"`name` must be the name of one adapter, a str, got {type(name).__name__}; "
                    "name each of several in a call of its own"
                )
        found = {name: h for name in names if (h := self._handles.get(name)) is not None}
        if unknown := sorted({*names} - found.keys()):
            close = _closest(unknown[0], self._handles)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UnknownAdapterError(
                f"unknown adapter {_listed(map(repr, unknown), len(unknown))}{hint}; "
                f"loaded: {_listed(map(repr, self.handles), len(self._handles))}"
            )
        return found

    def names_of(self, handles: Iterable[int]) -> list[str]:
        """The names that handles have, in the given order, each once."""
        return [self._names[h] for h in dict.fromkeys(handles) if h in self._names]

    def check_loaded(self, index: Tensor) -> None:
        """Refuse an index with a handle that no loaded adapter has. It need not be live.

        Raises:
            UnknownAdapterError: a handle was freed, or was never given out.
        """
        self._slots_of(index, self._loaded)

    def resolve(self, index: Tensor, promised: bool = False) -> Tensor:
        """Slots int64 of an index of handles, -1 where it is -1. Reads the values: syncs on a GPU.

        Args:
            promised: the index is that of requests, to whom removed adapters may be promised.

        Raises:
            UnknownAdapterError: a handle is not live, was freed, or was never given out.
        """
        live = self._live[CPU].numpy()
        if self._removed and not promised:
            live = live.copy()
            live[[slot_of(handle) for handle in self._removed]] = NONE
        return self._slots_of(index, live)

    def may_be_routed(self, handle: int) -> bool:
        """Whether the handle means rank rows to everybody, not only to those it is promised to."""
        return self.is_live(handle) and handle not in self._removed

    def _slots_of(self, index: Tensor, tenants: NDArray[np.int32]) -> Tensor:
        # In numpy, which takes a tenth of torch's time for the few numbers of an index.
        handles = index.cpu().numpy().astype(np.int64)
        slot = handles & (SLOTS - 1)
        none = handles == NONE
        dead = ~(none | ((tenants[slot] == handles) & (handles >= 0)))
        if dead.any():
            row, place = np.argwhere(dead)[0].tolist()
            handle = int(handles[row, place])
            loaded = (f"{name!r}: {handle}" for name, handle in self.handles.items())
            raise UnknownAdapterError(
                f"`index[{row}, {place}]` must be the handle of a loaded adapter or -1, "
                f"got {handle}, {self._history(handle)}; "
                f"loaded: {_listed(loaded, len(self._handles))}"
            )
        return torch.from_numpy(np.where(none, NONE, slot)).to(index.device)

    def _history(self, handle: int) -> str:
        slot, generation = slot_of(handle), handle >> SLOT_BITS
        if handle >= 0 and self._loaded[slot] == handle:
            return "whose adapter made room for others; name it in a route, prefetch it or pin it"
        given = (
            0 <= handle and slot < len(self._generation) and generation <= self._generation[slot]
        )
        return "whose adapter was removed or replaced" if given else "which was never given out"


def _no_tenants() -> Tensor:
    return torch.full((SLOTS,), NONE, dtype=torch.int32, device=CPU)


def _listed(adapters: Iterable[str], count: int) -> str:
    """A list of `count` adapters for an error message, cut short: it never holds thousands."""
    listed = list(itertools.islice(adapters, MAX_NAMES_IN_ERROR))
    more = f", ... ({count} in all)" if count > len(listed) else ""
    return ", ".join(listed) + more or "none"


def _closest(name: str, names: Collection[str]) -> list[str]:
    """The name most like another, if one is. Of many, those count that differ in one quarter only.

    Of 50,000 names difflib finds the closest in 3.4 s; this takes 0.1 s.
    """
    if len(name) > MAX_LENGTH_TO_COMPARE:
        return []
    alike = (other for other in list(names) if len(other) <= MAX_LENGTH_TO_COMPARE)
    if len(names) > MAX_NAMES_TO_COMPARE:
        size = len(name) // 4 + 1
        around = [(name[:i], name[i + size :]) for i in range(0, len(name), size)]
        alike = (
            other
            for other in alike
            if any(other.startswith(start) and other.endswith(end) for start, end in around)
        )
    return difflib.get_close_matches(name, itertools.islice(alike, MAX_NAMES_TO_COMPARE), n=1)


def slot_of(handle: int) -> int:
    """The slot in a handle."""
    return handle & (SLOTS - 1)
