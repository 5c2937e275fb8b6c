"""shrink: h = strength A x for every selected adapter of every row.

    h[m, j, r, s] = strength[m, j] * scaling[i] * sum_k A[offset[i] + r, k] * x[m, k]

over the k of split s, where j is the first place of slot i in row m. A constant rank row, which
carries a bias, has 1 in place of A x. h is 0 from rank[i] to the end of the last rank block; the
other places of a row are not written.
"""

import triton
import triton.language as tl

from .rank_blocks import (
    MOST_PLACES,
    RANK_BLOCK,
    WIDEST,
    Sizes,
    ask,
    find_blocks,
    find_places,
    of_slots,
    rank_rows,
    search,
    table,
)


@triton.jit
def products(
    x_rows,
    A_rows,
    mask_m,
    mask_r,
    pid_k,
    end_k,  # K, or 0 for none at all
    K,
    stride_ac,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """x A^T over the k of a split, [BLOCK_M, GROUP * RANK_BLOCK]."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, GROUP * RANK_BLOCK), tl.float32)
    for k in range(pid_k * BLOCK_K, end_k, BLOCK_K * SPLIT_K):
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_rows + k, mask=mask_m & (k + offs_k < K)[None, :], other=0.0)
        # [GROUP * RANK_BLOCK, BLOCK_K]; up to its stride: an odd K would end 16-byte loads
        mask_k = (k + offs_k < stride_ac)[None, :]
        A = tl.load(A_rows + k, mask=mask_r[:, None] & mask_k, other=0.0)
        # TF32, the default for fp32 on a GPU, would cost 3e-4 of relative error.
        acc = tl.dot(x.to(DOT_DTYPE), tl.trans(A.to(DOT_DTYPE)), acc, input_precision="ieee")
    return acc


@triton.jit
def shrink_window(
    x_ptr,
    h_ptr,
    asked,  # the window
    scalings,  # the table of them
    plan,
    pool,
    sizes,
    pid_m,
    first_group,
    groups,
    pid_k,
    K,
    stride_xm,
    stride_ac,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A program's share of one window of the union; see shrink_tile."""
    M, J, R, U, S = sizes
    tile_m = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tile_m
    offs_k = tl.arange(0, BLOCK_K)
    offs_b = tl.arange(0, RANK_BLOCK)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    h_tile = h_ptr + pid_m * BLOCK_M * J * R * SPLIT_K + pid_k
    window = search(asked, BLOCK_U, SLOTS)
    # The first turn is not asked whether it exists. The compiler would put all that only the turns
    # need behind that question: one load more before the first of A.
    start, left = first_group * GROUP, tl.cast(1, tl.int32)
    while left > 0:
        blocks = find_blocks(start, window, BLOCK_U, GROUP)
        row, mask_r = rank_rows(blocks, GROUP)
        if pool.constant is not None:
            constant = tl.load(pool.constant + row, mask=mask_r, other=0)
        places = find_places(blocks, asked, BLOCK_M, BLOCK_U, GROUP)
        strength_tile = plan.strength + pid_m * BLOCK_M * J
        if WEIGHTED and BLOCK_M * BLOCK_U <= MOST_PLACES:
            # Asked for along with A, and wanted after the loop.
            strength = tl.load(
                strength_tile + tile_m[:, None] * J + places, mask=places >= 0, other=0.0
            )
        A_rows = pool.A_rows + row[:, None].to(tl.int64) * stride_ac + offs_k[None, :]
        end_k = tl.where(start < window.total, K, 0)
        acc = products(
            *(x_rows, A_rows, mask_m, mask_r, pid_k, end_k, K, stride_ac),
            *(BLOCK_M, GROUP, BLOCK_K, SPLIT_K, DOT_DTYPE),
        )
        if pool.constant is not None:
            acc = tl.where((constant != 0)[None, :], tl.where(pid_k == 0, 1.0, 0.0), acc)

        # Places from memory are waited for only here. Counted within the tile, 32 bits are enough
        # for offsets, and half the registers.
        place = places.to(tl.int32)
        selects = place >= 0
        at = tile_m[:, None] * J + place
        # [BLOCK_M, GROUP, RANK_BLOCK]
        h = tl.reshape(acc, [BLOCK_M, GROUP, RANK_BLOCK])
        if WEIGHTED:
            slot = tl.gather(window.slot, blocks.u, axis=0)
            scaling = of_slots(scalings, slot, blocks.exists, SLOTS)
            if BLOCK_M * BLOCK_U > MOST_PLACES:
                strength = tl.load(strength_tile + at, mask=selects, other=0.0)
            h = h * (strength.to(tl.float32) * scaling[None, :])[:, :, None]
        offs_h = (at * R + blocks.first[None, :])[:, :, None] + offs_b[None, None, :]
        tl.store(h_tile + offs_h * SPLIT_K, h, mask=selects[:, :, None])
        start += groups * GROUP
        left = window.total - start


@triton.jit
def shrink_tile(
    x_ptr,
    h_ptr,
    plan,
    pool,
    sizes,
    pid_m,  # int64, the tile
    first_group,  # of its rank blocks, and then every groups-th
    groups,
    pid_k,
    K,
    stride_xm,
    stride_ac,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A program's share of h. The arguments are those of shrink_kernel, with sizes in elements."""
    scalings = table(pool.scaling, sizes.S, SLOTS)
    asked = ask(plan, pool, sizes, pid_m, 0, BLOCK_M, BLOCK_U, SLOTS)
    shrink_window(
        *(x_ptr, h_ptr, asked, scalings, plan, pool, sizes, pid_m, first_group, groups, pid_k),
        *(K, stride_xm, stride_ac, WEIGHTED, BLOCK_M, BLOCK_U, SLOTS, GROUP, BLOCK_K, SPLIT_K),
        DOT_DTYPE,
    )
    if BLOCK_U == WIDEST:
        for at in range(BLOCK_U, asked.length, BLOCK_U):
            further = ask(plan, pool, sizes, pid_m, at, BLOCK_M, BLOCK_U, SLOTS)
            shrink_window(
                *(x_ptr, h_ptr, further, scalings, plan, pool, sizes, pid_m, first_group, groups),
                *(pid_k, K, stride_xm, stride_ac, WEIGHTED, BLOCK_M, BLOCK_U, SLOTS, GROUP),
                *(BLOCK_K, SPLIT_K, DOT_DTYPE),
            )


@triton.jit(do_not_specialize=["M", "U", "S"])
def shrink_kernel(
    x_ptr,  # [M, K]
    h_ptr,  # [M, J, R, SPLIT_K] fp32, written where place points to
    plan,  # a Plan
    pool,  # a Pool
    M,
    K,  # in units of X_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    S,  # slots of the pool
    stride_xm,  # in units of X_UNIT
    stride_ac,
    WEIGHTED: tl.constexpr,  # else strength = scaling = 1
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, at least S; 0: too many to hold
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    X_UNIT: tl.constexpr,  # divides K and stride_xm: tells the compiler how wide it may load
    DOT_DTYPE: tl.constexpr,
):
    """One tile x every num_programs(1)-th group of its rank blocks x one of SPLIT_K parts of K."""
    shrink_tile(
        *(x_ptr, h_ptr, plan, pool, Sizes(M, J, R, U, S), tl.program_id(0).to(tl.int64)),
        *(tl.program_id(1), tl.num_programs(1), tl.program_id(2)),
        *(K * X_UNIT, stride_xm * X_UNIT, stride_ac),
        *(WEIGHTED, BLOCK_M, BLOCK_U, SLOTS, GROUP, BLOCK_K, SPLIT_K, DOT_DTYPE),
    )
