"""The torch operators: plan, add_lora (functional), add_lora_ (into y), linear, and gradients.

    plan = lora_mux::plan(index, weight, live, ...)
    y' = lora_mux::add_lora(y, x, *rows, *plan, ...),  y' = y + the adapters of each row
    lora_mux::add_lora_(y, x, *rows, *plan, ...)       the same, written to y
    y = lora_mux::linear(x, W, bias, *rows, *plan, ...)  the base layer and the adapters at once
    lora_mux::strength_gradient, weight_gradient(dy, x, *rows, *plan, ...)

They are opaque to torch.compile and torch.export, so that one graph serves every routing and every
set of adapters. add_lora and linear have gradients to all floating tensors but the pool's, and to
the parameters of adapters that are trained. On CUDA and ROCm they run the Triton kernels, elsewhere
the reference, unless `triton` says otherwise. An operator takes tensors one by one: `rows` are the
fields of lora_mux.core.RankRows, `plan` those of lora_mux.kernels.tensors.Plan.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import RankRows
from ..kernels.tensors import DEAD, SLOT_MASK, empty_plan
from ..kernels.tensors import Plan as Plan
from . import on_triton, plan_in_torch, reference
from .operands import (
    How,
    Trained,
    check_unchanged,
    refuse_second_derivatives,
    row_by_row,
    schema,
    transposed,
)

F = TypeVar("F", bound=Callable[..., Any])


# The last arguments of every operator but plan; the first are tensors of its own.
SHARED = ", ".join(schema(fields) for fields in (RankRows, Plan, How, Trained))
_NAMES = *RankRows._fields, *Plan._fields, *How._fields, *Trained._fields
# The names of the arguments of operators that have gradients, in their order.
ADD_LORA, LINEAR = ("y", "x", *_NAMES), ("x", "weight", "bias", *_NAMES)
# Library costs a third of what custom_op's Python wrapper does: docs/backends.md has the figures.
LIBRARY: Any = torch.library.Library("lora_mux", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "plan(Tensor index, Tensor weight, Tensor live, SymInt capacity, SymInt block_m, "
    f"bool? triton=None) -> ({schema(Plan)})",
    f"add_lora(Tensor y, Tensor x, {SHARED}) -> Tensor",
    f"add_lora_(Tensor(a!) y, Tensor x, {SHARED}) -> ()",
    f"linear(Tensor x, Tensor weight, Tensor? bias, {SHARED}) -> Tensor",
    f"strength_gradient(Tensor grad, Tensor x, {SHARED}) -> Tensor",
    f"weight_gradient(Tensor grad, Tensor x, {SHARED}) -> (Tensor of_A, Tensor of_B)",
):
    LIBRARY.define(_signature, tags=torch.Tag.pt2_compliant_tag)

_ROWS = len(RankRows._fields)
_TENSORS = _ROWS + len(Plan._fields)
_HOW = _TENSORS + len(How._fields)


def _unpack(shared: tuple[Any, ...]) -> tuple[RankRows, Plan, How, Trained]:
    """The arguments that all operators share, as what they are."""
    rows, plan = RankRows(*shared[:_ROWS]), Plan(*shared[_ROWS:_TENSORS])
    return rows, plan, How(*shared[_TENSORS:_HOW]), Trained(*shared[_HOW:])


def _on_triton(tensor: Tensor, triton: bool | None) -> bool:
    return tensor.is_cuda if triton is None else triton


def _kernel(name: str) -> Callable[[F], F]:
    return cast(Callable[[F], F], torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd"))


def _fake(name: str) -> Callable[[F], F]:
    return cast(Callable[[F], F], torch.library.register_fake(f"lora_mux::{name}", lib=LIBRARY))


@_kernel("plan")
def _plan(
    index: Tensor,
    weight: Tensor,
    live: Tensor,
    capacity: int,
    block_m: int,
    triton: bool | None = None,
) -> Plan:
    if len(live) <= SLOT_MASK:  # a caller's own, who has fewer slots: the others have no tenant
        live = pad(live, (0, SLOT_MASK + 1 - len(live)), value=-1)
    if not _on_triton(index, triton):
        return plan_in_torch.plan(index, weight, live, capacity, block_m)
    from ..kernels import launch

    return launch.plan(index, on_triton.computable(weight), live, capacity, block_m)


@_fake("plan")
def _plan_fake(
    index: Tensor,
    weight: Tensor,
    live: Tensor,
    capacity: int,
    block_m: int,
    triton: bool | None = None,
) -> Plan:
    return empty_plan(index, weight, capacity, block_m)


@_kernel("add_lora_")
def _add_lora_(y: Tensor, x: Tensor, *shared: Any) -> None:
    rows, plan, how, _ = _unpack(shared)
    if _on_triton(y, how.triton):
        on_triton.add_(y, x, rows, plan, how)
        return
    used = reference.plan(plan.slots, plan.strength)
    added = reference.add_lora(y, x, row_by_row(rows), used)
    y.copy_(torch.where((plan.state == DEAD)[:, None], torch.nan, added))


@_kernel("add_lora")
def _add_lora(y: Tensor, x: Tensor, *shared: Any) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    _add_lora_(out, x, *shared)
    return out


@_kernel("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *shared: Any) -> Tensor:
    rows, plan, how, _ = _unpack(shared)
    if how.fused and _on_triton(x, how.triton):
        fused = on_triton.linear(x, weight, bias, rows, plan, how)
        if fused is not None:
            return fused[0]
    with torch.autocast(x.device.type, enabled=False):  # y is to have x's dtype
        y = torch.nn.functional.linear(x, weight, bias)
    _add_lora_(y, x, *shared)
    return y


@_kernel("strength_gradient")
def _strength_gradient(grad: Tensor, x: Tensor, *shared: Any) -> Tensor:
    rows, plan, how, _ = _unpack(shared)
    if _on_triton(grad, how.triton):
        return on_triton.strength_gradient(grad, x, rows, plan, how)
    gradient = reference.strength_gradient(grad, x, row_by_row(rows), plan.slots)
    return gradient.to(plan.strength.dtype)


@_kernel("weight_gradient")
def _weight_gradient(grad: Tensor, x: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
    rows, plan, how, trained = _unpack(shared)
    if _on_triton(grad, how.triton):
        return on_triton.weight_gradient(grad, x, rows, plan, how, trained)
    assert trained.trained is not None
    slots = [(int(trained.trained[number]), rank) for number, rank in trained.ranks]
    return reference.weight_gradient(grad, x, row_by_row(rows), plan.slots, plan.strength, slots)


@_fake("add_lora_")
def _add_lora__fake(y: Tensor, x: Tensor, *shared: Any) -> None:
    return None


@_fake("add_lora")
def _add_lora_fake(y: Tensor, x: Tensor, *shared: Any) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_fake("linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *shared: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("strength_gradient")
def _strength_gradient_fake(grad: Tensor, x: Tensor, *shared: Any) -> Tensor:
    _, plan, *_ = _unpack(shared)
    return torch.empty_like(plan.strength, memory_format=torch.contiguous_format)


@_fake("weight_gradient")
def _weight_gradient_fake(grad: Tensor, x: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
    rows, _, _, trained = _unpack(shared)
    R, dtype = sum(rank for _, rank in trained.ranks), reference.wide(x, rows)
    return x.new_empty(R, x.shape[1], dtype=dtype), x.new_empty(R, grad.shape[1], dtype=dtype)


def _of_add_lora(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *shared = inputs
    _keep(ctx, x, None, shared)


def _of_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *shared = inputs
    _keep(ctx, x, weight, shared)


def _keep(ctx: Any, x: Tensor, weight: Tensor | None, shared: list[Any]) -> None:
    """What a backward needs."""
    rows, plan, how, trained = _unpack(tuple(shared))
    # Not the pool's tensors: torch would refuse a backward after an adapter came or went, though
    # the rank rows of those in use stay as they are until it is over. Nor the parameters, whose
    # change gets an error of ours.
    ctx.rows, ctx.how, ctx.trained, ctx.weighted = rows, how, trained, weight is not None
    ctx.versions = [parameter._version for parameter in trained.parameters or ()]
    ctx.save_for_backward(x, *plan, *([] if weight is None else [weight]))


def _backward(ctx: Any, grad: Tensor, names: tuple[str, ...]) -> tuple[Any, ...]:
    """dy = grad; dx = dy W, and then add_lora again, with A and B in each other's place."""
    rows, how, trained = ctx.rows, ctx.how, ctx.trained
    check_unchanged(trained.parameters or (), ctx.versions)
    x, *tensors = ctx.saved_tensors
    weight = tensors.pop() if ctx.weighted else None
    plan = Plan(*tensors)
    # A base that answers in another dtype than x's would be multiplied in fp32 for nothing.
    upstream = grad.to(x.dtype) if x.is_floating_point() else grad
    operators, gradients = torch.ops.lora_mux, {"y": grad}
    # Shorter where the call left options to their defaults.
    needed = dict(zip(names, ctx.needs_input_grad, strict=False))
    if needed["x"]:
        gradients["x"] = _to_x(upstream, x, weight, rows, plan, how)
    if needed["strength"]:
        gradients["strength"] = operators.strength_gradient(upstream, x, *rows, *plan, *how)
    if needed.get("weight"):
        gradients["weight"] = grad.T @ x
    if needed.get("bias"):
        gradients["bias"] = grad.sum(0)
    if trained.parameters:
        refuse_second_derivatives()
        shared = *rows, *plan, *how, *trained
        gradients["parameters"] = trained.split(*operators.weight_gradient(upstream, x, *shared))
    return tuple(gradients.get(name) for name in needed)


def _to_x(
    grad: Tensor, x: Tensor, weight: Tensor | None, rows: RankRows, plan: Plan, how: How
) -> Tensor:
    """The gradient of x: the base's, if this is where it is computed, and the adapters'."""
    with torch.autocast(grad.device.type, enabled=False):
        if weight is None:
            base = torch.zeros_like(x, memory_format=torch.contiguous_format)
        else:
            base = grad @ weight
    arguments = base, grad, *transposed(rows), *plan, *how
    if torch.is_grad_enabled():  # a backward that has a backward itself
        whole: Tensor = torch.ops.lora_mux.add_lora(*arguments)
        return whole
    torch.ops.lora_mux.add_lora_(*arguments)
    return base


torch.library.register_autograd(
    "lora_mux::add_lora",
    lambda ctx, grad: _backward(ctx, grad, ADD_LORA),
    setup_context=_of_add_lora,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "lora_mux::linear",
    lambda ctx, grad: _backward(ctx, grad, LINEAR),
    setup_context=_of_linear,
    lib=LIBRARY,
)
