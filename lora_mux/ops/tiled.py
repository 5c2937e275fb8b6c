"""Plans for the operators: the rows of a batch in tiles, whose index is read on their device.

In eager mode torch's dispatcher takes some tens of microseconds for the twenty arguments of an
operator, and Triton as long for those of a kernel. Where nobody looks on (`forms.plain`), and
autograd follows nothing but adapters that are trained and their layers, plans do without both: what
was launched is kept by its case, and launched again with other pointers (`eager`).
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import AnyPool, Pool
from ..kernels.tensors import BASE
from . import eager, on_triton, operators
from .forms import plain, tracked
from .operands import How, Trained

if TYPE_CHECKING:
    from ..kernels.ready import PlanNow


class TiledPlan(NamedTuple):
    """A plan for layers whose adapters are added to what the base layer answers."""

    tensors: operators.Plan
    batch_invariant: bool
    triton: bool
    trained: eager.TrainedHere | None = None
    used: Collection[int] | None = None  # at least all slots that it selects; None = not known

    @property
    def slots(self) -> Tensor:
        """slots [M, J] of `tensors`."""
        return self.tensors.slots

    @property
    def strength(self) -> Tensor:
        """strength [M, J] of `tensors`."""
        return self.tensors.strength

    def with_strength(self, strength: Tensor) -> "TiledPlan":
        """The plan with another tensor of equal values there."""
        return self._replace(tensors=self.tensors._replace(strength=strength))

    @property
    def selecting(self) -> Tensor:
        """[M, 1] bool: the rows that select an adapter, alive or not."""
        return (self.tensors.state != BASE)[:, None]

    def touches(self, pool: AnyPool) -> bool:
        """True: only the device knows the slots."""
        return True

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        arguments = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *self._shared(pool)
        trained = self._trained_in(pool)
        followed = tracked(y, x, self.tensors.strength, *(trained.parameters or ()))
        if owned and not followed and y.is_contiguous():
            torch.ops.lora_mux.add_lora_(*arguments)
            return y
        added: Tensor = torch.ops.lora_mux.add_lora(*arguments, *trained)
        return added.reshape(y.shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K]: one node for autograd.

        Its gradient of x is made in place, by dy W. A base layer beside it would cost a tensor of
        zeros, one of the adapters' part and a sum: 3 times the traffic.
        """
        arguments = x.reshape(-1, x.shape[-1]), weight, bias, *self._shared(pool)
        y: Tensor = torch.ops.lora_mux.linear(*arguments, *self._trained_in(pool))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def follows(self, x: Tensor, pool: AnyPool) -> bool:
        """Whether autograd follows what the adapters add to a layer."""
        trained = self.trained is not None and self.trained.follows(pool)
        return trained or tracked(x, self.tensors.strength)

    def _shared(self, pool: AnyPool) -> tuple[Any, ...]:
        how = How(pool.max_rank, self.batch_invariant, self.triton, fused=False)
        return *pool.rows, *self.tensors, *how

    def _trained_in(self, pool: AnyPool) -> Trained:
        return Trained() if self.trained is None else self.trained.of_layer(pool)


class EagerPlan(NamedTuple):
    """A TiledPlan for Triton that was made in eager mode, and whose strength nothing follows."""

    now: "PlanNow"
    batch_invariant: bool
    trained: eager.TrainedHere | None = None
    used: Collection[int] | None = None  # as in TiledPlan

    @property
    def tiled(self) -> TiledPlan:
        """The same for operators."""
        return TiledPlan(self.now.tensors, self.batch_invariant, True, self.trained, self.used)

    @property
    def slots(self) -> Tensor:
        """slots [M, J]."""
        return self.now.slots

    @property
    def strength(self) -> Tensor:
        """strength [M, J]."""
        return self.now.tensors.strength

    def with_strength(self, strength: Tensor) -> TiledPlan:
        """The plan with another tensor of equal values there."""
        return self.tiled.with_strength(strength)

    @property
    def selecting(self) -> Tensor:
        """[M, 1] bool: the rows that select an adapter, alive or not."""
        return self.tiled.selecting

    def touches(self, pool: AnyPool) -> bool:
        """True: only the device knows the slots."""
        return True

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        if self.follows(x, pool) or tracked(y):
            made = self._training(pool, x, y)
        elif owned and plain(y, x) and y.is_contiguous():
            eager.add_now(self.now, self.batch_invariant, y, x, eager.rows_now(pool), pool.max_rank)
            return y
        else:
            made = None
        return self.tiled.add(y, x, pool, owned) if made is None else made

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """The whole layer for autograd; see TiledPlan."""
        made = self._training(pool, x, None, weight, bias)
        return self.tiled.linear(x, weight, bias, pool) if made is None else made

    def _training(self, pool: AnyPool, x: Tensor, *base: Tensor | None) -> Tensor | None:
        """A layer that trains an adapter; None = it trains none, or is for operators."""
        if self.trained is None:
            return None
        return eager.layer(self.now, self.batch_invariant, self.trained, pool, x, *base)

    def follows(self, x: Tensor, pool: AnyPool) -> bool:
        """Whether autograd follows what the adapters add to a layer."""
        return tracked(x) or (self.trained is not None and self.trained.follows(pool))


class FusedPlan(NamedTuple):
    """A plan for layers that are computed whole, base and adapters, in one launch."""

    tensors: operators.Plan | None  # None = those of `now`
    now: "PlanNow | None" = None  # of a plan that was made in eager mode

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K] without gradients."""
        now, tensors = self.now, self.tensors
        if now is not None and plain(x, x) and not tracked(x, weight, bias):
            made = _linear_now(now, x, weight, bias, pool)
            if made is not None:
                return made
        if tensors is None:
            assert now is not None
            tensors = now.tensors
        batch_invariant, triton = False, True
        y: Tensor = torch.ops.lora_mux.linear(
            *(x.reshape(-1, x.shape[-1]), weight, bias, *pool.rows, *tensors),
            *(pool.max_rank, batch_invariant, triton),
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _linear_now(
    now: "PlanNow", x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool
) -> Tensor | None:
    """FusedPlan.linear for tensors that are `forms.plain`; None = there is no launch to make."""
    from ..kernels import launch

    rows, device = eager.rows_now(pool), x.device
    stream = launch.stream_number(device)
    added = None if bias is None else (bias.stride(), bias.dtype, bias.get_device())
    case = (
        *(now.case, stream, pool.max_rank, *eager.kinds(rows)),
        *(x.shape, x.stride(), x.dtype, device),
        *(weight.shape, weight.stride(), weight.dtype, weight.get_device(), added),
    )
    pointers = eager.pointers_of(rows)
    own = x.data_ptr() | weight.data_ptr() | (0 if bias is None else bias.data_ptr())
    again = eager.again_for(case, own, pointers, now)
    if again is not None:
        y: Tensor = again(x, weight, bias, now, pointers)
        return y
    flat, how = x.reshape(-1, x.shape[-1]), How(pool.max_rank, False, True)
    made = on_triton.linear(flat, weight, bias, rows, now.tensors, how)
    if made is None:
        return None
    y, again = made
    y = y.view(*x.shape[:-1], y.shape[-1])
    if again is not None and flat.data_ptr() == x.data_ptr():
        eager.keep(case, again._replace(y_shape=tuple(y.shape)), own, pointers)
    return y
