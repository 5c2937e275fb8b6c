"""The operators by Triton: launches, and what they need besides."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import RankRows
from ..kernels.tensors import Plan, Pool
from . import tuned
from .operands import How, Trained, row_by_row, transposed

if TYPE_CHECKING:
    from ..kernels.launch_gradient import SumAgain
    from ..kernels.pairs import Pairs
    from ..kernels.ready import AddAgain, LinearAgain


def computable(tensor: Tensor) -> Tensor:
    """fp32 for bf16 in Triton's interpreter, which multiplies bf16's bits (triton #11584)."""
    from ..kernels import launch

    return tensor.float() if launch.INTERPRETED and tensor.dtype is torch.bfloat16 else tensor


def _pool(rows: RankRows) -> Pool:
    """The same tensors, as the launchers take them."""
    return Pool(computable(rows.A_rows), computable(rows.B_rows), *rows[2:])


class Added(NamedTuple):
    """What shrink and expand have left."""

    h: Tensor | None = None  # [M, J, R, parts]
    again: "AddAgain | None" = None  # what launches them again, where the tensors need no copies


def add_(y: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How) -> Added:
    """Launch shrink and expand."""
    from ..kernels import launch, ready

    if not (y.numel() and plan.slots.shape[1]):
        return Added()
    by_columns = rows.B_rows.dim() == 3
    if by_columns and (rows.B_rows.shape[2] % 8 or not rows.B_rows.is_contiguous()):
        rows = row_by_row(rows)
    pool = _pool(rows)
    given, x, out = x, row_major(computable(x)), row_major(computable(y))
    shrink = None
    if x.is_floating_point():
        config = _config(x, out, pool.A_rows, plan, how)
        h = x.new_empty(launch.h_shape(plan, how.max_rank, config), dtype=torch.float32)
        shrink = launch.shrink(x, h, plan, pool, config)
    else:
        config = dataclasses.replace(_config(out, out, pool.B_rows, plan, how), split_k=1)
        h = _columns(x, rows, plan, launch.h_shape(plan, how.max_rank, config))
    expand = launch.expand(h, out, plan, pool, config)
    if out is not y:
        y.copy_(out)
    if shrink is None or expand is None or x is not given or out is not y:
        return Added(h)
    return Added(h, ready.AddAgain(tuple(h.shape), shrink, expand))


def _columns(
    x: Tensor, rows: RankRows, plan: Plan, shape: tuple[int, ...], weighted: bool = True
) -> Tensor:
    """h [M, J, R, 1] as shrink makes it, for ints x [M, 1]: columns of A, which need no product."""
    slots, S = plan.slots[:, :, None], len(rows.rank)
    place = torch.arange(shape[2], device=x.device)
    if not (S and len(rows.A_rows)):
        return x.new_zeros(*shape[:3], 1, dtype=torch.float32)
    known = (slots >= 0) & (slots < S)
    slot = torch.where(known, slots, 0).long()  # [M, J, 1]
    held = known & (place < rows.rank[slot])
    row = torch.where(held, rows.offset[slot] + place, 0)
    h = rows.A_rows[row, x[:, :, None]].float()
    if rows.constant is not None:
        h = torch.where(rows.constant[row], 1.0, h)
    if weighted:
        h = h * (plan.strength[:, :, None] * rows.scaling[slot])
    return torch.where(held, h, 0.0)[..., None].contiguous()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: RankRows, plan: Plan, how: How
) -> "tuple[Tensor, LinearAgain | None] | None":
    """The fused launch, and what makes it again where x needs no copy; None = there is none."""
    from ..kernels import config, launch

    (M, K), N, stream = x.shape, weight.shape[0], launch.stream_number(x.device)
    one_tile = M <= config.FUSED_ROWS and plan.block_m == config.fused_tile_rows(M)
    if stream is None or not one_tile or not (x.numel() and N and plan.slots.shape[1]):
        return None
    if rows.B_rows.dim() == 3:  # by columns, which expand alone reads
        return None
    pool, W, inputs = _pool(rows), computable(weight), row_major(computable(x))
    if inputs.stride(0) % 8:  # its rows could not be loaded by 16 bytes
        inputs = inputs.contiguous()
    case = tuned.Case(M, K, N, max(1, how.max_rank), 1, x.element_size())
    chosen = tuned.fused(launch.device_name(x.device), case, plan.block_m)
    if chosen is None:
        machine, places = launch.architecture(x.device), plan.slots.shape[1]
        chosen = config.choose_fused(M, N, machine, places)
    arguments = inputs, W, bias, plan, pool, how.max_rank, stream, chosen
    y, again = launch.linear_and_again(*arguments)
    return y.to(x.dtype), again if inputs is x else None


def strength_gradient(grad: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How) -> Tensor:
    """<B^T grad, A x> * scaling at the first place of each slot, else 0."""
    gradient = plan.strength.new_zeros(plan.strength.shape)
    if not gradient.numel():
        return gradient
    h, g = low(x, grad, rows, plan, how), low(grad, x, transposed(rows), plan, how)
    return gradient.copy_((h.sum(3) * g.sum(3)).sum(2) * _scaling(rows, plan))


def weight_gradient(
    grad: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How, trained: Trained
) -> tuple[Tensor, Tensor]:
    """The gradients [R, K] and [R, N] fp32 of the rank rows that are trained, of A and of B."""
    from ..kernels.pairs import Pairs

    assert trained.pair is not None and trained.start is not None
    pairs = Pairs(trained.pair, trained.start)
    h = low(x, grad, rows, plan, how, weighted=True)
    g = low(grad, x, transposed(rows), plan, how, weighted=True)
    return sums(g, h, x, grad, pairs, trained.ranks, trained.biases, how.batch_invariant)[:2]


def sums(
    g: Tensor,
    h: Tensor,
    x: Tensor,
    grad: Tensor,
    pairs: "Pairs",
    ranks: Sequence[tuple[int, int]],
    biases: Sequence[int],
    batch_invariant: bool,
) -> "tuple[Tensor, Tensor, tuple[SumAgain, SumAgain] | None]":
    """The gradients of A's and of B's rank rows, and what computes both again.

    Args:
        g: B^T grad as shrink writes it, [M, J, R, parts]; h: A x, likewise.
        ranks: (number, rank rows) of each adapter, a bias included.
        biases: 1 for each that has one, else 0.
    """
    from ..kernels.launch_gradient import weight_gradient_and_again

    dy, x = row_major(computable(grad)), row_major(computable(x))
    shared = None, pairs, ranks
    of_A, first = weight_gradient_and_again(g, x, *shared, biases, batch_invariant)
    of_B, second = weight_gradient_and_again(h, dy, *shared, (), batch_invariant)
    return of_A, of_B, (first, second) if first and second else None


def low(
    vectors: Tensor, other: Tensor, rows: RankRows, plan: Plan, how: How, weighted: bool = False
) -> Tensor:
    """A x as `add_` computes it, [M, J, R, parts].

    Args:
        vectors: x.
        other: y, whose sizes count.
        weighted: times strength and scaling, and nothing where a row selects nothing; else 0 there.
    """
    from ..kernels import launch

    pool, other = _pool(rows), row_major(computable(other))
    if not vectors.is_floating_point():
        config = dataclasses.replace(_config(other, other, pool.B_rows, plan, how), split_k=1)
        shape = launch.h_shape(plan, how.max_rank, config)
        return _columns(vectors, rows, plan, shape, weighted)
    vectors = row_major(computable(vectors))
    config = _config(vectors, other, pool.A_rows, plan, how)
    made = vectors.new_empty if weighted else vectors.new_zeros
    h = made(launch.h_shape(plan, how.max_rank, config), dtype=torch.float32)
    launch.shrink(vectors, h, plan, pool, config, weighted)
    return h


def _scaling(rows: RankRows, plan: Plan) -> Tensor:
    """scaling [M, J] of what each place selects, else 0."""
    return torch.where(plan.slots >= 0, rows.scaling[plan.slots.clamp(min=0)], 0.0)


def _config(x: Tensor, y: Tensor, factor: Tensor, plan: Plan, how: How) -> Any:
    """The measured Config for a batch, or the chosen one."""
    from ..kernels import config, launch

    case = tuned.Case(
        rows=x.shape[0],
        in_features=x.shape[1],
        out_features=y.shape[1],
        rank=how.max_rank,
        selections=plan.slots.shape[1],
        itemsize=launch.product_itemsize(x, y, factor),
    )
    # Measured ones differ with the rows, so that a row's bits would.
    if not how.batch_invariant:
        measured = tuned.find(launch.device_name(x.device), case, plan.block_m)
        if measured is not None:
            return measured
    return config.choose(
        *(case.rows, case.in_features, case.out_features, case.itemsize),
        architecture=launch.architecture(x.device),
        block_m=plan.block_m,
        batch_invariant=how.batch_invariant,
    )


def row_major(tensor: Tensor) -> Tensor:
    """With an inner stride of 1, as the kernels take it for granted; itself where it has that."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
