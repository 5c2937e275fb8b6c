"""weight_gradient: the gradient of the rank rows of trained adapters, for A as for B.

    out[row + r, c] = sum_(m, j) gain[m, j] * u[m, j, r] * v[m, c]

over the pairs (m, j) of an adapter whose rank rows begin at `row`: the rows m that select it, at
its first place j. With u = B^T dy and v = x this is the gradient of A; with u = A x and v = dy that
of B, transposed. Constant rank rows, which carry a bias, get 0 for A.

A program takes every SPLIT-th block of an adapter's pairs; `reduce` adds the parts in their order:

    out[row + r, c] = sum_s part[s, row + r, c],    s < min(SPLIT, blocks of pairs)

Without atomics, and from the adapter's own rows alone: what others hold is not loaded, since
0 x NaN is NaN, and its bits do not depend on where its rows lie in a batch.
"""

import triton
import triton.language as tl

from . import tensors
from .expand import product
from .rank_blocks import RANK_BLOCK

ITEM = tl.constexpr(tensors.ITEM)


@triton.jit
def ask_item(item_ptr, start_ptr, pid):
    """(first rank row, row of the result, rows left, those not constant, first pair, end)."""
    item = item_ptr + pid * ITEM
    number = tl.load(item)
    first = tl.multiple_of(tl.load(item + 1), 16)  # u is loaded by 16 bytes
    row, left, wanted = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    return first, row, left, wanted, tl.load(start_ptr + number), tl.load(start_ptr + number + 1)


@triton.jit
def parts_kernel(
    u_ptr,  # [n, PARTS] fp32
    out_ptr,  # [n] fp32
    n,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK sums over parts, one after the other: torch's may have another order for other n."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    total = tl.load(u_ptr + at * PARTS, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(u_ptr + at * PARTS + part, mask=mask, other=0.0)
    tl.store(out_ptr + at, total, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
    u_ptr,  # [M, J, R] fp32, read where pairs point to, in whole blocks
    v_ptr,  # [M, C]
    gain_ptr,  # [M, J] fp32 likewise; None = 1
    out_ptr,  # [SPLIT, rows, C] fp32, written where there are pairs, and for split 0
    pair_ptr,  # [M * J] int32
    start_ptr,  # [T + 1] int32
    item_ptr,  # [I, ITEM] int32; see pairs.items_of
    C,  # in units of UNIT
    J,
    R,  # a multiple of RANK_BLOCK
    rows,
    stride_vm,  # in units of UNIT
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,  # divides C and stride_vm: tells the compiler how wide it may load
    DOT_DTYPE: tl.constexpr,
):
    """BLOCK_C columns x GROUP rank blocks of an adapter x every num_programs(2)-th block of pairs.

    One block is BLOCK_P pairs.
    """
    C *= UNIT
    stride_vm *= UNIT
    split, splits = tl.program_id(2), tl.num_programs(2)
    first, row, left, wanted, begin, end = ask_item(item_ptr, start_ptr, tl.program_id(1))
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r, offs_p = tl.arange(0, GROUP * RANK_BLOCK), tl.arange(0, BLOCK_P)
    mask_c = offs_c < C
    begin += split * BLOCK_P
    # Whole blocks, by 16 bytes: what lies past the rank reaches no other column of acc.
    mask_u = (offs_r < tl.cdiv(left, RANK_BLOCK) * RANK_BLOCK)[None, :]
    acc = tl.zeros((BLOCK_C, GROUP * RANK_BLOCK), tl.float32)
    for p in range(begin, end, splits * BLOCK_P):
        mask_p = p + offs_p < end
        pair = tl.load(pair_ptr + p + offs_p, mask=mask_p, other=0).to(tl.int64)
        # [BLOCK_P, BLOCK_C]
        v = tl.load(
            v_ptr + (pair // J)[:, None] * stride_vm + offs_c[None, :],
            mask=mask_p[:, None] & mask_c[None, :],
            other=0.0,
        )
        # [BLOCK_P, GROUP * RANK_BLOCK]
        u = tl.load(
            u_ptr + pair[:, None] * R + first + offs_r[None, :],
            mask=mask_p[:, None] & mask_u,
            other=0.0,
        )
        if gain_ptr is not None:
            u *= tl.load(gain_ptr + pair, mask=mask_p, other=0.0).to(tl.float32)[:, None]
        acc = product(acc, v, u, DOT_DTYPE)
    acc = tl.where((offs_r < wanted)[None, :], acc, 0.0)
    out = out_ptr + (split.to(tl.int64) * rows + row) * C
    out = out + offs_r[None, :].to(tl.int64) * C + offs_c[:, None]
    # Few rows cost one part: reduce does not read the others.
    stored = tl.where((split == 0) | (begin < end), left, 0)
    tl.store(out, acc, mask=mask_c[:, None] & (offs_r < stored)[None, :])


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    part_ptr,  # [SPLIT, rows, C] fp32
    out_ptr,  # [rows, C] fp32
    start_ptr,  # [T + 1] int32
    item_ptr,  # [I, ITEM] int32
    C,
    rows,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """BLOCK_C columns x the rank blocks of an item, one after the other."""
    _, row, left, _, begin, end = ask_item(item_ptr, start_ptr, tl.program_id(1))
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_b = tl.arange(0, RANK_BLOCK)
    plane = tl.cast(rows, tl.int64) * C
    for r in range(0, tl.minimum(left, GROUP * RANK_BLOCK), RANK_BLOCK):
        # [RANK_BLOCK, BLOCK_C]
        at = (row + r + offs_b).to(tl.int64)[:, None] * C + offs_c[None, :]
        mask_c = (offs_c < C)[None, :]
        mask = (r + offs_b < left)[:, None] & mask_c
        total = tl.load(part_ptr + at, mask=mask, other=0.0)
        for s in tl.static_range(1, SPLIT):
            written = (r + offs_b < tl.where(begin + s * BLOCK_P < end, left, 0))[:, None]
            total += tl.load(part_ptr + s * plane + at, mask=written & mask_c, other=0.0)
        tl.store(out_ptr + at, total, mask=mask)
