"""The launcher of the weight gradient, and what makes its launches again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sizes
from .config import GradientConfig, choose_gradient
from .launch import INTERPRETED, architecture, dot_dtype, on_its_device, product_itemsize
from .pairs import Pairs, hold_for_graphs, items_on
from .rank_blocks import RANK_BLOCK
from .ready import Ready, in_order
from .ready import launch as launched
from .weight_gradient import parts_kernel, reduce_kernel, weight_gradient_kernel

BLOCK = 1024  # elements of u that a program of `parts` adds up
REDUCED = 64  # columns of a program of `reduce`


def weight_gradient(*arguments: Any, **options: Any) -> Tensor:
    """[R', C] fp32: the gradient of rank rows, as `weight_gradient_and_again`."""
    return weight_gradient_and_again(*arguments, **options)[0]


@on_its_device
def weight_gradient_and_again(
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    pairs: Pairs,
    ranks: Sequence[tuple[int, int]],
    constant: Sequence[int] = (),
    batch_invariant: bool = False,
    config: GradientConfig | None = None,
) -> "tuple[Tensor, SumAgain | None]":
    """[R', C] fp32: the sum of gain * u v over the pairs of each adapter, one below the other.

    And what computes the next one; only without `gain`.

    Args:
        u: [M, J, R, parts] fp32, as `shrink` writes it; R' = sum of the ranks.
        v: [M, C], with rows of any stride.
        gain: [M, J] fp32, what u has not been multiplied with yet; None = nothing.
        pairs: of all adapters that are trained, some of which this layer may not have.
        ranks: (number in pairs, rank rows) of each adapter of the result.
        constant: how many of each one's last rank rows get 0; () = none.
        batch_invariant: let an adapter's bits depend on its own rows alone.
        config: instead of the chosen one.
    """
    (M, J, R, parts), C, rows = u.shape, v.shape[1], sum(rank for _, rank in ranks)
    if not (M and J and C and rows):
        return v.new_zeros((rows, C), dtype=torch.float32), None
    blocks = sum(sizes.cdiv(rank, RANK_BLOCK.value) for _, rank in ranks)
    of_problem = M * J, len(ranks), blocks, C, product_itemsize(v), architecture(v.device)
    config = config or choose_gradient(*of_problem, batch_invariant)
    assert INTERPRETED or product_itemsize(v) == 2 or config.block_c < 64, "TF32 on sm_100"
    items, unit = items_on(v.device, ranks, config.group, constant), sizes.unit(v)
    total, add = u, None
    if parts > 1:  # once here, not by the programs of all columns
        total = u.new_empty((M, J, R))
        grid = (sizes.cdiv(total.numel(), BLOCK),)
        add = launched(parts_kernel, grid, u, total, n=total.numel(), PARTS=parts, BLOCK=BLOCK)
    out = v.new_empty((config.split, rows, C), dtype=torch.float32)
    tiles = {"GROUP": config.group, "BLOCK_P": config.block_p}
    products = launched(
        weight_gradient_kernel,
        (sizes.cdiv(C, config.block_c), len(items), config.split),
        *(total, v, gain, out, *pairs, items),
        **{"C": C // unit, "J": J, "R": R, "rows": rows, "stride_vm": v.stride(0) // unit},
        **{**tiles, "BLOCK_C": config.block_c, "UNIT": unit, "DOT_DTYPE": dot_dtype(v)},
        **{"num_warps": config.warps, "num_stages": config.stages},
        **sizes.registers(config, unit),
    )
    reduced, reduce = out[0], None
    if config.split > 1:
        reduced = v.new_empty((rows, C), dtype=torch.float32)
        reduce = launched(
            reduce_kernel,
            (sizes.cdiv(C, REDUCED), len(items)),
            *(out, reduced, pairs.start, items),
            **{"C": C, "rows": rows, **tiles, "BLOCK_C": REDUCED, "SPLIT": config.split},
        )
    if products is None or gain is not None:
        return reduced, None
    return reduced, SumAgain(items, (M, J, R), tuple(out.shape), add, products, reduce)


class SumAgain(NamedTuple):
    """What computes the gradient of the same rank rows from tensors that differ in values alone."""

    items: Tensor
    u_shape: tuple[int, ...]  # of its sum over parts
    out_shape: tuple[int, ...]  # with a dimension of parts
    add: Ready | None
    products: Ready
    reduce: Ready | None

    def __call__(self, u: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        """See `weight_gradient_and_again`."""
        device, place = v.get_device(), v.device
        hold_for_graphs(place, self.items)
        pair, start, items = (tensor.data_ptr() for tensor in (*pairs, self.items))
        if self.add is not None:
            total = torch.empty(self.u_shape, dtype=torch.float32, device=place)
            in_order(device, (self.add, (u.data_ptr(), total.data_ptr())))
            u = total
        shape = self.out_shape if self.reduce else self.out_shape[1:]
        out = torch.empty(shape, dtype=torch.float32, device=place)
        given = u.data_ptr(), v.data_ptr(), None, out.data_ptr(), pair, start, items
        in_order(device, (self.products, given))
        if self.reduce is None:
            return out
        reduced = torch.empty(self.out_shape[1:], dtype=torch.float32, device=place)
        in_order(device, (self.reduce, (out.data_ptr(), reduced.data_ptr(), start, items)))
        return reduced
