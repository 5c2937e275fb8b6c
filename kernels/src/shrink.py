"""shrink: h = strength A x for every selected adapter of every row.

    h[s, m, j, r] = strength[m, j] * scaling[i] * sum_k A[offset[i] + r, k] * x[m, k]

over the k of split s, where j is the first place of slot i in row m. A constant rank row, which
carries a bias, has 1 in place of A x. h is 0 from rank[i] to the end of the last rank block; the
other places of a row are not written.
"""

import triton
import triton.language as tl

from .rank_blocks import RANK_BLOCK, Sizes, block_ends, find_blocks, find_places, rank_rows


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
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A program's share of h. The arguments are those of shrink_kernel, with sizes in elements."""
    M, J, R, U = sizes
    tile_m = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tile_m
    offs_k = tl.arange(0, BLOCK_K)
    offs_b = tl.arange(0, RANK_BLOCK)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    h_tile = h_ptr + (pid_k.to(tl.int64) * M + pid_m * BLOCK_M) * J * R
    union_tile = plan.union + pid_m * U
    place_tile = plan.place + pid_m * U * BLOCK_M + tile_m[:, None]
    length = tl.load(plan.length + pid_m)

    for window in range(0, length, BLOCK_U):
        ends = block_ends(union_tile + window, length - window, pool.rank, BLOCK_U)
        total = tl.max(ends, axis=0)
        for start in range(first_group * GROUP, total, groups * GROUP):
            blocks = find_blocks(start, ends, total, union_tile + window, pool, GROUP)
            row, mask_r = rank_rows(blocks, GROUP)
            A_rows = pool.A_rows + row[:, None].to(tl.int64) * stride_ac + offs_k[None, :]
            # [BLOCK_M, GROUP * RANK_BLOCK]
            acc = tl.zeros((BLOCK_M, GROUP * RANK_BLOCK), tl.float32)
            for k in range(pid_k * BLOCK_K, K, BLOCK_K * SPLIT_K):
                # [BLOCK_M, BLOCK_K]
                x = tl.load(x_rows + k, mask=mask_m & (k + offs_k < K)[None, :], other=0.0)
                # [GROUP * RANK_BLOCK, BLOCK_K]; up to its stride: an odd K would end 16-byte loads
                mask_k = (k + offs_k < stride_ac)[None, :]
                A = tl.load(A_rows + k, mask=mask_r[:, None] & mask_k, other=0.0)
                # TF32, the default for fp32 on a GPU, would cost 3e-4 of relative error.
                acc = tl.dot(
                    x.to(DOT_DTYPE), tl.trans(A.to(DOT_DTYPE)), acc, input_precision="ieee"
                )
            if pool.constant is not None:
                constant = tl.load(pool.constant + row, mask=mask_r, other=0) != 0
                acc = tl.where(constant[None, :], tl.where(pid_k == 0, 1.0, 0.0), acc)

            place = find_places(blocks, window, place_tile, BLOCK_M)
            selects = place >= 0
            # Counted within the tile, 32 bits are enough for offsets, and half the registers.
            at = tile_m[:, None] * J + place
            # [BLOCK_M, GROUP, RANK_BLOCK]
            h = tl.reshape(acc, [BLOCK_M, GROUP, RANK_BLOCK])
            if WEIGHTED:
                scaling = tl.load(pool.scaling + blocks.slot, mask=blocks.exists, other=0.0)
                strength_tile = plan.strength + pid_m * BLOCK_M * J
                strength = tl.load(strength_tile + at, mask=selects, other=0.0).to(tl.float32)
                h = h * (strength * scaling[None, :])[:, :, None]
            offs_h = (at * R + blocks.first[None, :])[:, :, None] + offs_b[None, None, :]
            tl.store(h_tile + offs_h, h, mask=selects[:, :, None])


@triton.jit(do_not_specialize=["M", "U"])
def shrink_kernel(
    x_ptr,  # [M, K]
    h_ptr,  # [SPLIT_K, M, J, R] fp32, written where place points to
    plan,  # a Plan
    pool,  # a Pool
    M,
    K,  # in units of X_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    stride_xm,  # in units of X_UNIT
    stride_ac,
    WEIGHTED: tl.constexpr,  # else strength = scaling = 1
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    X_UNIT: tl.constexpr,  # divides K and stride_xm: tells the compiler how wide it may load
    DOT_DTYPE: tl.constexpr,
):
    """One tile x every num_programs(1)-th group of its rank blocks x one of SPLIT_K parts of K."""
    shrink_tile(
        x_ptr,
        h_ptr,
        plan,
        pool,
        Sizes(M, J, R, U),
        tl.program_id(0).to(tl.int64),
        tl.program_id(1),
        tl.num_programs(1),
        tl.program_id(2),
        K * X_UNIT,
        stride_xm * X_UNIT,
        stride_ac,
        WEIGHTED,
        BLOCK_M,
        BLOCK_U,
        GROUP,
        BLOCK_K,
        SPLIT_K,
        DOT_DTYPE,
    )
