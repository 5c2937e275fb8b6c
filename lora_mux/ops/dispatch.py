"""One door to the backends: plan once per forward pass, then add the adapters to each layer's y.

"reference" runs everywhere. "triton" runs `lora_mux.kernels` on CUDA and ROCm, and on the CPU when
TRITON_INTERPRET=1 is set, slowly, to try the kernels without a GPU. "auto" means Triton where it
can run, `grouped` on the CPU, and the reference elsewhere and where autograd follows; what was
asked for by name never falls back.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..core import Pool, Routing, Slots
from ..errors import BackendError
from . import cpu as grouped
from . import operators, reference, tuned
from . import plan_in_torch as tiles
from .cpu import HostPlan

Backend: TypeAlias = Literal["auto", "triton", "reference"]
Fused: TypeAlias = Literal["auto"] | bool

HOST = "batched products on the CPU, reference elsewhere"
OLDEST_TRITON = "3.6"  # that the kernels were compiled and checked with; 3.2 lacks tl.gather
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Settings:
    """How a layer computes its adapters.

    Raises:
        BackendError: a backend that does not exist, or that can never run here.
    """

    backend: Backend = "auto"
    batch_invariant: bool = False  # a row's bits do not depend on the batch around it
    fused: Fused = "auto"  # base and adapters in one launch

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "triton", "reference"):
            raise BackendError(
                f"`backend` must be 'auto', 'triton' or 'reference', got {self.backend!r}"
            )
        if not (self.fused == "auto" or isinstance(self.fused, bool)):
            raise BackendError(f"`fused` must be 'auto', True or False, got {self.fused!r}")
        if self.fused is True and (self.batch_invariant or self.backend == "reference"):
            got = "batch_invariant=True" if self.batch_invariant else "backend='reference'"
            raise BackendError(
                f"`fused` must be 'auto' or False with {got}, got True: it is a Triton kernel "
                "whose tiles depend on the batch"
            )
        if self.backend == "triton" or self.fused is True:
            asked = "`fused` True" if self.fused is True else "`backend` 'triton'"
            problem = _triton_problem()
            if problem:
                raise BackendError(
                    f"{asked} needs triton {OLDEST_TRITON} or newer, {problem}; "
                    "use 'auto' or 'reference'"
                )
            if not (_interpreted() or torch.cuda.is_available()):
                raise BackendError(
                    f"{asked} needs a CUDA or ROCm GPU, and torch sees none; use 'auto' "
                    "or 'reference', or set TRITON_INTERPRET=1 before Python starts to try the "
                    "kernels on the CPU"
                )
            if self.fused is True and not _can_fuse():
                raise BackendError(
                    "`fused` must be 'auto' or False on ROCm, got True; see kernels/README.md"
                )


class Method(NamedTuple):
    """How the adapters of one layer are added; layers with the same method share a plan."""

    operators: bool  # else on the host, which checks the index
    triton: bool = False
    block_m: int = 0  # rows of a tile
    batch_invariant: bool = False
    grouped: bool = False  # the CPU's fast form
    fused: bool = False  # with the base layer, in one launch


REFERENCE, GROUPED = Method(operators=False), Method(operators=False, grouped=True)


class TiledPlan(NamedTuple):
    """A plan for the operators."""

    tensors: operators.Plan
    method: Method


Plan: TypeAlias = TiledPlan | HostPlan | reference.Plan


@functools.cache
def _triton_problem() -> str:
    """Why the kernels can not be compiled with the triton that is installed; "" when they can."""
    if importlib.util.find_spec("triton") is None:
        return "which is not installed"
    import triton

    installed: str = triton.__version__
    numbers = [int(number) for number in installed.split(".")[:2]]
    oldest = [int(number) for number in OLDEST_TRITON.split(".")]
    return f"got {installed}" if numbers < oldest else ""


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    from ..kernels import launch

    return launch.INTERPRETED


def _can_fuse() -> bool:
    from ..kernels import launch

    return launch.FUSES


def method(
    settings: Settings, x: Tensor, rows: int, pool: Pool, weight: Tensor | None = None
) -> Method:
    """How adapters are added for a layer's input x of that many rows.

    Args:
        weight: of a base layer that is x W^T + bias and no more, and that autograd does not
            follow; None = any other.

    Raises:
        BackendError: Triton was asked for by name, and can not run on x.
    """
    compiling = torch.compiler.is_compiling()
    if settings.backend == "auto" and x.device.type == "cpu" and not compiling:
        return GROUPED
    triton = _runs_triton(settings.backend, x, pool.A_rows.dtype)
    if not triton and not compiling:
        return REFERENCE
    from ..kernels.config import fused_tile_rows, tile_rows

    # Under autocast the base may answer in another dtype, and then products are fp32.
    half = x.dtype == pool.A_rows.dtype and x.element_size() == 2
    itemsize = 2 if half and not torch.is_autocast_enabled(x.device.type) else 4
    if triton and itemsize == 2 and weight is not None and weight.dtype == x.dtype:
        if _fuses(settings, x, rows, pool, weight):
            return Method(True, True, fused_tile_rows(rows), fused=True)
    block_m = tile_rows(rows, itemsize, settings.batch_invariant)
    return Method(True, triton, block_m, settings.batch_invariant)


def _fuses(settings: Settings, x: Tensor, rows: int, pool: Pool, weight: Tensor) -> bool:
    """Whether one launch is asked for, or was measured to be faster."""
    N, K = weight.shape
    if N % 8 or K % 8 or weight.stride(0) % 8:
        return False  # rows that are not loaded by 16 bytes: slow, and its registers spill
    if settings.fused != "auto" or settings.batch_invariant or torch.compiler.is_compiling():
        return settings.fused is True
    if not _can_fuse():
        return False
    from ..kernels import launch

    case = tuned.Case(max(1, rows), K, N, max(1, pool.max_rank), 1, x.element_size())
    return tuned.fuses(launch.device_name(x.device), case)


def _runs_triton(backend: Backend, x: Tensor, pool: torch.dtype) -> bool:
    if backend == "reference":
        return False
    fits = x.dtype in TRITON_DTYPES and pool in TRITON_DTYPES
    if backend == "auto":
        return fits and x.is_cuda and not _triton_problem()
    if not (x.is_cuda or (x.device.type == "cpu" and _interpreted())):
        raise BackendError(
            f"`backend` 'triton' runs on CUDA and ROCm, got x on {x.device}; move the model, or "
            "use 'auto' or 'reference'"
        )
    if not fits:
        raise BackendError(
            f"`backend` 'triton' takes float32, float16 and bfloat16, got x of {x.dtype} and "
            f"adapters of {pool}; use 'auto' or 'reference'"
        )
    return True


def backend_reason() -> str:
    """The backend that "auto" means here, and why."""
    problem = _triton_problem()
    if problem:
        return f"{HOST} (the kernels need triton {OLDEST_TRITON} or newer, {problem})"
    if not torch.cuda.is_available():
        return f"{HOST} (torch sees no CUDA or ROCm GPU)"
    return f"triton on {torch.cuda.get_device_name()}, {HOST}"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may sync or come from the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def plan(routing: Routing, slots: Slots, method: Method) -> Plan | None:
    """The plan of a routing with one row per row of x, on x's device.

    None when no row selects an adapter, where that can be told without a sync.

    Raises:
        UnknownAdapterError: the index holds a handle whose adapter is not there. The operators
            do not raise: such a row's output is NaN, and routing.check() raises.
    """
    index, weight = routing.index, routing.weight
    if not method.operators:
        resolved = slots.resolve(index)
        if bool((resolved < 0).all()):
            return None
        if method.grouped:
            return HostPlan(weight.clone(), resolved)
        return reference.plan(resolved, weight)
    if capturing(index.device):
        slots.captured = True
    selected, strength, *rest = torch.ops.lora_mux.plan(
        index,
        weight.detach(),
        slots.live(index.device),
        slots.capacity,
        method.block_m,
        method.triton,
    )
    if weight.requires_grad and torch.is_grad_enabled():
        strength = tiles.strength_of(selected, weight.to(strength.dtype))
    # Made once: torch.compile of torch 2.6 can not look into _replace, nor cut a NamedTuple.
    tensors = operators.Plan(selected, strength, *rest)
    routing.last_pass.row_states = tensors.state
    return TiledPlan(tensors, method)


def add_lora(y: Tensor, x: Tensor, pool: Pool, plan: Plan, owned: bool) -> Tensor:
    """y [..., N] plus the adapters' part for x [..., K]; y itself when no adapter is here.

    Args:
        owned: y's storage is nobody else's, so that it may be written to.
    """
    if isinstance(plan, HostPlan) and y.ndim == 2 and not tracked(y, x, plan.weight):
        return grouped.add_lora(y, x, pool, plan, owned)  # no views: 10 us where caches are cold
    y_rows, x_rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if isinstance(plan, HostPlan):
        if not tracked(y, x, plan.weight):
            return grouped.add_lora(y_rows, x_rows, pool, plan, owned).reshape(y.shape)
        plan = plan.reference
    if isinstance(plan, reference.Plan):
        return reference.add_lora(y_rows, x_rows, pool.rows, plan).reshape(y.shape)
    tensors, method = plan
    arguments = (
        *(y_rows, x_rows, *pool.rows, *tensors),
        *(pool.max_rank, method.batch_invariant, method.triton),
    )
    if owned and not tracked(y, x, tensors.strength) and y.is_contiguous():
        torch.ops.lora_mux.add_lora_(*arguments)
        return y
    added: Tensor = torch.ops.lora_mux.add_lora(*arguments)
    return added.reshape(y.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool, plan: TiledPlan) -> Tensor:
    """y [..., N] = x W^T + bias and the adapters' part, for x [..., K], in one launch."""
    tensors, method = plan
    y: Tensor = torch.ops.lora_mux.linear(
        *(x.reshape(-1, x.shape[-1]), weight, bias, *pool.rows, *tensors),
        *(pool.max_rank, method.batch_invariant, method.triton),
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is computed from them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
