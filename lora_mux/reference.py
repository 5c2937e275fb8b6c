"""The definition of correctness: the formula as einsums over the rank rows in use.

    y[m] += sum_j weight[m, j] * scaling[slot[m, j]] * B[slot[m, j]] (A[slot[m, j]] x[m])

Differentiable in x, y, weight and the pool; any floating dtype; accumulates in at least fp32 and
rounds once. Weights are read once per distinct adapter of the batch, never copied per row. It
shares nothing with the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .pool import Pool


class Plan(NamedTuple):
    """What all layers of one forward pass share."""

    slots: Tensor  # [U] the distinct slots that the rows select
    selects: Tensor  # [M, U] bool: row m selects slot u
    strength: Tensor  # [M, U] the sum of row m's weights for slot u


def plan(slots: Tensor, weight: Tensor) -> Plan:
    """The distinct slots of `slots` [M, J] (-1 = none), and each row's strength [M, J] of them."""
    used = torch.unique(slots[slots >= 0])
    places = slots[:, :, None] == used  # [M, J, U]
    # Selected, not multiplied: the weight of a place that selects nothing may be anything.
    strength = torch.where(places, weight[:, :, None], 0.0).sum(1)
    return Plan(used, places.any(1), strength)


def add_lora(y: Tensor, x: Tensor, pool: Pool, plan: Plan) -> Tensor:
    """y [M, N] plus what x [M, K] gets from its adapters; rows that select none keep every bit."""
    ranks = pool.rank[plan.slots]
    if not bool(ranks.any()):
        return y
    owner = torch.arange(len(ranks), device=x.device).repeat_interleave(ranks)  # [R] in 0..U
    first = ranks.cumsum(0) - ranks
    rows = pool.offset[plan.slots][owner] + torch.arange(len(owner), device=x.device) - first[owner]

    dtype = torch.promote_types(x.dtype, torch.float32)
    A, B = pool.A_rows[rows].to(dtype), pool.B_rows[rows].to(dtype)
    selects = plan.selects[:, owner]  # [M, R]
    strength = (plan.strength.to(dtype) * pool.scaling[plan.slots].to(dtype))[:, owner]  # [M, R]

    h = torch.einsum("mk,rk->mr", x.to(dtype), A)
    h = torch.where(pool.constant[rows], 1.0, h)
    h = torch.where(selects, strength * h, 0.0)
    delta = torch.einsum("mr,rn->mn", h, B)
    return torch.where(selects.any(1, keepdim=True), (y.to(dtype) + delta).to(y.dtype), y)
