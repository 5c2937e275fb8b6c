"""expand: y += B h, for all adapters of a row in one pass.

    y[m, n] += sum_i sum_r sum_s B[offset[i] + r, n] * h[m, j, r, s],    r < rank[i]

over the slots i of row m, where j is the first place of i in the row. A row to which nothing is
added keeps every bit. A row whose state is DEAD becomes NaN.
"""

import triton
import triton.language as tl

from .plan import BASE, DEAD
from .rank_blocks import RANK_BLOCK, WIDEST, Sizes, ask, find_blocks, find_places, rank_rows, search


@triton.jit
def product(acc, B, h, DOT_DTYPE: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] + B [R, BLOCK_N] transposed x h [R, BLOCK_M].

    With h on the right, wgmma takes it from shared memory. From registers, as its left operand,
    ptxas before 13.3 miscompiles it (triton #9433).
    """
    B = tl.trans(B.to(DOT_DTYPE))
    high = h.to(DOT_DTYPE)
    # What the rounding of h lost, so that y's is the only one; 0 where h overflowed. Before the
    # first product: both operands are then in shared memory behind one barrier.
    low = h - high.to(tl.float32)
    low = tl.where(tl.abs(low) < float("inf"), low, 0.0).to(DOT_DTYPE)
    acc = tl.dot(B, high, acc, input_precision="ieee")
    if DOT_DTYPE != tl.float32:
        acc = tl.dot(B, low, acc, input_precision="ieee")
    return acc


@triton.jit
def load_B(B_ptr, blocks, offs_n, stride_bc, GROUP: tl.constexpr, RANKS: tl.constexpr):
    """[GROUP * RANK_BLOCK, BLOCK_N]: rank rows of B, 0 past the ranks of their adapters."""
    row, own = rank_rows(blocks, GROUP)
    if RANKS:
        # [BLOCK_N, GROUP * RANK_BLOCK]: the ranks of a column lie side by side, and come eight by
        # eight. What comes past a rank is not put to 0 by a select: the left operand of the product
        # would be a computed one, which wgmma reads from registers.
        at = (row // RANKS).to(tl.int64) * stride_bc + row % RANKS
        at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
        eight = tl.arange(0, RANK_BLOCK) // 8 * 8
        some = tl.reshape(blocks.left[:, None] > eight[None, :], [GROUP * RANK_BLOCK])
        column = (offs_n * RANKS)[:, None]
        mask = tl.max_constancy(some, 8)[None, :] & (column < stride_bc)
        return tl.trans(tl.load(B_ptr + column + at[None, :], mask=mask, other=0.0))
    else:
        # Up to its stride: an odd N would end 16-byte loads.
        return tl.load(
            B_ptr + row[:, None].to(tl.int64) * stride_bc + offs_n[None, :],
            mask=own[:, None] & (offs_n < stride_bc)[None, :],
            other=0.0,
        )


@triton.jit
def expand_window(
    acc,
    changes,
    asked,
    window,  # of what was asked
    h_tile,
    B_ptr,
    sizes,
    offs_n,
    stride_bc,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANKS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """(acc, changes) after one window of the union; see expand_tile."""
    tile_m = tl.arange(0, BLOCK_M)
    offs_b, offs_s = tl.arange(0, RANK_BLOCK), tl.arange(0, SPLIT_K)
    # The first turn is not asked whether it exists: see shrink.
    start, left = tl.cast(0, tl.int32), tl.cast(1, tl.int32)
    while left > 0:
        blocks = find_blocks(start, window, BLOCK_U, GROUP)
        place = find_places(blocks, asked, BLOCK_M, BLOCK_U, GROUP).to(tl.int32)
        changes = changes | (tl.max(place, axis=1) >= 0)
        # [BLOCK_M, GROUP, RANK_BLOCK]; counted within the tile, 32 bits are enough for offsets
        offs_h = (tile_m[:, None] * sizes.J + place) * sizes.R + blocks.first[None, :]
        offs_h = (offs_h[:, :, None] + offs_b[None, None, :]) * SPLIT_K
        # One load for all parts of K, which a thread then sums by itself. Past the L1 cache: other
        # processors have just written it.
        h = tl.load(
            h_tile + offs_h[:, :, :, None] + offs_s[None, None, None, :],
            mask=(place >= 0)[:, :, None, None],
            other=0.0,
            cache_modifier=".cg",
        )
        # After h: the compiler waits for B where it is loaded.
        B = load_B(B_ptr, blocks, offs_n, stride_bc, GROUP, RANKS)
        h = tl.reshape(tl.sum(h, axis=3), [BLOCK_M, GROUP * RANK_BLOCK])
        acc = product(acc, B, tl.trans(h), DOT_DTYPE)
        start += GROUP
        left = window.total - start
    return acc, changes


@triton.jit
def expand_tile(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    asked,  # the first window of the tile's union
    window,  # and what was found in it
    h_ptr,
    plan,
    pool,
    sizes,
    pid_m,  # int64, the tile
    offs_n,  # [BLOCK_N]
    stride_bc,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANKS: tl.constexpr,  # as in expand_kernel
    DOT_DTYPE: tl.constexpr,
):
    """(acc + the transpose of B h, [BLOCK_M] whether a row has an adapter in this layer)."""
    h_tile = h_ptr + pid_m * BLOCK_M * sizes.J * sizes.R * SPLIT_K
    changes = tl.arange(0, BLOCK_M) < 0
    acc, changes = expand_window(
        *(acc, changes, asked, window, h_tile, pool.B_rows, sizes, offs_n, stride_bc),
        *(BLOCK_M, BLOCK_U, GROUP, SPLIT_K, RANKS, DOT_DTYPE),
    )
    if BLOCK_U == WIDEST:
        for at in range(BLOCK_U, asked.length, BLOCK_U):
            further = ask(plan, pool, sizes, pid_m, at, BLOCK_M, BLOCK_U, SLOTS)
            acc, changes = expand_window(
                *(acc, changes, further, search(further, BLOCK_U, SLOTS), h_tile, pool.B_rows),
                *(sizes, offs_n, stride_bc, BLOCK_M, BLOCK_U, GROUP, SPLIT_K, RANKS, DOT_DTYPE),
            )
    return acc, changes


@triton.jit(do_not_specialize=["M", "U", "S"])
def expand_kernel(
    h_ptr,  # [M, J, R, SPLIT_K] fp32
    y_ptr,  # [M, N], read and written
    plan,  # a Plan
    pool,  # a Pool
    M,
    N,  # in units of Y_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    S,  # slots of the pool
    stride_bc,
    stride_ym,  # in units of Y_UNIT
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, at least S; 0: too many to hold
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WALK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANKS: tl.constexpr,  # of a block of B by columns, stride_bc = N * RANKS; 0: B is row by row
    Y_UNIT: tl.constexpr,  # divides N and stride_ym: tells the compiler how wide it may load
    DOT_DTYPE: tl.constexpr,
):
    """One tile x WALK blocks of BLOCK_N columns: one read and one write of y, one rounding."""
    N *= Y_UNIT
    stride_ym *= Y_UNIT
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    sizes = Sizes(M, J, R, U, S)
    state = tl.load(plan.state + offs_m, mask=offs_m < M, other=BASE)
    asked = ask(plan, pool, sizes, pid_m, 0, BLOCK_M, BLOCK_U, SLOTS)
    window = search(asked, BLOCK_U, SLOTS)
    for w in tl.range(0, WALK, num_stages=1):
        offs_n = (tl.program_id(1) * WALK + w) * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_M, BLOCK_N]; asked for before the loop, which hides the wait, and converted after
        y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        mask_n = (offs_n < N)[None, :]
        y = tl.load(y_tile, mask=(state != BASE)[:, None] & mask_n, other=0.0)
        acc, changes = expand_tile(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
            *(asked, window, h_ptr, plan, pool, sizes, pid_m, offs_n, stride_bc),
            *(BLOCK_M, BLOCK_U, SLOTS, GROUP, SPLIT_K, RANKS, DOT_DTYPE),
        )
        y = tl.where((state == DEAD)[:, None], float("nan"), y.to(tl.float32)) + tl.trans(acc)
        mask_m = (changes | (state == DEAD))[:, None]
        tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)
