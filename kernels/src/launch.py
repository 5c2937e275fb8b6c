"""Launchers: grids, tiles and what the kernels return, from shapes alone.

Nothing here reads a tensor's values, so nothing syncs, and a CUDA graph that captured a launch
replays right for other values. All tensors are on one device, and inner strides are 1 unless a
docstring says otherwise.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from math import gcd
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sizes
from .config import (
    Architecture,
    Config,
    FusedConfig,
    TileSizes,
    nvidia_tensor_cores,
)
from .expand import expand_kernel
from .fused import fused_kernel
from .plan import plan_kernel
from .rank_blocks import RANK_BLOCK
from .ready import Layout, LinearAgain, PlanAgain, PlanNow, Ready
from .ready import launch as launched
from .shrink import shrink_kernel
from .tensors import STREAMS, Plan, Pool, empty_plan

P = ParamSpec("P")
T = TypeVar("T")

# Set by TRITON_INTERPRET=1 when triton was imported: kernels run on CPU tensors, slowly.
INTERPRETED = not isinstance(plan_kernel, triton.JITFunction)
# On ROCm a barrier does not wait for the stores of other waves, which fused launches count on.
FUSES = torch.version.hip is None
DOT_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """What tables of measured Configs are kept by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> Architecture:
    """What a choice of tiles depends on; the interpreter computes as on an H200."""
    if device.type != "cuda":
        return Architecture("wgmma", 132, 232448)
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    if torch.version.hip:
        return Architecture("mfma", processors, 65536)
    # Without the attribute, what the least of the GPUs with tensor cores has.
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return Architecture(nvidia_tensor_cores(capability(device)[0]), processors, shared)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; ROCm's numbers are larger than any that is asked for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """A launcher on the device of its first tensor: Triton launches on the current one."""

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        # By number: this takes 0.3 us in all, and `device.type` alone 0.9 us.
        first: Any = args[0]
        device: int = first.get_device()  # -1 on the CPU
        if device < 0 or device == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return launch


def plan(index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int) -> Plan:
    """The Plan of a batch; plan.py has the formulas. Arguments as of `plan_and_again`."""
    return plan_and_again(index, weight, live, capacity, block_m)[0]


@on_its_device
def plan_and_again(
    index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int
) -> tuple[Plan, PlanAgain | None]:
    """The Plan of a batch, and what makes the next one.

    Args:
        index: [M, J] int32 or int64, of any strides.
        weight: [M, J] floating, of any strides.
        live: [65536] int32, the handle of each slot's tenant, or -1.
        capacity: more than the slot of any adapter alive, now and while a graph is replayed.
        block_m: rows of a tile.
    """
    (M, J), made = index.shape, empty_plan(index, weight, capacity, block_m)
    if J == 0 or M == 0:
        for nothing in (made.length, made.state, made.counters):
            nothing.zero_()
        return made, None
    block_u, block_j, U = 16, sizes.power(J), made.union.shape[1]
    ready = launched(
        plan_kernel,
        (sizes.cdiv(M, block_m), sizes.cdiv(U, block_u)),
        index,
        weight,
        live,
        made,
        M=M,
        J=J,
        U=U,
        stride_im=index.stride(0),
        stride_ij=index.stride(1),
        stride_wm=weight.stride(0),
        stride_wj=weight.stride(1),
        BLOCK_M=block_m,
        BLOCK_J=block_j,
        BLOCK_U=block_u,
        # A sort of 4,096 numbers by four warps spills 104 bytes of registers.
        num_warps=8 if block_m * block_j > 2048 else 4,
    )
    return made, ready and PlanAgain(ready, Layout.of(made), PlanNow.of(made).case)


@on_its_device
def shrink(
    x: Tensor, h: Tensor, plan: Plan, pool: Pool, config: Config, weighted: bool = True
) -> Ready | None:
    """h [M, J, R, split_k] = strength * scaling * A_rows applied to x [M, K].

    Args:
        weighted: False takes 1 for strength and scaling.
    """
    exact = INTERPRETED or product_itemsize(x, pool.A_rows) == 2 or config.block_m < 64
    assert exact, "TF32 on sm_100"
    (M, K), (_, J, R, _), U, S = x.shape, h.shape, plan.union.shape[1], len(pool.rank)
    unit = sizes.unit(x)
    tiles = sizes.cdiv(M, config.block_m)
    # Until the machine is full twice.
    most = 2 * architecture(x.device).processors // (tiles * config.split_k)
    return launched(
        shrink_kernel,
        (tiles, sizes.groups(U, R, config, most), config.split_k),
        x,
        h,
        plan,
        pool,
        M=M,
        K=K // unit,
        J=J,
        R=R,
        U=U,
        S=S,
        stride_xm=x.stride(0) // unit,
        stride_ac=pool.A_rows.stride(0),
        WEIGHTED=weighted,
        BLOCK_M=config.block_m,
        BLOCK_U=sizes.window(U),
        SLOTS=sizes.slots(S),
        GROUP=config.shrink_group,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        X_UNIT=unit,
        DOT_DTYPE=dot_dtype(x, pool.A_rows),
        num_warps=config.shrink_warps,
        num_stages=sizes.stages(config.shrink_stages, unit * x.element_size()),
        **sizes.registers(config, unit),
    )


@on_its_device
def expand(h: Tensor, y: Tensor, plan: Plan, pool: Pool, config: Config) -> Ready | None:
    """y [M, N] += B_rows applied to h [M, J, R, split_k]."""
    (M, N), (_, J, R, _), U, S = y.shape, h.shape, plan.union.shape[1], len(pool.rank)
    block = pool.B_rows.shape[2] if pool.B_rows.dim() == 3 else 0
    assert not block or (block % 8 == 0 and pool.B_rows.is_contiguous()), "see Pool"
    unit = sizes.unit(y)
    return launched(
        expand_kernel,
        (sizes.cdiv(M, config.block_m), sizes.cdiv(N, config.block_n * config.walk)),
        h,
        y,
        plan,
        pool,
        M=M,
        N=N // unit,
        J=J,
        R=R,
        U=U,
        S=S,
        stride_bc=pool.B_rows.stride(0),
        stride_ym=y.stride(0) // unit,
        BLOCK_M=config.block_m,
        BLOCK_U=sizes.window(U),
        SLOTS=sizes.slots(S),
        GROUP=config.expand_group,
        BLOCK_N=config.block_n,
        WALK=config.walk,
        SPLIT_K=config.split_k,
        RANKS=block,
        Y_UNIT=unit,
        DOT_DTYPE=dot_dtype(y, pool.B_rows),
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
        **sizes.registers(config, unit),
    )


def linear(*arguments: Any) -> Tensor:
    """A new y [M, N] = x W^T + bias and the adapters of each row, as `linear_and_again`."""
    return linear_and_again(*arguments)[0]


@on_its_device
def linear_and_again(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    plan: Plan,
    pool: Pool,
    max_rank: int,
    stream: int,
    config: FusedConfig,
) -> tuple[Tensor, LinearAgain | None]:
    """A new y [M, N] = x W^T + bias and the adapters of each row, by the fused kernel.

    And what computes the next one.

    Args:
        x: [M, K], of at most config.block_m rows, which are one tile of the plan.
        W: [N, K].
        max_rank: at least every rank of the pool.
        stream: `stream_number` of the current stream.
    """
    assert len(x) <= config.block_m, "more than one tile"
    h = x.new_empty(h_shape(plan, max_rank, config), dtype=torch.float32)
    y = x.new_empty(x.shape[0], W.shape[0])
    (M, K), N, (_, J, R, splits) = x.shape, W.shape[0], h.shape
    U, S = plan.union.shape[1], len(pool.rank)
    x_unit, y_unit = gcd(sizes.unit(x), W.stride(0)), sizes.unit(y)
    # Until each processor has a program.
    groups = sizes.groups(U, R, config, architecture(x.device).processors // splits)
    ready = launched(
        fused_kernel,
        (groups * splits + sizes.cdiv(N, config.block_n),),
        x,
        W,
        bias,
        h,
        y,
        plan,
        pool,
        M=M,
        K=K // x_unit,
        N=N // y_unit,
        J=J,
        R=R,
        U=U,
        S=S,
        stream_number=stream,
        groups=groups,
        stride_xm=x.stride(0) // x_unit,
        stride_wn=W.stride(0) // x_unit,
        stride_ac=pool.A_rows.stride(0),
        stride_bc=pool.B_rows.stride(0),
        stride_ym=y.stride(0) // y_unit,
        PREFETCHES=FUSES and not INTERPRETED,  # by NVIDIA's assembly
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_U=sizes.window(U),
        SLOTS=sizes.slots(S),
        SHRINK_GROUP=config.shrink_group,
        EXPAND_GROUP=config.expand_group,
        SPLIT_K=splits,
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        DOT_DTYPE=dot_dtype(x, W, pool.A_rows, pool.B_rows, y),
        num_warps=config.warps,
        num_stages=config.stages,
        **sizes.registers(config, min(x_unit, y_unit)),
    )
    return y, ready and LinearAgain(tuple(h.shape), tuple(y.shape), ready)


# Fused launches of one stream follow one another, so they can share a pair of counters; those of
# two streams may overlap. Global, because streams belong to the process and operators are functions
# of tensors, which have nowhere to keep a number. No number is given to a second handle. A new
# stream may have the handle of one that is gone, and then its number, which nothing else uses.
_STREAMS: dict[int, int] = {}  # a stream's handle -> its number
_NUMBERING = Lock()


def stream_number(device: torch.device) -> int | None:
    """The row of Plan.counters for the current stream; None when STREAMS others had one before."""
    handle = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    number = _STREAMS.get(handle)
    if number is None:
        with _NUMBERING:
            number = _STREAMS.setdefault(handle, len(_STREAMS))
    return number if number < STREAMS else None


def h_shape(plan: Plan, max_rank: int, config: TileSizes) -> tuple[int, int, int, int]:
    """[M, J, R, split_k]; R is `max_rank`, at least every rank, rounded up to whole blocks."""
    blocks = max(1, sizes.cdiv(max_rank, RANK_BLOCK.value))
    # Where an adapter's blocks begin in a window, and its rank, are 16 bits of rank_blocks.search.
    assert blocks * sizes.window(plan.union.shape[1]) < 1 << 16, "ranks are too large"
    return *plan.slots.shape, blocks * RANK_BLOCK.value, config.split_k


def product_itemsize(*tensors: Tensor) -> int:
    """Bytes of an element of the products: 2 when all tensors share a 16-bit type."""
    (dtype, *others) = {tensor.dtype for tensor in tensors}
    return 2 if dtype in DOT_DTYPES and not others else 4


def dot_dtype(*tensors: Tensor) -> tl.dtype:
    """Tensor cores for 16-bit types; everything else is multiplied in fp32."""
    return DOT_DTYPES[tensors[0].dtype] if product_itemsize(*tensors) == 2 else tl.float32
