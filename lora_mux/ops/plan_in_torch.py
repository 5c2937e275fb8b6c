"""The plan in torch, for operators where no kernel runs.

Formulas and layout are those of kernels/src/plan.py.
"""

import torch
from torch import Tensor

from ..kernels import tensors
from ..kernels.tensors import Plan


def strength_of(slots: Tensor, weight: Tensor) -> Tensor:
    """strength [M, J]: a slot's weights in a row, summed, at its first place; 0 elsewhere."""
    same = (slots[:, :, None] == slots[:, None, :]) & (slots >= 0)[:, :, None]  # [M, J, J]
    summed = torch.where(same, weight[:, None, :], 0.0).sum(2)
    return torch.where(same.tril(-1).any(2) | (slots < 0), 0.0, summed)


def plan(index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int) -> Plan:
    """The Plan of index and weight [M, J]; the arguments are those of kernels' launch.plan."""
    M, J = index.shape
    tiles, U = tensors.tiles_and_union(M, J, capacity, block_m)
    index = index.to(torch.int64)
    slot = index & tensors.SLOT_MASK
    alive = (live[slot] == index) & (index >= 0)
    slots = torch.where(alive, slot, -1).to(torch.int32)
    dead = ~alive & (index != -1)
    state = torch.where(alive.any(1), tensors.SELECTS, tensors.BASE)
    state = torch.where(dead.any(1), tensors.DEAD, state)

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
    return Plan(
        slots=slots,
        strength=strength_of(slots, weight.to(torch.promote_types(weight.dtype, torch.float32))),
        union=union,
        length=length.to(torch.int32),
        place=torch.where(place < J, place, -1).to(torch.int16),
        state=state.to(torch.int8),
        counters=slots.new_zeros(tensors.STREAMS, tensors.COUNTERS),
    )
