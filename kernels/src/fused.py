"""fused: a linear layer and its adapters in one launch, y written once.

    y[m, n] = sum_k W[n, k] x[m, k] + bias[n] + sum_i sum_r B[offset[i] + r, n] * h[m, j, r]

with h as in shrink.py. The first programs of the grid compute h and count themselves. Every other
one computes a tile of W x, waits for that count only then, and adds B h before its single store.
kernels/README.md says why waiting ends and why h is seen.
"""

import triton
import triton.language as tl

from .expand import expand_tile
from .plan import BASE, COUNTERS, DEAD
from .rank_blocks import Sizes
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
def tile_of(pid, tiles, columns, SWIZZLE: tl.constexpr):
    """(row tile, column block) of a base program: SWIZZLE row tiles share each block of W.

    They run at about the same time, so W comes from memory once and then from the L2 cache.
    """
    first = pid // (SWIZZLE * columns) * SWIZZLE
    group = tl.minimum(tiles - first, SWIZZLE)
    within = pid % (SWIZZLE * columns)
    return (first + within % group).to(tl.int64), within // group


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


@triton.jit(do_not_specialize=["M", "U", "groups", "stream_number"])
def fused_kernel(
    x_ptr,  # [M, K]
    W_ptr,  # [N, K]
    bias_ptr,  # [N], or None
    h_ptr,  # [SPLIT_K, M, J, R] fp32
    y_ptr,  # [M, N], written
    plan,  # a Plan
    pool,  # a Pool
    M,
    K,  # in units of X_UNIT
    N,  # in units of Y_UNIT
    J,
    R,  # a multiple of RANK_BLOCK, at least every rank
    U,
    stream_number,  # whose counters are used: zero before and after
    groups,  # programs of shrink for each tile and split
    stride_xm,  # in units of X_UNIT
    stride_wn,  # in units of X_UNIT
    stride_ac,
    stride_bc,
    stride_ym,  # in units of Y_UNIT
    SHRINKS: tl.constexpr,  # else h is there already
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SHRINK_GROUP: tl.constexpr,
    EXPAND_GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,  # of h
    SWIZZLE: tl.constexpr,
    X_UNIT: tl.constexpr,  # divides K, stride_xm and stride_wn
    Y_UNIT: tl.constexpr,  # divides N and stride_ym
    DOT_DTYPE: tl.constexpr,
):
    """tiles * groups * SPLIT_K programs of shrink, then one for each tile x BLOCK_N columns."""
    K *= X_UNIT
    stride_xm *= X_UNIT
    stride_wn *= X_UNIT
    N *= Y_UNIT
    stride_ym *= Y_UNIT
    sizes = Sizes(M, J, R, U)
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M)
    shrinks = tiles * groups * SPLIT_K if SHRINKS else 0
    counter_ptr = plan.counters + stream_number * COUNTERS
    if pid < shrinks:
        shrink_tile(
            x_ptr,
            h_ptr,
            plan,
            pool,
            sizes,
            (pid % tiles).to(tl.int64),
            pid // tiles % groups,
            groups,
            pid // (tiles * groups),
            K,
            stride_xm,
            stride_ac,
            True,
            BLOCK_M,
            BLOCK_U,
            SHRINK_GROUP,
            BLOCK_K,
            SPLIT_K,
            DOT_DTYPE,
        )
        tl.debug_barrier()  # the count is one thread's: all have stored before
        tl.atomic_add(counter_ptr, 1, sem="release")
        leave(counter_ptr)
    else:
        pid_m, pid_n = tile_of(pid - shrinks, tiles, tl.cdiv(N, BLOCK_N), SWIZZLE)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N
        acc = base_tile(
            x_ptr, W_ptr, offs_m, offs_n, M, K, N, stride_xm, stride_wn, BLOCK_K, DOT_DTYPE
        )
        if SHRINKS:
            if tl.load(plan.length + pid_m) > 0:
                await_shrinks(counter_ptr, shrinks)
            leave(counter_ptr)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        acc, _ = expand_tile(
            acc,
            h_ptr,
            plan,
            pool,
            sizes,
            pid_m,
            offs_n,
            stride_bc,
            BLOCK_M,
            BLOCK_U,
            EXPAND_GROUP,
            SPLIT_K,
            DOT_DTYPE,
        )
        state = tl.load(plan.state + offs_m, mask=mask_m, other=BASE)
        acc = tl.where((state == DEAD)[None, :], float("nan"), acc)
        y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        y = tl.trans(acc).to(y_ptr.dtype.element_ty)
        tl.store(y_tile, y, mask=mask_m[:, None] & mask_n[None, :])
