"""expand: y += B h, all adapters of a row in one pass.

    y[m, n] += sum_i sum_r sum_s B[offset[i] + r, n] * h[s, m, j, r],    r < rank[i]

over the slots i of row m, with j the first place of i in the row. A row that adds nothing here
keeps every bit; a row that named a handle that is not alive becomes NaN.
"""

import triton
import triton.language as tl

from .rank_blocks import RANK_BLOCK, block_ends, locate


@triton.jit
def expand_tile(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    h_ptr,
    B_ptr,
    union_ptr,
    length_ptr,
    place_ptr,
    offset_ptr,
    rank_ptr,
    pid_m,  # int64, the tile
    offs_n,  # [BLOCK_N]
    M,
    J,
    R,
    U,
    stride_bc,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """(acc + B h transposed, [BLOCK_M] whether a row has an adapter here).

    With h on the right, wgmma takes it from shared memory. From registers, as its left operand,
    ptxas before 13.3 miscompiles it (triton #9433).
    """
    tile_m = tl.arange(0, BLOCK_M)
    offs_b = tl.arange(0, RANK_BLOCK)
    changes = tile_m < 0
    plane = tl.cast(M, tl.int64) * J * R
    h_tile = h_ptr + pid_m * BLOCK_M * J * R
    union_tile = union_ptr + pid_m * U
    place_tile = place_ptr + pid_m * U * BLOCK_M + tile_m[:, None]
    length = tl.load(length_ptr + pid_m)
    for window in range(0, length, BLOCK_U):
        ends = block_ends(union_tile + window, length - window, rank_ptr, BLOCK_U)
        total = tl.max(ends, axis=0)
        for start in range(0, total, GROUP):
            # [GROUP]
            block = start + tl.arange(0, GROUP)
            exists = block < total
            u, first = locate(block, ends, total)
            slot = tl.load(union_tile + window + u, mask=exists, other=0)
            rank = tl.load(rank_ptr + slot, mask=exists, other=0)
            offset = tl.load(offset_ptr + slot, mask=exists, other=0)
            # [BLOCK_M, GROUP]
            place_rows = place_tile + (window + u)[None, :] * BLOCK_M
            place = tl.load(place_rows, mask=exists[None, :], other=-1).to(tl.int32)
            changes = changes | (tl.max(place, axis=1) >= 0)
            # [BLOCK_M, GROUP, RANK_BLOCK]; counted within the tile, 32 bits are enough for offsets
            offs_h = (tile_m[:, None] * J + place) * R + first[None, :]
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
            # [GROUP * RANK_BLOCK, BLOCK_N]; up to its stride: an odd N would end 16-byte loads
            row = tl.reshape((offset + first)[:, None] + offs_b[None, :], [GROUP * RANK_BLOCK])
            mask_r = tl.reshape((rank - first)[:, None] > offs_b[None, :], [GROUP * RANK_BLOCK])
            B = tl.load(
                B_ptr + row[:, None].to(tl.int64) * stride_bc + offs_n[None, :],
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
    B_ptr,  # [C, stride_bc], zeros from N on
    y_ptr,  # [M, N], read and written
    union_ptr,  # [cdiv(M, BLOCK_M), U] int32
    length_ptr,  # [cdiv(M, BLOCK_M)] int32
    place_ptr,  # [cdiv(M, BLOCK_M), U, BLOCK_M] int16
    state_ptr,  # [M] int8
    offset_ptr,  # [S] int32
    rank_ptr,  # [S] int32
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
    state = tl.load(state_ptr + offs_m, mask=offs_m < M, other=0)
    # [BLOCK_M, BLOCK_N]; asked for before the loop, which hides the wait
    y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask_n = (offs_n < N)[None, :]
    y = tl.load(y_tile, mask=(state != 0)[:, None] & mask_n, other=0.0).to(tl.float32)
    y = tl.where((state == 2)[:, None], float("nan"), y)
    acc, changes = expand_tile(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
        h_ptr,
        B_ptr,
        union_ptr,
        length_ptr,
        place_ptr,
        offset_ptr,
        rank_ptr,
        pid_m,
        offs_n,
        M,
        J,
        R,
        U,
        stride_bc,
        BLOCK_M,
        BLOCK_U,
        GROUP,
        BLOCK_N,
        SPLIT_K,
        DOT_DTYPE,
    )
    y += tl.trans(acc)
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=(changes | (state == 2))[:, None] & mask_n)
