"""Plans for the operators: the rows of a batch in tiles, whose index is read on their device."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Pool
from . import operators
from .forms import plain, tracked


class TiledPlan(NamedTuple):
    """A plan for layers whose adapters are added to what the base layer answers."""

    tensors: operators.Plan
    batch_invariant: bool
    triton: bool
    case: object = None  # of operators.case_of, where launches need no dispatcher

    @property
    def strength(self) -> Tensor:
        """strength [M, J] of `tensors`."""
        return self.tensors.strength

    def with_strength(self, strength: Tensor) -> "TiledPlan":
        """The plan with another tensor of equal values there."""
        return self._replace(tensors=self.tensors._replace(strength=strength), case=None)

    def add(self, y: Tensor, x: Tensor, pool: Pool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        here = owned and not tracked(y, x, self.tensors.strength) and y.is_contiguous()
        if here and self.case is not None and plain(y, x):
            rows, max_rank = pool.rows_now, pool.max_rank
            operators.add_now(
                y, x, rows, self.tensors, self.case, max_rank, self.batch_invariant
            )
            return y
        arguments = (
            *(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *pool.rows, *self.tensors),
            *(pool.max_rank, self.batch_invariant, self.triton),
        )
        if here:
            torch.ops.lora_mux.add_lora_(*arguments)
            return y
        added: Tensor = torch.ops.lora_mux.add_lora(*arguments)
        return added.reshape(y.shape)


class FusedPlan(NamedTuple):
    """A plan for layers that are computed whole, base and adapters, in one launch."""

    tensors: operators.Plan

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K] without gradients."""
        batch_invariant, triton = False, True
        y: Tensor = torch.ops.lora_mux.linear(
            *(x.reshape(-1, x.shape[-1]), weight, bias, *pool.rows, *self.tensors),
            *(pool.max_rank, batch_invariant, triton),
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])
