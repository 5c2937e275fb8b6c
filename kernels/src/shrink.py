"""shrink: h = strength A x for every selected adapter of every row.

    h[s, m, j, r] = strength[m, j] * scaling[i] * sum_k A[offset[i] + r, k] * x[m, k]

over the k of split s, for the first place j of slot i in row m. A constant rank row, which carries
a bias, has 1 in the place of A x. From rank[i] on to the end of its last rank block h is 0; the
other places of a row are not written.
"""

import triton
import triton.language as tl

from .rank_blocks import RANK_BLOCK, block_ends, locate


@triton.jit
def shrink_tile(
    x_ptr,
    A_ptr,
    h_ptr,
    strength_ptr,
    union_ptr,
    length_ptr,
    place_ptr,
    offset_ptr,
    rank_ptr,
    scaling_ptr,
    constant_ptr,
    pid_m,  # int64, the tile
    first_group,  # of its rank blocks, and then every groups-th
    groups,
    pid_k,
    M,
    K,
    J,
    R,
    U,
    stride_xm,
    stride_ac,
    HAS_STRENGTH: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A program's share of h; the arguments are those of shrink_kernel, in elements."""
    tile_m = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tile_m
    offs_k = tl.arange(0, BLOCK_K)
    offs_b = tl.arange(0, RANK_BLOCK)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    h_tile = h_ptr + (pid_k.to(tl.int64) * M + pid_m * BLOCK_M) * J * R
    union_tile = union_ptr + pid_m * U
    place_tile = place_ptr + pid_m * U * BLOCK_M + tile_m[:, None]
    length = tl.load(length_ptr + pid_m)

    for window in range(0, length, BLOCK_U):
        ends = block_ends(union_tile + window, length - window, rank_ptr, BLOCK_U)
        total = tl.max(ends, axis=0)
        for start in range(first_group * GROUP, total, groups * GROUP):
            # [GROUP]
            block = start + tl.arange(0, GROUP)
            exists = block < total
            u, first = locate(block, ends, total)
            slot = tl.load(union_tile + window + u, mask=exists, other=0)
            rank = tl.load(rank_ptr + slot, mask=exists, other=0)
            offset = tl.load(offset_ptr + slot, mask=exists, other=0)
            # [GROUP * RANK_BLOCK]
            row = tl.reshape((offset + first)[:, None] + offs_b[None, :], [GROUP * RANK_BLOCK])
            mask_r = tl.reshape((rank - first)[:, None] > offs_b[None, :], [GROUP * RANK_BLOCK])
            A_rows = A_ptr + row[:, None].to(tl.int64) * stride_ac + offs_k[None, :]
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
            if HAS_CONSTANT:
                constant = tl.load(constant_ptr + row, mask=mask_r, other=0) != 0
                acc = tl.where(constant[None, :], tl.where(pid_k == 0, 1.0, 0.0), acc)

            # [BLOCK_M, GROUP]
            place_rows = place_tile + (window + u)[None, :] * BLOCK_M
            place = tl.load(place_rows, mask=exists[None, :], other=-1).to(tl.int32)
            selects = place >= 0
            # Counted within the tile, 32 bits are enough for offsets, and half the registers.
            at = tile_m[:, None] * J + place
            # [BLOCK_M, GROUP, RANK_BLOCK]
            h = tl.reshape(acc, [BLOCK_M, GROUP, RANK_BLOCK])
            if HAS_STRENGTH:
                scaling = tl.load(scaling_ptr + slot, mask=exists, other=0.0)
                strength_tile = strength_ptr + pid_m * BLOCK_M * J
                strength = tl.load(strength_tile + at, mask=selects, other=0.0).to(tl.float32)
                h = h * (strength * scaling[None, :])[:, :, None]
            offs_h = (at * R + first[None, :])[:, :, None] + offs_b[None, None, :]
            tl.store(h_tile + offs_h, h, mask=selects[:, :, None])


@triton.jit(do_not_specialize=["M", "U"])
def shrink_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [C, stride_ac], zeros from K on
    h_ptr,  # [SPLIT_K, M, J, R] fp32, written where place points to
    strength_ptr,  # [M, J] floating
    union_ptr,  # [cdiv(M, BLOCK_M), U] int32
    length_ptr,  # [cdiv(M, BLOCK_M)] int32
    place_ptr,  # [cdiv(M, BLOCK_M), U, BLOCK_M] int16
    offset_ptr,  # [S] int32
    rank_ptr,  # [S] int32
    scaling_ptr,  # [S] fp32
    constant_ptr,  # [C] bool
    M,
    K,  # in units of X_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    stride_xm,  # in units of X_UNIT
    stride_ac,
    HAS_STRENGTH: tl.constexpr,  # else strength = scaling = 1
    HAS_CONSTANT: tl.constexpr,  # else no rank row is constant
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
        A_ptr,
        h_ptr,
        strength_ptr,
        union_ptr,
        length_ptr,
        place_ptr,
        offset_ptr,
        rank_ptr,
        scaling_ptr,
        constant_ptr,
        tl.program_id(0).to(tl.int64),
        tl.program_id(1),
        tl.num_programs(1),
        tl.program_id(2),
        M,
        K * X_UNIT,
        J,
        R,
        U,
        stride_xm * X_UNIT,
        stride_ac,
        HAS_STRENGTH,
        HAS_CONSTANT,
        BLOCK_M,
        BLOCK_U,
        GROUP,
        BLOCK_K,
        SPLIT_K,
        DOT_DTYPE,
    )
