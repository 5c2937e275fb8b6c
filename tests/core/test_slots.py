"""Slots and handles at their limits."""

import itertools

import pytest
import torch
from interrupts import interrupted

from lora_mux.core.slots import GENERATIONS, SLOT_BITS, SLOTS, Slots
from lora_mux.errors import AdapterError, UnknownAdapterError


def test_all_slots_are_taken() -> None:
    """All but two had their last tenant, and one of these has its last one now."""
    slots = Slots([GENERATIONS] * (SLOTS - 2) + [GENERATIONS - 1])
    last, first = slots.allot(), slots.allot()
    assert last == (GENERATIONS - 1) << SLOT_BITS | SLOTS - 2 and last < 2**31
    assert first == SLOTS - 1
    with pytest.raises(AdapterError, match="at most 65536 adapters"):
        slots.allot()
    slots.free(last)
    with pytest.raises(AdapterError, match="remove one first"):
        slots.allot()
    slots.free(first)
    assert slots.allot() == 1 << SLOT_BITS | SLOTS - 1


def test_a_handle_that_an_interrupt_leaves_without_a_name_dies() -> None:
    """The pools are about to lose its rank rows, which a stale index must not reach."""
    was_live = 0
    for line in itertools.count():
        slots = Slots()
        kept = slots.allot()
        slots.make_live(kept)
        slots.bind("kept", kept)

        def load(slots: Slots = slots) -> None:
            handle = slots.allot()
            slots.make_live(handle)
            slots.bind("new", handle)

        ended = not interrupted(load, line)
        was_live += slots.is_live(1) and not slots.names_of([1])
        slots.mend()
        # A name that the handle lost, as of an adapter that was replaced, keeps it alive.
        assert slots.is_live(1) == bool(slots.names_of([1]))
        for handle in slots.tenants - {*slots.handles.values()}:
            slots.free(handle)
        assert slots.is_live(1) == ("new" in slots.handles)
        assert slots.resolve(torch.tensor([[kept, -1]])).tolist() == [[0, -1]]
        if not slots.is_live(1):
            with pytest.raises(UnknownAdapterError):
                slots.resolve(torch.tensor([[1]]))
        if ended:
            break
    assert was_live and slots.handles == {"kept": 0, "new": 1}
