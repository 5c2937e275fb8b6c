"""Names, handles and slots: which adapter an index means, now and for ever.

A slot is an adapter's place in the pools of a model, and is used again after a removal. A handle
is what users put into an index tensor, and is never used again: it is the slot with its
generation above it, so that an old index can not reach the slot's new tenant. A handle is awake
while the adapter's rank rows are in the pools: an adapter that has to make room for others goes
to sleep, and keeps its slot and its handle.
"""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AdapterError, ArgumentTypeError, UnknownAdapterError
from .routing import BASE, NONE

# handle = generation << 16 | slot fits an int32 index: 65,536 slots, 32,768 tenants of each.
SLOT_BITS = 16
SLOTS = 1 << SLOT_BITS
GENERATIONS = 1 << (31 - SLOT_BITS)
CPU = torch.device("cpu")
SHOWN = 20  # names in an error message


class Slots:
    """The adapters of one model, or of one stand-alone layer: name -> handle -> slot.

    Other threads may read while one changes it; changes are serialised by whoever makes them.
    """

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}
        self._names: dict[int, str] = {}  # of what is loaded, and of what was replaced and is awake
        self._generation: list[int] = []  # of each slot's present or next tenant
        self._free: list[int] = []
        # Slot -> the handle of its tenant, or -1: of those that are loaded, and of those that are
        # awake on each device that asked for it. Never moved and never grown (256 KB each), so
        # that what a CUDA graph reads is always the present state.
        self._loaded = _nobody().numpy()
        self._live = {CPU: _nobody()}
        self.capacity = 0  # slots that the pools have room for; doubles as adapters come
        self.version = 0  # counts what went to sleep: an index that was awake stays so until then
        self.edition = 0  # counts names that were removed or mean another adapter
        self.captured = False  # a CUDA graph reads the pools, which can not grow any more

    @property
    def handles(self) -> dict[str, int]:
        """A new dict name -> handle, in the order of loading."""
        return dict(self._handles)

    def get(self, name: str) -> int | None:
        """The handle of a name, or None."""
        return self._handles.get(name)

    def check_new(self, name: object, replace: bool = False) -> str:
        """`name`, if a new adapter may have it.

        Args:
            replace: it may have the name of one that is loaded.
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
            raise AdapterError(f"at most {SLOTS} adapters can be loaded at once")
        return self._free[-1] if self._free else len(self._generation)

    def allot(self) -> int:
        """A new handle, on a slot that nobody has; asleep, and without a name."""
        slot = self.next_slot()
        if self._free:
            self._free.pop()
        else:
            self._generation.append(0)
        if slot >= self.capacity:
            self.capacity = max(8, 2 * self.capacity)
        return self._generation[slot] << SLOT_BITS | slot

    def wake(self, handle: int) -> None:
        """From now on the handle means the rank rows of its slot."""
        self._write(slot_of(handle), handle)

    def sleep(self, handle: int) -> None:
        """From now on the handle means nothing: its rank rows may go."""
        self._write(slot_of(handle), NONE)
        self.version += 1

    def is_awake(self, handle: int) -> bool:
        return bool(self._live[CPU][slot_of(handle)] == handle)

    def bind(self, name: str, handle: int) -> int | None:
        """Let the name mean the handle; returns the one that it meant before, if any."""
        before = self._handles.get(name)
        self._names[handle] = name
        self._loaded[slot_of(handle)] = handle
        self._handles[name] = handle
        if before is not None:
            self._loaded[slot_of(before)] = NONE
            self.edition += 1
        return before

    def unbind(self, name: str) -> int:
        """Forget `name`; returns its handle, which is dead for ever but keeps its slot."""
        handle = self.lookup([name])[name]
        del self._handles[name], self._names[handle]
        self._loaded[slot_of(handle)] = NONE
        self.edition += 1
        self.sleep(handle)
        return handle

    def free(self, handle: int) -> None:
        """Give the slot of a handle without a name to whoever comes next."""
        slot = slot_of(handle)
        self._names.pop(handle, None)
        if self.is_awake(handle):
            self.sleep(handle)
        self._generation[slot] += 1
        if self._generation[slot] < GENERATIONS:  # a slot without a fresh generation is given up
            self._free.append(slot)

    def live(self, device: torch.device) -> Tensor:
        """[65536] int32: the handle of each slot's tenant, or -1; kept up to date in place."""
        if device not in self._live:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self._live[device] = self._live[CPU].to(device)
            # Again, for a thread that wrote meanwhile did not see this table.
            self._live[device].copy_(self._live[CPU])
        return self._live[device]

    def _write(self, slot: int, handle: int) -> None:
        self._live[CPU][slot] = handle  # the first, for it is what a new table is made of
        for device, table in list(self._live.items()):
            if device != CPU:
                table[slot] = handle

    def lookup(self, names: Sequence[str]) -> dict[str, int]:
        """Handles of names; raises UnknownAdapterError that names every unknown one."""
        found = {name: self._handles.get(name) for name in names}
        unknown = sorted(name for name, handle in found.items() if handle is None)
        if unknown:
            loaded = list(self._handles)
            close = difflib.get_close_matches(unknown[0], loaded, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UnknownAdapterError(
                f"unknown adapter {', '.join(map(repr, unknown))}{hint}; "
                f"loaded: {_shown(map(repr, loaded))}"
            )
        return {name: handle for name, handle in found.items() if handle is not None}

    def names_of(self, handles: Iterable[int]) -> list[str]:
        """Names of the handles that are alive, in the given order, each once."""
        return [self._names[h] for h in dict.fromkeys(handles) if h in self._names]

    def check_loaded(self, index: Tensor) -> None:
        """Refuse an index of handles that does not name loaded adapters, be they asleep.

        Raises:
            UnknownAdapterError: a handle that was freed, or that was never given out.
        """
        self._slots_of(index, self._loaded)

    def resolve(self, index: Tensor) -> Tensor:
        """Slots int64 of an index of handles, -1 where it is -1. Reads the values: syncs on a GPU.

        Raises:
            UnknownAdapterError: a handle that is asleep, was freed, or was never given out.
        """
        return self._slots_of(index, self._live[CPU].numpy())

    def _slots_of(self, index: Tensor, tenant: NDArray[np.int32]) -> Tensor:
        # In numpy, which costs a tenth of torch for the few numbers of an index.
        handles = index.cpu().numpy().astype(np.int64)
        slot = handles & (SLOTS - 1)
        none = handles == NONE
        dead = ~(none | ((tenant[slot] == handles) & (handles >= 0)))
        if dead.any():
            row, place = np.argwhere(dead)[0].tolist()
            handle = int(handles[row, place])
            loaded = (f"{name!r}: {handle}" for name, handle in self.handles.items())
            raise UnknownAdapterError(
                f"`index[{row}, {place}]` must be the handle of a loaded adapter or -1, "
                f"got {handle}, {self._history(handle)}; loaded: {_shown(loaded)}"
            )
        return torch.from_numpy(np.where(none, NONE, slot)).to(index.device)

    def _history(self, handle: int) -> str:
        slot, generation = slot_of(handle), handle >> SLOT_BITS
        if handle >= 0 and self._loaded[slot] == handle:
            return "whose adapter made room for others; name it in a route, prefetch or pin it"
        given = (
            0 <= handle and slot < len(self._generation) and generation <= self._generation[slot]
        )
        return "whose adapter was removed or replaced" if given else "which was never given out"


def _nobody() -> Tensor:
    return torch.full((SLOTS,), NONE, dtype=torch.int32, device=CPU)


def _shown(adapters: Iterable[str]) -> str:
    """A list for an error message, which is not to hold thousands."""
    listed = list(adapters)
    more = f", ... ({len(listed)} in all)" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more or "none"


def slot_of(handle: int) -> int:
    """The slot in a handle."""
    return handle & (SLOTS - 1)
