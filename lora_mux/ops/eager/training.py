"""Layers whose adapters are trained, in eager mode: one node for autograd, without the dispatcher.

    h = gain A x,  g = gain B^T dy,  dx = dy W + A^T g,  dA = sum g x^T,  dB^T = sum h dy^T

h is kept from the forward pass, and g serves dx as well as dA: besides the base's products, two
launches forward, and four and what adds up parts backward. The operators compute the same, bit for
bit, wherever something looks on.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...core import AnyPool, Masters, RankRows, to_device
from ...kernels.tensors import Plan
from .. import on_triton
from ..forms import plain
from ..operands import (
    How,
    Trained,
    by_parameter,
    check_unchanged,
    refuse_second_derivatives,
    transposed,
)
from .again import add_now, again_for, keep, rows_now

if TYPE_CHECKING:
    from ...kernels.pairs import Pairs
    from ...kernels.ready import PlanNow


class TrainedHere(NamedTuple):
    """The adapters of a batch that are trained, and which rows select them; see Trained."""

    slots: tuple[int, ...]  # [T]
    trained: Tensor | None  # the same as a tensor, which kernels do not read
    pair: Tensor
    start: Tensor

    @classmethod
    def of(cls, slots: tuple[int, ...], plan: Plan, capacity: int) -> "TrainedHere":
        """Those of a plan, without a sync."""
        from ...kernels.pairs import pairs_of

        (trained,) = to_device([torch.tensor(slots, dtype=torch.int32)], plan.slots.device)
        return cls(slots, trained, *pairs_of(plan.slots, trained, capacity))

    @classmethod
    def now(cls, slots: tuple[int, ...], now: "PlanNow", capacity: int) -> "TrainedHere":
        """Those of a plan that was made in eager mode; what the last pass copied is kept."""
        from ...kernels.pairs import numbers_on, pairs_by

        rows = now.slots
        return cls(slots, None, *pairs_by(rows, numbers_on(rows.device, slots, capacity)))

    def held(self, pool: AnyPool) -> list[tuple[int, Masters]]:
        """(number, parameters) of each that a layer has."""
        masters = pool.masters
        return [(number, masters[s]) for number, s in enumerate(self.slots) if s in masters]

    def of_layer(self, pool: AnyPool) -> Trained:
        """What a layer trains of them."""
        owned = [(number, one) for number, m in self.held(pool) for one in m.parameters]
        if not owned:
            return Trained()
        owners, parameters = map(list, zip(*owned, strict=True))
        return Trained(parameters, owners, self.trained, self.pair, self.start)

    def follows(self, pool: AnyPool) -> bool:
        """Whether autograd follows a parameter of a layer."""
        return torch.is_grad_enabled() and any(
            one.requires_grad for _, masters in self.held(pool) for one in masters.parameters
        )


class Step(NamedTuple):
    """What a layer needs of a pass, and what it trains."""

    now: "PlanNow"
    batch_invariant: bool
    max_rank: int
    rows: RankRows  # not the pool: torch would refuse a backward after an adapter came or went
    pairs: "Pairs"
    ranks: tuple[tuple[int, int], ...]  # (number, rank rows) of each adapter, with its bias
    biases: tuple[int, ...]  # of each 1 or 0


def layer(
    now: "PlanNow",
    batch_invariant: bool,
    here: TrainedHere,
    pool: AnyPool,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """y [..., N], or x W^T + bias where y is None, plus the adapters' part.

    None where it is for the operators: something looks on, or there is nothing to train.
    """
    given = x if y is None else y
    if not (plain(given, x) and x.dim() > 1 and x.is_floating_point()):
        return None
    held = here.held(pool)
    if not (held and x.numel() and given.numel() and here.pair.numel()):
        return None
    from ...kernels.pairs import Pairs

    biases = tuple([0 if one.bias is None else 1 for _, one in held])
    ranks = tuple([(n, one.A.shape[0] + b) for (n, one), b in zip(held, biases, strict=True)])
    pairs = Pairs(here.pair, here.start)
    step = Step(now, batch_invariant, pool.max_rank, rows_now(pool), pairs, ranks, biases)
    parameters = [parameter for _, one in held for parameter in one.parameters]
    made: Tensor = _Layer.apply(y, x, weight, bias, step, *parameters)  # type: ignore[no-untyped-call]
    return made


class _Layer(torch.autograd.Function):
    """See `layer`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        step: Step,
        *parameters: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight is not None
            out = torch.nn.functional.linear(x, weight, bias).contiguous()
        else:
            out = y.clone(memory_format=torch.contiguous_format)
        now, batch_invariant, max_rank, rows, *_ = step
        h = add_now(now, batch_invariant, out, x, rows, max_rank)
        ctx.step, ctx.parameters = step, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.save_for_backward(x, weight, h)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_unchanged(ctx.parameters, ctx.versions)
        refuse_second_derivatives()
        if not torch.is_autocast_enabled(grad.device.type):  # which takes 10 us to tell twice
            return _gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    step: Step = ctx.step
    x, weight, h = ctx.saved_tensors
    to_y, to_x, _, _, _, *to_parameters = ctx.needs_input_grad
    # A base that answers in another dtype than x's would be multiplied in fp32 for nothing.
    dy = on_triton.row_major(grad.to(x.dtype).reshape(-1, grad.shape[-1]))
    flat = on_triton.row_major(x.reshape(-1, x.shape[-1]))
    now, batch_invariant, max_rank, rows, *_ = step
    turned, dx = transposed(rows), None
    if to_x:
        dx = flat.new_zeros(flat.shape) if weight is None else dy @ weight
        g = add_now(now, batch_invariant, dx, dy, turned, max_rank)
        dx = dx.view(x.shape)
    else:
        how = How(max_rank, batch_invariant, True)
        g = on_triton.low(dy, flat, turned, now.tensors, how, weighted=True)
    factors: Sequence[Tensor | None] = [None] * len(to_parameters)
    if any(to_parameters):
        assert g is not None
        of_both = _sums(step, g, h, flat, dy)
        factors = by_parameter(*of_both, step.ranks, step.biases, ctx.parameters)
    return grad if to_y else None, dx, None, None, None, *factors


def _sums(step: Step, g: Tensor, h: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rank rows of A and of B."""
    sizes = g.shape, h.shape, x.shape, x.stride(), x.dtype, x.get_device()
    case = *sizes, dy.shape, dy.stride(), dy.dtype, step.batch_invariant, step.ranks, step.biases
    own = g.data_ptr() | h.data_ptr() | x.data_ptr() | dy.data_ptr()
    pointers = step.pairs.pair.data_ptr(), step.pairs.start.data_ptr()
    again = again_for(case, own, pointers, step.now)
    if again is not None:
        of_A, of_B = again
        return of_A(g, x, step.pairs), of_B(h, dy, step.pairs)
    given = step.pairs, step.ranks, step.biases, step.batch_invariant
    of_A, of_B, again = on_triton.sums(g, h, x, dy, *given)
    keep(case, again, own, pointers)
    return of_A, of_B
