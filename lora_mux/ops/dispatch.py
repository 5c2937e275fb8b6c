"""One door to the forms: plan once per forward pass, then add the adapters to each layer's y.

Backend "reference" runs everywhere. "triton" runs `lora_mux.kernels` on CUDA and ROCm, and on the
CPU when TRITON_INTERPRET=1 is set, slowly, to try the kernels without a GPU. "auto" means Triton
where it can run, the CPU's own form on the CPU, and the reference elsewhere. A backend that was
asked for by name never falls back.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..core import Pool, Routing, Slots, is_capturing
from ..errors import BackendError, warn
from . import cpu, eager, operators, plan_in_torch, reference, tuned
from .forms import Form, Method, Plan, plain, tracked
from .tiled import EagerPlan, FusedPlan, TiledPlan

Backend: TypeAlias = Literal["auto", "triton", "reference"]
Fused: TypeAlias = Literal["auto"] | bool
AnyPlan: TypeAlias = Plan | FusedPlan
# Those that can compute a frozen base layer as well, as one node for autograd.
WholePlan: TypeAlias = EagerPlan | TiledPlan | cpu.TrainingPlan
WHOLE = EagerPlan, TiledPlan, cpu.TrainingPlan

capturing = is_capturing  # by the name under which layers and routes ask
CPU, REFERENCE = Method("cpu"), Method("reference")
HOST = "batched products on the CPU, reference elsewhere"
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
        if self.fused is True:
            self._check_fused()
        elif self.backend == "triton":
            _require_triton("`backend` 'triton'")

    def _check_fused(self) -> None:
        if self.batch_invariant or self.backend == "reference":
            got = "batch_invariant=True" if self.batch_invariant else "backend='reference'"
            raise BackendError(
                f"`fused` must be 'auto' or False with {got}, got True: it is a Triton kernel "
                "whose tiles depend on the batch"
            )
        _require_triton("`fused` True")
        if not _can_fuse():
            raise BackendError(
                "`fused` must be 'auto' or False on ROCm, got True; see kernels/README.md"
            )

    def may_fuse(self, x: Tensor) -> bool:
        """Whether the base layer and its adapters may become one launch for x."""
        return self.fused is not False and (x.is_cuda or self.backend == "triton")


def _require_triton(asked: str) -> None:
    """Refuse what was asked for by name where the kernels can never run."""
    problem = _triton_problem()
    if problem:
        raise BackendError(f"{asked} needs triton {problem}; use 'auto' or 'reference'")
    if not (_interpreted() or torch.cuda.is_available()):
        raise BackendError(
            f"{asked} needs a CUDA or ROCm GPU, and torch sees none; use 'auto' or 'reference', or "
            "set TRITON_INTERPRET=1 before Python starts to try the kernels on the CPU"
        )


def _triton_problem() -> str:
    """The triton that the kernels need and what there is instead; "" when they can be compiled."""
    from ..kernels import installed

    return installed.PROBLEM


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    from ..kernels import launch

    return launch.INTERPRETED


def _can_fuse() -> bool:
    """Whether the fused kernel is made for this GPU's maker."""
    from ..kernels import launch

    return launch.FUSES


# Its answer is cached, and torch.compile would warn of a cache that it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _obstacle(device: torch.device, modern: bool) -> str:
    """What the kernels need of a device and do not find; `modern` is for bf16 and for fusing."""
    from ..kernels import config, launch

    return config.obstacle(launch.capability(device), modern)


def _refuse_old(asked: str, device: torch.device, modern: bool) -> None:
    """Refuse what was asked for by name where the GPU is too old for it."""
    problem = _obstacle(device, modern)
    if problem:
        raise BackendError(f"{asked} needs {problem} on {device}; use 'auto'")


def _auto_runs_triton(device: torch.device, bf16: bool) -> bool:
    """Whether "auto" means the kernels on a GPU; one warning says why they cannot run."""
    problem = _triton_problem()
    if problem:
        _tell(f"triton {problem}")
    elif problem := _obstacle(device, bf16):
        _tell(f"{problem}{' (float16 may run)' if bf16 else ''}")
    return not problem


_TOLD: set[str] = set()  # so that each reason is told once in a process


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(problem: str) -> None:
    if problem not in _TOLD:
        _TOLD.add(problem)
        warn(
            f"`backend` 'auto' means the slower einsum reference here: the kernels need {problem}; "
            "backend='reference' chooses it without this warning"
        )


def choose_form(backend: Backend, device: str, triton: bool, compiling: bool) -> Form:
    """The form of a layer that is not fused.

    Args:
        device: the type of x's device.
        triton: whether the kernels run for x.
        compiling: torch.compile or torch.export traces, and no index can be read on the host.
    """
    if triton:
        return "triton"
    if compiling:
        return "operators"
    return "cpu" if backend == "auto" and device == "cpu" else "reference"


def method(
    settings: Settings,
    x: Tensor,
    rows: int,
    pool: Pool,
    weight: Tensor | None = None,
    trained: bool = False,
) -> Method:
    """How adapters are added for a layer's input x of that many rows.

    Args:
        weight: of a base layer that is x W^T + bias and no more, and that autograd does not
            follow; None = any other.
        trained: there are adapters whose parameters autograd may follow.

    Raises:
        BackendError: Triton was asked for by name, and cannot run on x.
    """
    meant = settings.backend == "triton" or (settings.backend == "auto" and x.is_cuda)
    triton = meant and _runs_triton(settings.backend, x, pool)
    compiling = torch.compiler.is_compiling()
    form = choose_form(settings.backend, x.device.type, triton, compiling)
    if form == "cpu" and x.is_floating_point():
        return CPU._replace(trained=trained)
    # The form for the CPU has no products for the one-hot rows of an embedding.
    if form == "cpu" or (form == "reference" and not trained):
        return REFERENCE
    if form == "reference":  # whose gradients of adapters are an operator
        form = "operators"
    from ..kernels.config import fused_tile_rows, tile_rows

    # Under autocast the base may answer in another dtype, and then products are fp32. Where gains
    # rescale what it answers, sums are kept in fp32.
    dtype = _dtype(x, pool)
    half = dtype == pool.A_rows.dtype and dtype.itemsize == 2 and not pool.has_gains
    half = half and not torch.is_autocast_enabled(x.device.type)
    if (
        triton
        and half
        and weight is not None
        and not trained
        and _fuses(settings, x, rows, pool, weight)
    ):
        return Method("fused", fused_tile_rows(rows))
    block_m = tile_rows(rows, 2 if half else 4, settings.batch_invariant)
    return Method(form, block_m, settings.batch_invariant, trained)


def like(x: Tensor, pool: Pool, weight: Tensor | None) -> object:
    """All of a layer and its input that `method` depends on, but for compiling: takes 2 us.

    With it a choice need not be made again, which takes 20.
    """
    device, adapters = x.device, pool._buffers["A_rows"]
    assert adapters is not None
    fused = weight if weight is None else (weight.shape, weight.stride(), weight.dtype)
    autocast = torch.is_autocast_enabled(device.type)
    of_pool = adapters.dtype, pool.max_rank, pool.has_gains
    return x.shape, x.dtype, device, autocast, fused, of_pool, torch.is_grad_enabled()


def _dtype(x: Tensor, pool: Pool) -> torch.dtype:
    """Of the computation: x's own, or the pool's where x holds numbers of one-hot rows."""
    return x.dtype if x.is_floating_point() else pool.A_rows.dtype


def _runs_triton(backend: Backend, x: Tensor, pool: Pool) -> bool:
    """Whether the kernels run for x; for "triton" by name an error where they do not."""
    adapters, dtype = pool.A_rows.dtype, _dtype(x, pool)
    fits = dtype in TRITON_DTYPES and adapters in TRITON_DTYPES
    bf16 = torch.bfloat16 in (dtype, adapters)
    if backend == "auto":
        return fits and _auto_runs_triton(x.device, bf16)
    if not (x.is_cuda or (x.device.type == "cpu" and _interpreted())):
        raise BackendError(
            f"`backend` 'triton' runs on CUDA and ROCm, got x on {x.device}; move the model, or "
            "use 'auto' or 'reference'"
        )
    if not fits:
        raise BackendError(
            f"`backend` 'triton' takes float32, float16 and bfloat16, got x of {dtype} and "
            f"adapters of {adapters}; use 'auto' or 'reference'"
        )
    _refuse_old(f"`backend` 'triton'{' for bfloat16' if bf16 else ''}", x.device, bf16)
    return True


def _fuses(settings: Settings, x: Tensor, rows: int, pool: Pool, weight: Tensor) -> bool:
    """Whether one launch is asked for, or was measured to be faster, and the rows are few."""
    from ..kernels.config import FUSED_ROWS

    N, K = weight.shape
    if rows > FUSED_ROWS or weight.dtype != x.dtype:
        return False
    if N % 8 or K % 8 or weight.stride(0) % 8:
        return False  # rows that are not loaded by 16 bytes: slow, and its registers spill
    if settings.fused is True:
        _refuse_old("`fused` True", x.device, modern=True)
        return True
    if settings.fused is False or settings.batch_invariant or torch.compiler.is_compiling():
        return False
    if not _can_fuse() or _obstacle(x.device, modern=True):
        return False
    from ..kernels import launch

    case = tuned.Case(max(1, rows), K, N, max(1, pool.max_rank), 1, x.element_size())
    return tuned.fuses(launch.device_name(x.device), case)


def backend_reason() -> str:
    """The backend that "auto" means here, and why."""
    problem = _triton_problem()
    if problem:
        return f"{HOST} (the kernels need triton {problem})"
    if not torch.cuda.is_available():
        return f"{HOST} (torch sees no CUDA or ROCm GPU)"
    name, device = torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    problem = _obstacle(device, modern=False)
    if problem:
        return f"{HOST} (on {name} the kernels need {problem})"
    without = " but for bfloat16" if _obstacle(device, modern=True) else ""
    return f"triton on {name}{without}, {HOST}"


def plan(
    routing: Routing,
    slots: Slots,
    method: Method,
    resolved: bool = False,
    used: Collection[int] | None = None,
) -> AnyPlan | None:
    """The plan of a routing with one row per row of x, on x's device.

    None when no row selects an adapter, where that can be told without a sync.

    Args:
        routing: its index holds handles.
        slots: which slots they mean.
        method: how adapters are computed.
        resolved: the index holds slots already; only for a method on the host.
        used: at least all slots that it selects; None = only the device knows. An adapter that is
            trained, and is not among them, gets no gradients.

    Raises:
        UnknownAdapterError: the index holds a handle whose adapter is not there. The operators
            do not raise: such a row's output is NaN, and routing.check() raises.
    """
    index, weight = routing.index, routing.weight
    if method.on_host:
        chosen = index if resolved else slots.resolve(index)
        if bool((chosen < 0).all()):
            return None
        if method.form != "cpu":
            return reference.plan(chosen, weight)
        made = cpu.Plan(weight.clone(), chosen)
        trained = slots.trained_among(made.used) if method.trained else ()
        return cpu.TrainingPlan(made.weight, chosen, trained) if trained else made
    trained = slots.trained_among(used) if method.trained else ()
    if capturing(index.device):
        slots.captured = True
    triton = method.form != "operators"
    if triton and plain(index, weight) and not tracked(weight):
        live = slots.live(index.device)
        now = eager.plan_now(index, weight, live, slots.capacity, method.block_m)
        routing.last_pass.row_states = now.state
        if method.form == "fused":
            return FusedPlan(None, now)
        learn = eager.TrainedHere.now(trained, now, slots.capacity) if trained else None
        return EagerPlan(now, method.batch_invariant, learn, used)
    selected, strength, *rest = torch.ops.lora_mux.plan(
        index, weight.detach(), slots.live(index.device), slots.capacity, method.block_m, triton
    )
    if weight.requires_grad and torch.is_grad_enabled():
        strength = plan_in_torch.strength_of(selected, weight.to(strength.dtype))
    # Made once: torch.compile of torch 2.6 cannot look into _replace, nor cut a NamedTuple.
    tensors = operators.Plan(selected, strength, *rest)
    routing.last_pass.row_states = tensors.state
    if method.form == "fused":
        return FusedPlan(tensors)
    here = eager.TrainedHere.of(trained, tensors, slots.capacity) if trained else None
    return TiledPlan(tensors, method.batch_invariant, triton, here, used)
