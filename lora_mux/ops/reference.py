"""The definition of correctness: the formula as einsums over the rank rows in use.

    y[m] += sum_j weight[m, j] * scaling[slot[m, j]] * B[slot[m, j]] (A[slot[m, j]] x[m])

A row of ints [1] is the number k of a one-hot x, so that A x is column k of A (embeddings).

Differentiable in x, y, weight and the pool; any floating dtype; accumulates in at least fp32, under
autocast too, and rounds once. Weights are read once per distinct adapter of the batch, never copied
per row. It shares nothing with the kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import AnyPool, RankRows


class Plan(NamedTuple):
    """What all layers of one forward pass share."""

    slots: Tensor  # [U] the distinct slots that the rows select
    selects: Tensor  # [M, U] bool: row m selects slot u
    strength: Tensor  # [M, U] the sum of row m's weights for slot u

    def with_strength(self, strength: Tensor) -> "Plan":
        """The plan with another tensor of equal values there."""
        return self._replace(strength=strength)

    @property
    def selecting(self) -> Tensor:
        """[M, 1] bool: the rows that select an adapter."""
        return self.selects.any(1, keepdim=True)

    def touches(self, pool: AnyPool) -> bool:
        """True: which slots there are is not looked at on the host."""
        return True

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K], a new tensor even where y is owned."""
        y_rows, x_rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return add_lora(y_rows, x_rows, pool.rows, self).reshape(y.shape)


def plan(slots: Tensor, weight: Tensor) -> Plan:
    """The distinct slots of `slots` [M, J] (-1 = none), and each row's strength [M, J] of them."""
    used = torch.unique(slots[slots >= 0])
    places = slots[:, :, None] == used  # [M, J, U]
    # Selected, not multiplied: the weight of a place that selects nothing may be anything.
    strength = torch.where(places, weight[:, :, None], 0.0).sum(1)
    return Plan(used, places.any(1), strength)


def add_lora(y: Tensor, x: Tensor, rows: RankRows, plan: Plan) -> Tensor:
    """y [M, N] plus what x [M, K], or ints [M, 1], gets; rows that select none keep every bit."""
    if torch.is_autocast_enabled(y.device.type):
        with torch.autocast(y.device.type, enabled=False):
            return add_lora(y, x, rows, plan)
    row, owner = _rows_in_use(rows, plan.slots)
    if not len(row):
        return y
    dtype = wide(x, rows)
    B = rows.B_rows[row, : y.shape[1]].to(dtype)
    selects = plan.selects[:, owner]  # [M, R]
    strength = (plan.strength.to(dtype) * rows.scaling[plan.slots].to(dtype))[:, owner]  # [M, R]

    h = _shrunk(x, rows, row, dtype)
    if rows.constant is not None:
        h = torch.where(rows.constant[row], 1.0, h)
    h = torch.where(selects, strength * h, 0.0)
    delta = torch.einsum("mr,rn->mn", h, B)
    return torch.where(selects.any(1, keepdim=True), (y.to(dtype) + delta).to(y.dtype), y)


def strength_gradient(grad: Tensor, x: Tensor, rows: RankRows, slots: Tensor) -> Tensor:
    """scaling[i] * <B[i]^T grad[m], A[i] x[m]> for i = slots[m, j]: the gradient of strength[m, j].

    [M, J] for grad [M, N], x [M, K] or ints [M, 1], and slots [M, J]; 0 where slots is -1.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return strength_gradient(grad, x, rows, slots)
    used, place = torch.unique(slots, return_inverse=True)  # place [M, J] -> 0..U
    row, owner = _rows_in_use(rows, used.clamp(min=0))
    dtype = wide(x, rows)
    h = _shrunk(x, rows, row, dtype)
    if rows.constant is not None:
        h = torch.where(rows.constant[row], 1.0, h)
    g = torch.einsum("mn,rn->mr", grad.to(dtype), rows.B_rows[row, : grad.shape[1]].to(dtype))
    of_slot = h.new_zeros(len(h), len(used)).index_add(1, owner, h * g)
    of_slot = of_slot * rows.scaling[used.clamp(min=0)].to(dtype)
    return torch.where(slots >= 0, of_slot.gather(1, place), 0.0)


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    rows: RankRows,
    slots: Tensor,
    strength: Tensor,
    trained: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """The gradients of the rank rows of trained adapters i, one after the other.

        dA[i] = sum_m gain[m] * (B[i]^T grad[m]) x[m]^T
        dB[i] = sum_m gain[m] * grad[m] (A[i] x[m])^T

    with gain[m] = sum_j strength[m, j] * scaling[i] over the j with slots[m, j] = i. Only rows that
    select an adapter are read for it: others may hold NaN. A bias is a rank row whose A x is 1, and
    whose part of dA is 0.

    Args:
        grad: [M, N].
        x: [M, K].
        rows: of the pool.
        slots: [M, J], -1 = none.
        strength: [M, J].
        trained: (slot, rank rows) of each.

    Returns:
        dA [R, K] and dB [R, N], the latter transposed; zeros for an adapter that no row selects.
    """
    dtype = wide(x, rows)
    of_A, of_B = (
        [x.new_zeros(0, x.shape[1], dtype=dtype)],
        [x.new_zeros(0, grad.shape[1], dtype=dtype)],
    )
    for slot, rank in trained:
        at = (slots == slot).any(1)
        mine = torch.where(slots[at] == slot, strength[at].to(dtype), 0.0).sum(1, keepdim=True)
        gain = mine * rows.scaling[slot].to(dtype)
        held = slice(int(rows.offset[slot]), int(rows.offset[slot]) + rank)
        A, B = rows.A_rows[held, : x.shape[1]], rows.B_rows[held, : grad.shape[1]]
        x_rows, dy = x[at].to(dtype), grad[at].to(dtype)
        h, of_h = x_rows @ A.to(dtype).T, gain * (dy @ B.to(dtype).T)
        if rows.constant is not None:
            biases = rows.constant[held]
            h, of_h = torch.where(biases, 1.0, h), torch.where(biases, 0.0, of_h)
        of_A.append(of_h.T @ x_rows)
        of_B.append((gain * h).T @ dy)
    return torch.cat(of_A), torch.cat(of_B)


def wide(x: Tensor, rows: RankRows) -> torch.dtype:
    """In which everything is computed."""
    given = x if x.is_floating_point() else rows.A_rows
    return torch.promote_types(given.dtype, torch.float32)


def _shrunk(x: Tensor, rows: RankRows, row: Tensor, dtype: torch.dtype) -> Tensor:
    """h [M, R] = A x for rank rows [R]."""
    if not x.is_floating_point():
        return rows.A_rows[row, x].to(dtype)
    return torch.einsum("mk,rk->mr", x.to(dtype), rows.A_rows[row, : x.shape[1]].to(dtype))


def _rows_in_use(rows: RankRows, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The rank rows [R] of slots [U], one adapter after the other, and whose each is, in 0..U."""
    ranks = rows.rank[slots].to(torch.int64)
    owner = torch.arange(len(ranks), device=slots.device).repeat_interleave(ranks)
    first = ranks.cumsum(0) - ranks
    within = torch.arange(len(owner), device=slots.device) - first[owner]
    return rows.offset[slots][owner] + within, owner
