"""The plan that the operators hand on, in torch: what `lora_mux.kernels.plan` makes, elsewhere.

Formulas and layout are those of kernels/src/plan.py.
"""

import torch
from torch import Tensor

SLOT_MASK = 0xFFFF
COUNTERS = 64, 4  # of lora_mux.kernels.launch.STREAMS


def strength_of(slots: Tensor, weight: Tensor) -> Tensor:
    """strength [M, J]: a slot's weights in a row, summed, at its first place; 0 elsewhere."""
    same = (slots[:, :, None] == slots[:, None, :]) & (slots >= 0)[:, :, None]  # [M, J, J]
    summed = torch.where(same, weight[:, None, :], 0.0).sum(2)
    return torch.where(same.tril(-1).any(2) | (slots < 0), 0.0, summed)


def shapes(rows: int, places: int, capacity: int, block_m: int) -> tuple[int, int]:
    """(T, U): tiles and one more, and the most slots, of `capacity`, that a union can hold.

    One more tile than there are, so that T is not 1 for few rows and more for others: torch.export
    and dynamic graphs would make that two cases.
    """
    most: int = torch.sym_min(block_m * places, capacity)  # type: ignore[no-untyped-call]
    union: int = torch.sym_max(most, 1)  # type: ignore[no-untyped-call]
    return (rows + block_m - 1) // block_m + 1, union


def plan(
    index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What lora_mux.kernels.launch.plan returns, of index [M, J] and weight [M, J]."""
    M, J = index.shape
    tiles, U = shapes(M, J, capacity, block_m)
    index = index.to(torch.int64)
    slot = index & SLOT_MASK
    alive = (live[slot] == index) & (index >= 0)
    slots = torch.where(alive, slot, -1).to(torch.int32)
    dead = ~alive & (index != -1)
    state = torch.where(dead.any(1), 2, alive.any(1).to(torch.int8)).to(torch.int8)

    of_tile = slots.new_full((tiles * block_m, J), -1)
    of_tile[:M] = slots
    of_tile = of_tile.reshape(tiles, block_m, J)
    ordered = of_tile.reshape(tiles, block_m * J).sort(1).values
    first = ordered >= 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    length = first.sum(1)
    union = slots.new_zeros(tiles, U)
    union[torch.arange(U, device=index.device) < length[:, None]] = ordered[first]
    here = of_tile[:, None] == union[:, :, None, None]  # [T, U, BLOCK_M, J]
    places = torch.arange(J, device=index.device).expand(here.shape)
    place = torch.where(here, places, J).amin(3) if J else union.new_zeros(tiles, U, block_m)
    place = torch.where(place < J, place, -1).to(torch.int16)
    strength = strength_of(slots, weight.to(torch.promote_types(weight.dtype, torch.float32)))
    counters = slots.new_zeros(COUNTERS)
    return slots, strength, union, length.to(torch.int32), place, state, counters
