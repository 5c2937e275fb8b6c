"""fused: a linear layer and its adapters in one launch, y written once.

    y[m, n] = sum_k W[n, k] x[m, k] + bias[n] + sum_i sum_r B[offset[i] + r, n] * h[m, j, r]

with h as in shrink.py, for a few rows, which are one tile. The first programs of the grid compute h
and count themselves. Every other one computes a tile of W x, waits for that count only then, and
adds B h before its single store. kernels/README.md says why waiting ends and why h is seen.
"""

import triton
import triton.language as tl

from .expand import expand_tile
from .plan import BASE, COUNTERS, DEAD
from .rank_blocks import Sizes, ask, find_blocks, rank_rows, search
from .shrink import shrink_tile


@triton.jit
def leave(counter_ptr):
    """Count a program out; the last one sets the counters back for the next launch."""
    left = tl.atomic_add(counter_ptr + 1, 1)
    if left == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


@triton.jit
def await_shrinks(counter_ptr, programs):
    """Return once all `programs` of shrink have stored their h."""
    done = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while done < programs:
        done = tl.atomic_add(counter_ptr, 0, sem="acquire")


@triton.jit
def prefetch(
    window,
    B_ptr,
    n,
    stride_bc,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Have the first rows of B that a tile needs, from column n on, come to the L2 cache.

    Nothing waits for it. A load would be waited for where its values are brought into shared
    memory, which is before h is asked for.
    """
    blocks = find_blocks(0, window, BLOCK_U, GROUP)
    row, mask_r = rank_rows(blocks, GROUP)
    rows = B_ptr + tl.where(mask_r, row, 0).to(tl.int64) * stride_bc
    for line in tl.static_range(0, BLOCK_N, 64):  # of 128 bytes
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(rows + tl.minimum(n + line, stride_bc - 1)).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def base_tile(
    x_ptr,
    W_ptr,
    offs_m,  # [BLOCK_M] int64
    offs_n,  # [BLOCK_N]
    M,
    K,
    N,
    stride_xm,
    stride_wn,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """W x transposed, [BLOCK_N, BLOCK_M]: 64 columns fill a wgmma, few rows do not."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_rows = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    W_rows = W_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :]
    acc = tl.zeros((offs_n.shape[0], offs_m.shape[0]), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = (k + offs_k < K)[None, :]
        W = tl.load(W_rows + k, mask=mask_n[:, None] & mask_k, other=0.0)
        x = tl.load(x_rows + k, mask=mask_m[:, None] & mask_k, other=0.0)
        acc = tl.dot(W.to(DOT_DTYPE), tl.trans(x.to(DOT_DTYPE)), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "U", "S", "groups", "stream_number"])
def fused_kernel(
    x_ptr,  # [M, K]
    W_ptr,  # [N, K]
    bias_ptr,  # [N], or None
    h_ptr,  # [M, J, R, SPLIT_K] fp32
    y_ptr,  # [M, N], written
    plan,  # a Plan
    pool,  # a Pool
    M,  # at most BLOCK_M
    K,  # in units of X_UNIT
    N,  # in units of Y_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    S,  # slots of the pool
    stream_number,  # whose counters are used: zero before and after
    groups,  # programs of shrink for each split
    stride_xm,  # in units of X_UNIT
    stride_wn,  # in units of X_UNIT
    stride_ac,
    stride_bc,
    stride_ym,  # in units of Y_UNIT
    PREFETCHES: tl.constexpr,  # not in the interpreter, which runs no assembly
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, at least S; 0: too many to hold
    SHRINK_GROUP: tl.constexpr,
    EXPAND_GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,  # of h
    X_UNIT: tl.constexpr,  # divides K, stride_xm and stride_wn
    Y_UNIT: tl.constexpr,  # divides N and stride_ym
    DOT_DTYPE: tl.constexpr,
):
    """groups * SPLIT_K programs of shrink, then one for each BLOCK_N columns."""
    K *= X_UNIT
    stride_xm *= X_UNIT
    stride_wn *= X_UNIT
    N *= Y_UNIT
    stride_ym *= Y_UNIT
    sizes = Sizes(M, J, R, U, S)
    pid, tile = tl.program_id(0), tl.cast(0, tl.int64)
    shrinks = groups * SPLIT_K
    counter_ptr = plan.counters + stream_number * COUNTERS
    if pid < shrinks:
        shrink_tile(
            *(x_ptr, h_ptr, plan, pool, sizes, tile, pid % groups, groups, pid // groups),
            *(K, stride_xm, stride_ac),
            *(True, BLOCK_M, BLOCK_U, SLOTS, SHRINK_GROUP, BLOCK_K, SPLIT_K, DOT_DTYPE),
        )
        tl.debug_barrier()  # the count is one thread's: all have stored before
        tl.atomic_add(counter_ptr, 1, sem="release")
    else:
        first_n = (pid - shrinks) * BLOCK_N
        offs_m, offs_n = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N
        # The tables are of an earlier launch: all of this is there long before it is wanted.
        asked = ask(plan, pool, sizes, tile, 0, BLOCK_M, BLOCK_U, SLOTS)
        state = tl.load(plan.state + offs_m, mask=mask_m, other=BASE)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        acc = base_tile(
            x_ptr, W_ptr, offs_m, offs_n, M, K, N, stride_xm, stride_wn, BLOCK_K, DOT_DTYPE
        )
        if bias_ptr is not None:
            acc += bias.to(tl.float32)[:, None]
        # Not before the loop, where it would keep W waiting: that took 1 to 3 % more on an H100.
        window = search(asked, BLOCK_U, SLOTS)
        if PREFETCHES:
            prefetch(window, pool.B_rows, first_n, stride_bc, BLOCK_N, BLOCK_U, EXPAND_GROUP)
        if asked.length > 0:
            await_shrinks(counter_ptr, shrinks)
        acc, _ = expand_tile(
            *(acc, asked, window, h_ptr, plan, pool, sizes, tile, offs_n, stride_bc),
            *(BLOCK_M, BLOCK_U, SLOTS, EXPAND_GROUP, SPLIT_K, 0, DOT_DTYPE),
        )
        acc = tl.where((state == DEAD)[None, :], float("nan"), acc)
        y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        y = tl.trans(acc).to(y_ptr.dtype.element_ty)
        tl.store(y_tile, y, mask=mask_m[:, None] & mask_n[None, :])
    leave(counter_ptr)
