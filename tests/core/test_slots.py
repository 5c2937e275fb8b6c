"""Slots and handles at their limits."""

import pytest

from lora_mux.core.slots import GENERATIONS, SLOT_BITS, SLOTS, Slots
from lora_mux.errors import AdapterError


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
