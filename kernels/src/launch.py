"""Launchers: outputs, grids and tiles of the kernels, from shapes alone.

Nothing here reads a tensor's values, so nothing syncs, and a CUDA graph that captured a launch
replays right for other values. Tensors are on one device, inner strides are 1 unless said.
"""

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Architecture, Config, FusedConfig
from .expand import expand_kernel
from .fused import fused_kernel
from .plan import plan_kernel
from .rank_blocks import RANK_BLOCK
from .shrink import shrink_kernel

# Set by TRITON_INTERPRET=1 when triton was imported: kernels run on CPU tensors, slowly.
INTERPRETED = not isinstance(plan_kernel, triton.JITFunction)
# On ROCm a barrier does not wait for the stores of other waves, which fused launches count on.
FUSES = torch.version.hip is None
DOT_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Windows of a union: a search over more of it at once would not fit the registers.
UNION_WINDOW = 64
# Streams that fused launches of one forward pass may be on, each with 16 bytes of counters.
STREAMS = 64


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """What tables of measured Configs are kept by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> Architecture:
    """The one place that asks a device what it is."""
    if device.type != "cuda":
        return Architecture("sm_90", 132)  # the interpreter computes as on an H200
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Architecture(name, properties.multi_processor_count)


def plan(
    index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(slots, strength, union, length, place, state, counters) of a batch; plan.py says what of.

    Args:
        index: [M, J] int32 or int64, of any strides.
        weight: [M, J] floating, of any strides.
        live: [65536] int32, the handle of each slot's tenant, or -1.
        capacity: more than the slot of any adapter alive, now and while a graph is replayed.
        block_m: rows of a tile.
    """
    M, J = index.shape
    # One tile more than there are: lora_mux.tiles.shapes says why.
    T, U = triton.cdiv(M, block_m) + 1, max(1, min(block_m * J, capacity))
    slots = index.new_empty((M, J), dtype=torch.int32)
    strength = weight.new_empty((M, J), dtype=torch.promote_types(weight.dtype, torch.float32))
    union = index.new_empty((T, U), dtype=torch.int32)
    length = index.new_empty(T, dtype=torch.int32)
    place = index.new_empty((T, U, block_m), dtype=torch.int16)
    state = index.new_empty(M, dtype=torch.int8)
    counters = index.new_empty((STREAMS, 4), dtype=torch.int32)
    if J == 0 or M == 0:
        for nothing in (length, state, counters):
            nothing.zero_()
    else:
        block_u, block_j = 16, triton.next_power_of_2(J)
        plan_kernel[(T - 1, triton.cdiv(U, block_u))](
            index,
            weight,
            live,
            slots,
            strength,
            union,
            length,
            place,
            state,
            counters,
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
            COUNTERS=counters.numel(),
            # A sort of 4,096 numbers by four warps spills 104 bytes of registers.
            num_warps=8 if block_m * block_j > 2048 else 4,
        )
    return slots, strength, union, length, place, state, counters


def shrink(
    x: Tensor,
    A_rows: Tensor,
    h: Tensor,
    strength: Tensor | None,
    union: Tensor,
    length: Tensor,
    place: Tensor,
    offset: Tensor,
    rank: Tensor,
    scaling: Tensor,
    constant: Tensor | None,
    config: Config,
) -> None:
    """h [split_k, M, J, R] = A_rows [C, at least K, zeros from there on] applied to x [M, K].

    Args:
        strength: [M, J]; None: strength and scaling length 1.
        constant: [C] bool, the rank rows whose h is 1 in the place of A x; None: no row.
    """
    exact = INTERPRETED or product_itemsize(x, A_rows) == 2 or config.block_m < 64
    assert exact, "TF32 on sm_100"
    (M, K), (_, _, J, R), U = x.shape, h.shape, union.shape[1]
    unit = _unit(x)
    tiles = triton.cdiv(M, config.block_m)
    # Programs for every group of blocks there may be, until the machine is full twice.
    groups = triton.cdiv(U * (R // RANK_BLOCK.value), config.shrink_group)
    fill = 2 * architecture(x.device).processors // (tiles * config.split_k)
    shrink_kernel[(tiles, min(groups, max(1, fill)), config.split_k)](
        x,
        A_rows,
        h,
        strength,
        union,
        length,
        place,
        offset,
        rank,
        scaling,
        constant,
        M=M,
        K=K // unit,
        J=J,
        R=R,
        U=U,
        stride_xm=x.stride(0) // unit,
        stride_ac=A_rows.stride(0),
        HAS_STRENGTH=strength is not None,
        HAS_CONSTANT=constant is not None,
        BLOCK_M=config.block_m,
        BLOCK_U=_window(U),
        GROUP=config.shrink_group,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        X_UNIT=unit,
        DOT_DTYPE=_dot_dtype(x, A_rows),
        num_warps=config.shrink_warps,
        num_stages=config.shrink_stages,
        **_registers(config, unit),
    )


def expand(
    h: Tensor,
    B_rows: Tensor,
    y: Tensor,
    union: Tensor,
    length: Tensor,
    place: Tensor,
    state: Tensor,
    offset: Tensor,
    rank: Tensor,
    config: Config,
) -> None:
    """y [M, N] += B_rows [C, at least N, zeros from there on] applied to h [split_k, M, J, R]."""
    (M, N), (_, _, J, R), U = y.shape, h.shape, union.shape[1]
    unit = _unit(y)
    expand_kernel[(triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n))](
        h,
        B_rows,
        y,
        union,
        length,
        place,
        state,
        offset,
        rank,
        M=M,
        N=N // unit,
        J=J,
        R=R,
        U=U,
        stride_bc=B_rows.stride(0),
        stride_ym=y.stride(0) // unit,
        BLOCK_M=config.block_m,
        BLOCK_U=_window(U),
        GROUP=config.expand_group,
        BLOCK_N=config.block_n,
        SPLIT_K=config.split_k,
        Y_UNIT=unit,
        DOT_DTYPE=_dot_dtype(y, B_rows),
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
        **_registers(config, unit),
    )


def fused(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A_rows: Tensor,
    B_rows: Tensor,
    h: Tensor,
    y: Tensor,
    strength: Tensor,
    union: Tensor,
    length: Tensor,
    place: Tensor,
    state: Tensor,
    offset: Tensor,
    rank: Tensor,
    scaling: Tensor,
    constant: Tensor,
    counter: Tensor,
    config: FusedConfig,
    shrinks: bool,
) -> None:
    """y [M, N] = x W^T + bias and the adapters of each row, in one launch.

    Args:
        W: [N, K].
        counter: [2] int32 zeros, of which this launch is the only user while it runs.
        shrinks: this launch computes h as well; else it is there, from `shrink`.
    """
    (M, K), N, (splits, _, J, R), U = x.shape, W.shape[0], h.shape, union.shape[1]
    x_unit, y_unit = gcd(_unit(x), W.stride(0)), _unit(y)
    tiles, columns = triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)
    # As many as there may be groups of blocks, until each processor has a program.
    groups = triton.cdiv(U * (R // RANK_BLOCK.value), config.shrink_group)
    groups = min(groups, max(1, architecture(x.device).processors // (tiles * splits)))
    fused_kernel[(tiles * (groups * splits * shrinks + columns),)](
        x,
        W,
        bias,
        A_rows,
        B_rows,
        h,
        y,
        strength,
        union,
        length,
        place,
        state,
        offset,
        rank,
        scaling,
        constant,
        counter,
        M=M,
        K=K // x_unit,
        N=N // y_unit,
        J=J,
        R=R,
        U=U,
        groups=groups,
        stride_xm=x.stride(0) // x_unit,
        stride_wn=W.stride(0) // x_unit,
        stride_ac=A_rows.stride(0),
        stride_bc=B_rows.stride(0),
        stride_ym=y.stride(0) // y_unit,
        SHRINKS=shrinks,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_U=_window(U),
        SHRINK_GROUP=config.shrink_group,
        EXPAND_GROUP=config.expand_group,
        SPLIT_K=splits,
        SWIZZLE=config.swizzle,
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        DOT_DTYPE=_dot_dtype(x, W, A_rows, B_rows, y),
        num_warps=config.warps,
        num_stages=config.stages,
        **_registers(config, min(x_unit, y_unit)),
    )


def linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A_rows: Tensor,
    B_rows: Tensor,
    strength: Tensor,
    union: Tensor,
    length: Tensor,
    place: Tensor,
    state: Tensor,
    offset: Tensor,
    rank: Tensor,
    scaling: Tensor,
    constant: Tensor,
    counter: Tensor,
    max_rank: int,
    config: FusedConfig,
    before: Config | None,
) -> Tensor:
    """A new y [M, N], by `fused`; the arguments are its own.

    Args:
        max_rank: at least every rank of the pool.
        before: of a `shrink` that goes before; None: the fused launch shrinks as well.
    """
    y = x.new_empty(x.shape[0], W.shape[0])
    h = x.new_empty(h_shape(strength, max_rank, before or config), dtype=torch.float32)
    tables = offset, rank, scaling, constant
    if before is not None:
        shrink(x, A_rows, h, strength, union, length, place, *tables, before)
    fused(
        *(x, W, bias, A_rows, B_rows, h, y, strength, union, length, place, state),
        *(*tables, counter, config, before is None),
    )
    return y


_STREAMS: dict[int, int] = {}  # a stream's handle -> its place among the counters


def own_counter(counters: Tensor) -> Tensor | None:
    """The counters [2] of the current stream; None when more than STREAMS were ever in use.

    Launches of one stream follow one another, so that they can share. Those of two may overlap.
    """
    handle = torch.cuda.current_stream(counters.device).cuda_stream if counters.is_cuda else 0
    place = _STREAMS.setdefault(handle, len(_STREAMS))
    return counters[place, :2] if place < STREAMS else None


def h_shape(
    selected: Tensor, max_rank: int, config: Config | FusedConfig
) -> tuple[int, int, int, int]:
    """[split_k, M, J, R] of `selected` [M, J]; R is `max_rank`, at least every rank, in blocks."""
    blocks = max(1, triton.cdiv(max_rank, RANK_BLOCK.value))
    return config.split_k, selected.shape[0], selected.shape[1], blocks * RANK_BLOCK.value


def product_itemsize(*tensors: Tensor) -> int:
    """Bytes of an element of the products: 2 when all tensors share a 16-bit type."""
    (dtype, *others) = {tensor.dtype for tensor in tensors}
    return 2 if dtype in DOT_DTYPES and not others else 4


def _dot_dtype(*tensors: Tensor) -> tl.dtype:
    """Tensor cores for 16-bit types; everything else is multiplied in fp32."""
    return DOT_DTYPES[tensors[0].dtype] if product_itemsize(*tensors) == 2 else tl.float32


def _unit(tensor: Tensor) -> int:
    """The largest power of two, up to 16, that divides the columns and the row stride."""
    return gcd(tensor.shape[1], tensor.stride(0), 16)


def _registers(config: Config | FusedConfig, unit: int) -> dict[str, int]:
    """A limit for the compiler; only NVIDIA's knows the option.

    Rows that are read by the element need more: as many as there are.
    """
    if config.registers is None:
        return {}
    return {"maxnreg": config.registers if unit >= 8 else 255}


def _window(U: int) -> int:
    window: int = triton.next_power_of_2(U)
    return min(UNION_WINDOW, max(16, window))
