"""Names, handles and slots: which adapter an index means, now and for ever.

A slot is an adapter's place in the pools of a model, and is used again after a removal. A handle
is what users put into an index tensor, and is never used again: it is the slot with its
generation above it, so that an old index can not reach the slot's new tenant.
"""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import AdapterError, ArgumentTypeError, UnknownAdapterError
from .routing import BASE, NONE

# handle = generation << 16 | slot fits an int32 index: 65,536 slots, 32,768 tenants of each.
SLOT_BITS = 16
SLOTS = 1 << SLOT_BITS
GENERATIONS = 1 << (31 - SLOT_BITS)
CPU = torch.device("cpu")


class Slots:
    """The adapters of one model, or of one stand-alone layer: name -> handle -> slot."""

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}
        self._generation: list[int] = []  # of each slot's present or next tenant
        self._free: list[int] = []
        # Slot -> the handle of its tenant, or -1, on each device that asked for it. Never moved
        # and never grown (256 KB), so that what a CUDA graph reads is always the present state.
        self._live = {CPU: torch.full((SLOTS,), NONE, dtype=torch.int32, device=CPU)}
        self.capacity = 0  # slots that the pools have room for; doubles as adapters come
        self.version = 0  # counts removals: an index that was alive stays so until the next
        self.captured = False  # a CUDA graph reads the pools, which can not grow any more

    @property
    def handles(self) -> dict[str, int]:
        """A new dict name -> handle, in the order of loading."""
        return dict(self._handles)

    def check_new(self, name: object) -> str:
        """`name`, if a new adapter may have it."""
        if not isinstance(name, str):
            raise ArgumentTypeError(f"`name` must be a str, got {type(name).__name__}")
        if not name or name == BASE:
            raise AdapterError(
                f"`name` must be a non-empty str other than {BASE!r} (the base model), got {name!r}"
            )
        if name in self._handles:
            raise AdapterError(
                f"`name` must be new, got {name!r}, which is already loaded; remove it first"
            )
        return name

    def next_slot(self) -> int:
        """The slot that the next adapter will get."""
        if not self._free and len(self._generation) == SLOTS:
            raise AdapterError(f"at most {SLOTS} adapters can be loaded at once")
        return self._free[-1] if self._free else len(self._generation)

    def add(self, name: str) -> int:
        """Give `name` a slot that nobody has; returns its handle."""
        slot = self.next_slot()
        if self._free:
            self._free.pop()
        else:
            self._generation.append(0)
        if slot >= self.capacity:
            self.capacity = max(8, 2 * self.capacity)
        handle = self._generation[slot] << SLOT_BITS | slot
        self._write(slot, handle)
        self._handles[name] = handle
        return handle

    def remove(self, name: str) -> int:
        """Forget `name`; returns the slot that it leaves. Its handle stays dead for ever."""
        handle = self.lookup([name])[name]
        del self._handles[name]
        slot = slot_of(handle)
        self._write(slot, NONE)
        self.version += 1
        self._generation[slot] += 1
        if self._generation[slot] < GENERATIONS:  # a slot without a fresh generation is given up
            self._free.append(slot)
        return slot

    def live(self, device: torch.device) -> Tensor:
        """[65536] int32: the handle of each slot's tenant, or -1; kept up to date in place."""
        if device not in self._live:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self._live[device] = self._live[CPU].to(device)
        return self._live[device]

    def _write(self, slot: int, handle: int) -> None:
        for table in self._live.values():
            table[slot] = handle

    def lookup(self, names: Sequence[str]) -> dict[str, int]:
        """Handles of names; raises UnknownAdapterError that names every unknown one."""
        unknown = sorted({name for name in names if name not in self._handles})
        if unknown:
            close = difflib.get_close_matches(unknown[0], self._handles, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UnknownAdapterError(
                f"unknown adapter {', '.join(map(repr, unknown))}{hint}; "
                f"loaded: {', '.join(map(repr, self._handles)) or 'none'}"
            )
        return {name: self._handles[name] for name in names}

    def names_of(self, handles: Iterable[int]) -> list[str]:
        """Names of the handles that are alive, in the given order, each once."""
        by_handle = {handle: name for name, handle in self._handles.items()}
        return [by_handle[h] for h in dict.fromkeys(handles) if h in by_handle]

    def resolve(self, index: Tensor) -> Tensor:
        """Slots int64 of an index of handles, -1 where it is -1. Reads the values: syncs on a GPU.

        Raises:
            UnknownAdapterError: a handle that was freed, or that was never given out.
        """
        # In numpy, which costs a tenth of torch for the few numbers of an index.
        handles, live = index.cpu().numpy().astype(np.int64), self.live(CPU).numpy()
        slot = handles & (SLOTS - 1)
        none = handles == NONE
        dead = ~(none | ((live[slot] == handles) & (handles >= 0)))
        if dead.any():
            row, place = np.argwhere(dead)[0].tolist()
            handle = int(handles[row, place])
            raise UnknownAdapterError(
                f"`index[{row}, {place}]` must be the handle of a loaded adapter or -1, "
                f"got {handle}, {self._history(handle)}; loaded: {self._handles or 'none'}"
            )
        return torch.from_numpy(np.where(none, NONE, slot)).to(index.device)

    def _history(self, handle: int) -> str:
        slot, generation = slot_of(handle), handle >> SLOT_BITS
        given = (
            0 <= handle and slot < len(self._generation) and generation <= self._generation[slot]
        )
        return "whose adapter was removed" if given else "which was never given out"


def slot_of(handle: int) -> int:
    """The slot in a handle."""
    return handle & (SLOTS - 1)
