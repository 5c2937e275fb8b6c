"""expand: y += B h, for all adapters of a row in one pass.

    y[m, n] += sum_i sum_r sum_s B[offset[i] + r, n] * h[s, m, j, r],    r < rank[i]

over the slots i of row m, where j is the first place of i in the row. A row to which nothing is
added keeps every bit. A row whose state is DEAD becomes NaN.
"""

import triton
import triton.language as tl

from .plan import BASE, DEAD
from .rank_blocks import RANK_BLOCK, Sizes, block_ends, find_blocks, find_places, rank_rows


@triton.jit
def expand_tile(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    h_ptr,
    plan,
    pool,
    sizes,
    pid_m,  # int64, the tile
    offs_n,  # [BLOCK_N]
    stride_bc,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """(acc + the transpose of B h, [BLOCK_M] whether a row has an adapter in this layer).

    With h on the right, wgmma takes it from shared memory. From registers, as its left operand,
    ptxas before 13.3 miscompiles it (triton #9433).
    """
    M, J, R, U = sizes
    tile_m = tl.arange(0, BLOCK_M)
    offs_b = tl.arange(0, RANK_BLOCK)
    changes = tile_m < 0
    plane = tl.cast(M, tl.int64) * J * R
    h_tile = h_ptr + pid_m * BLOCK_M * J * R
    union_tile = plan.union + pid_m * U
    place_tile = plan.place + pid_m * U * BLOCK_M + tile_m[:, None]
    length = tl.load(plan.length + pid_m)
    for window in range(0, length, BLOCK_U):
        ends = block_ends(union_tile + window, length - window, pool.rank, BLOCK_U)
        total = tl.max(ends, axis=0)
        for start in range(0, total, GROUP):
            blocks = find_blocks(start, ends, total, union_tile + window, pool, GROUP)
            place = find_places(blocks, window, place_tile, BLOCK_M)
            changes = changes | (tl.max(place, axis=1) >= 0)
            # [BLOCK_M, GROUP, RANK_BLOCK]; counted within the tile, 32 bits are enough for offsets
            offs_h = (tile_m[:, None] * J + place) * R + blocks.first[None, :]
            offs_h = offs_h[:, :, None] + offs_b[None, None, :]
            h = tl.zeros((BLOCK_M, GROUP, RANK_BLOCK), tl.float32)
            for split in tl.static_range(SPLIT_K):
                # Past the L1 cache: other processors have just written it.
                h += tl.load(
                    h_tile + split * plane + offs_h,
                    mask=(place >= 0)[:, :, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
            h = tl.trans(tl.reshape(h, [BLOCK_M, GROUP * RANK_BLOCK]))
            row, mask_r = rank_rows(blocks, GROUP)
            # [GROUP * RANK_BLOCK, BLOCK_N]; up to its stride: an odd N would end 16-byte loads
            B = tl.load(
                pool.B_rows + row[:, None].to(tl.int64) * stride_bc + offs_n[None, :],
                mask=mask_r[:, None] & (offs_n < stride_bc)[None, :],
                other=0.0,
            )
            B = tl.trans(B.to(DOT_DTYPE))
            high = h.to(DOT_DTYPE)
            acc = tl.dot(B, high, acc, input_precision="ieee")
            if DOT_DTYPE != tl.float32:
                # What the rounding of h lost, so that y's is the only one; 0 where h overflowed.
                low = h - high.to(tl.float32)
                low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
                acc = tl.dot(B, low.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc, changes


@triton.jit(do_not_specialize=["M", "U"])
def expand_kernel(
    h_ptr,  # [SPLIT_K, M, J, R] fp32
    y_ptr,  # [M, N], read and written
    plan,  # a Plan
    pool,  # a Pool
    M,
    N,  # in units of Y_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    stride_bc,
    stride_ym,  # in units of Y_UNIT
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    Y_UNIT: tl.constexpr,  # divides N and stride_ym: tells the compiler how wide it may load
    DOT_DTYPE: tl.constexpr,
):
    """One tile x BLOCK_N columns: one read and one write of y, one rounding."""
    N *= Y_UNIT
    stride_ym *= Y_UNIT
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    state = tl.load(plan.state + offs_m, mask=offs_m < M, other=BASE)
    # [BLOCK_M, BLOCK_N]; asked for before the loop, which hides the wait
    y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask_n = (offs_n < N)[None, :]
    y = tl.load(y_tile, mask=(state != BASE)[:, None] & mask_n, other=0.0).to(tl.float32)
    y = tl.where((state == DEAD)[:, None], float("nan"), y)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc, changes = expand_tile(
        acc,
        h_ptr,
        plan,
        pool,
        Sizes(M, J, R, U),
        pid_m,
        offs_n,
        stride_bc,
        BLOCK_M,
        BLOCK_U,
        GROUP,
        SPLIT_K,
        DOT_DTYPE,
    )
    y += tl.trans(acc)
    mask_m = (changes | (state == DEAD))[:, None]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)
