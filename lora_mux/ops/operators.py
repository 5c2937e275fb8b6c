"""The torch operators: plan, add_lora (functional), add_lora_ (into y), linear, strength_gradient.

    (slots, strength, union, length, place, state, counters) = lora_mux::plan(index, weight, ...)
    y' = lora_mux::add_lora(y, x, <pool>, <plan>, ...),  y' = y + the adapters of each row
    lora_mux::add_lora_(y, x, ...)                       the same, written to y
    y = lora_mux::linear(x, W, bias, <pool>, <plan>, ...)  the base layer and the adapters at once

They are opaque to torch.compile and torch.export, so that one graph serves every routing and every
set of adapters. add_lora has gradients to y, x and strength. On CUDA (ROCm's too) they run the
Triton kernels, elsewhere the reference, unless `triton` says otherwise. Pool and plan travel as
loose tensors, in the order of lora_mux.pool.RankRows and of Plan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..core import RankRows
from . import plan_in_torch as tiles
from . import reference, tuned

F = TypeVar("F", bound=Callable[..., Any])


class Plan(NamedTuple):
    """What all layers of a forward pass share; the formulas are in kernels/src/plan.py."""

    slots: Tensor  # [M, J] int32, -1 = none
    strength: Tensor  # [M, J] at least fp32, at the first place of each slot in a row
    union: Tensor  # [T, U] int32
    length: Tensor  # [T] int32
    place: Tensor  # [T, U, BLOCK_M] int16, -1 = not selected
    state: Tensor  # [M] int8: 0 = nothing selected, 1 = something, 2 = a handle that is not alive
    counters: Tensor  # [64, 4] int32 zeros, in which fused launches count and which they leave 0


class How(NamedTuple):
    """The options of an operator."""

    max_rank: int  # at least every rank of the pool
    batch_invariant: bool = False
    triton: bool | None = None  # None = on CUDA


POOL = (
    "Tensor A_rows, Tensor B_rows, Tensor? constant, Tensor offset, Tensor rank, Tensor scaling, "
)
PLAN = (
    "Tensor slots, Tensor strength, Tensor union, Tensor length, Tensor place, Tensor state, "
    "Tensor counters"
)
HOW = ", SymInt max_rank, bool batch_invariant=False, bool? triton=None"
# Library costs a third of what custom_op's Python wrapper does: docs/backends.md has the figures.
LIBRARY: Any = torch.library.Library("lora_mux", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "plan(Tensor index, Tensor weight, Tensor live, SymInt capacity, SymInt block_m, "
    f"bool? triton=None) -> ({PLAN})",
    tags=torch.Tag.pt2_compliant_tag,
)
for _signature in (
    f"add_lora(Tensor y, Tensor x, {POOL}{PLAN}{HOW}) -> Tensor",
    f"add_lora_(Tensor(a!) y, Tensor x, {POOL}{PLAN}{HOW}) -> ()",
    f"linear(Tensor x, Tensor weight, Tensor? bias, {POOL}{PLAN}{HOW}) -> Tensor",
    f"strength_gradient(Tensor grad, Tensor x, {POOL}{PLAN}{HOW}) -> Tensor",
):
    LIBRARY.define(_signature, tags=torch.Tag.pt2_compliant_tag)


def _unpack(arguments: tuple[Any, ...]) -> tuple[RankRows, Plan, How]:
    return RankRows(*arguments[:6]), Plan(*arguments[6:13]), How(*arguments[13:])


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
) -> tuple[Tensor, ...]:
    if not _on_triton(index, triton):
        return tiles.plan(index, weight, live, capacity, block_m)
    from ..kernels import launch

    return launch.plan(index, _computable(weight), live, capacity, block_m)


@_fake("plan")
def _plan_fake(
    index: Tensor,
    weight: Tensor,
    live: Tensor,
    capacity: int,
    block_m: int,
    triton: bool | None = None,
) -> tuple[Tensor, ...]:
    M, J = index.shape
    T, U = tiles.shapes(M, J, capacity, block_m)
    return (
        index.new_empty((M, J), dtype=torch.int32),
        weight.new_empty((M, J), dtype=torch.promote_types(weight.dtype, torch.float32)),
        index.new_empty((T, U), dtype=torch.int32),
        index.new_empty((T,), dtype=torch.int32),
        index.new_empty((T, U, block_m), dtype=torch.int16),
        index.new_empty((M,), dtype=torch.int8),
        index.new_empty(tiles.COUNTERS, dtype=torch.int32),
    )


@_kernel("add_lora_")
def _add_lora_(y: Tensor, x: Tensor, *arguments: Any) -> None:
    rows, plan, how = _unpack(arguments)
    if _on_triton(y, how.triton):
        _triton_add_(y, x, rows, plan, how)
        return
    added = reference.add_lora(y, x, rows, reference.plan(plan.slots, plan.strength))
    y.copy_(torch.where((plan.state == 2)[:, None], torch.nan, added))


@_kernel("add_lora")
def _add_lora(y: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    _add_lora_(out, x, *arguments)
    return out


@_kernel("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    rows, plan, how = _unpack(arguments)
    if _on_triton(x, how.triton):
        fused = _triton_linear(x, weight, bias, rows, plan, how)
        if fused is not None:
            return fused
    y = torch.nn.functional.linear(x, weight, bias)
    _add_lora_(y, x, *arguments)
    return y


@_kernel("strength_gradient")
def _strength_gradient(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    rows, plan, how = _unpack(arguments)
    if _on_triton(grad, how.triton):
        return _triton_strength_gradient(grad, x, rows, plan, how)
    gradient = reference.strength_gradient(grad, x, rows, plan.slots)
    return gradient.to(plan.strength.dtype)


@_fake("add_lora_")
def _add_lora__fake(y: Tensor, x: Tensor, *arguments: Any) -> None:
    return None


@_fake("add_lora")
def _add_lora_fake(y: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_fake("linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("strength_gradient")
def _strength_gradient_fake(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(arguments[7], memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *arguments = inputs
    ctx.save_for_backward(x, *arguments[:13])
    ctx.how = How(*arguments[13:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dy = grad; dx is add_lora again, with A and B in each other's place."""
    x, *tensors = ctx.saved_tensors
    rows, plan = RankRows(*tensors[:6]), Plan(*tensors[6:])
    # A base that answers in another dtype than x's would be multiplied in fp32 for nothing.
    upstream = grad.to(x.dtype)
    grad_x = grad_strength = None
    if ctx.needs_input_grad[1]:
        swapped = rows._replace(A_rows=rows.B_rows, B_rows=rows.A_rows, constant=None)
        zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
        grad_x = torch.ops.lora_mux.add_lora(zeros, upstream, *swapped, *plan, *ctx.how)
    if ctx.needs_input_grad[9]:
        grad_strength = torch.ops.lora_mux.strength_gradient(upstream, x, *rows, *plan, *ctx.how)
    return grad, grad_x, *[None] * 7, grad_strength, *[None] * 8


torch.library.register_autograd(
    "lora_mux::add_lora", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _computable(tensor: Tensor) -> Tensor:
    """fp32 for bf16 in Triton's interpreter, which multiplies bf16's bits (triton #11584)."""
    from ..kernels import launch

    return tensor.float() if launch.INTERPRETED and tensor.dtype is torch.bfloat16 else tensor


def _triton_add_(y: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How) -> None:
    from ..kernels import launch

    if not (y.numel() and plan.slots.shape[1]):
        return
    A_rows, B_rows = _computable(rows.A_rows), _computable(rows.B_rows)
    x, out = _row_major(_computable(x)), _row_major(_computable(y))
    config = _config(x, out, A_rows, plan, how)
    h = x.new_empty(launch.h_shape(plan.slots, how.max_rank, config), dtype=torch.float32)
    launch.shrink(
        x,
        A_rows,
        h,
        plan.strength,
        plan.union,
        plan.length,
        plan.place,
        rows.offset,
        rows.rank,
        rows.scaling,
        rows.constant,
        config,
    )
    launch.expand(
        h,
        B_rows,
        out,
        plan.union,
        plan.length,
        plan.place,
        plan.state,
        rows.offset,
        rows.rank,
        config,
    )
    if out is not y:
        y.copy_(out)


def _triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: RankRows, plan: Plan, how: How
) -> Tensor | None:
    """The fused launch; None where there is none to make."""
    from ..kernels import config, launch

    counter = launch.own_counter(plan.counters)
    if counter is None or not (x.numel() and weight.numel() and plan.slots.shape[1]):
        return None
    A_rows, B_rows, W = (_computable(factor) for factor in (rows.A_rows, rows.B_rows, weight))
    inputs = _row_major(_computable(x))
    if inputs.stride(0) % 8:  # its rows could not be loaded by 16 bytes
        inputs = inputs.contiguous()
    (M, K), N = x.shape, W.shape[0]
    case = tuned.Case(M, K, N, max(1, how.max_rank), 1, x.element_size())
    chosen = tuned.fused(launch.device_name(x.device), case, plan.place.shape[2])
    if chosen is None:
        chosen = config.choose_fused(M, N, launch.architecture(x.device))
    before = None if config.SHRINKS_WITHIN >= M else _config(inputs, W.T, A_rows, plan, how)
    assert rows.constant is not None
    y = launch.linear(
        inputs,
        W,
        bias,
        A_rows,
        B_rows,
        plan.strength,
        plan.union,
        plan.length,
        plan.place,
        plan.state,
        rows.offset,
        rows.rank,
        rows.scaling,
        rows.constant,
        counter,
        how.max_rank,
        chosen,
        before,
    )
    return y.to(x.dtype)


def _triton_strength_gradient(
    grad: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How
) -> Tensor:
    from ..kernels import launch

    gradient = plan.strength.new_zeros(plan.strength.shape)
    if not gradient.numel():
        return gradient
    products = []
    for vectors, factor, constant in (
        (x, rows.A_rows, rows.constant),
        (grad, rows.B_rows, None),
    ):
        vectors, factor = _row_major(_computable(vectors)), _computable(factor)
        config = _config(vectors, vectors, factor, plan, how)
        shape = launch.h_shape(plan.slots, how.max_rank, config)
        h = x.new_zeros(shape, dtype=torch.float32)
        launch.shrink(
            vectors,
            factor,
            h,
            None,
            plan.union,
            plan.length,
            plan.place,
            rows.offset,
            rows.rank,
            rows.scaling,
            constant,
            config,
        )
        products.append(h.sum(0))
    scaling = torch.where(plan.slots >= 0, rows.scaling[plan.slots.clamp(min=0)], 0.0)
    return gradient.copy_((products[0] * products[1]).sum(2) * scaling)


def _config(x: Tensor, y: Tensor, factor: Tensor, plan: Plan, how: How) -> Any:
    from ..kernels import config, launch

    block_m = plan.place.shape[2]
    case = tuned.Case(
        rows=x.shape[0],
        in_features=x.shape[1],
        out_features=y.shape[1],
        rank=how.max_rank,
        selections=plan.slots.shape[1],
        itemsize=launch.product_itemsize(x, y, factor),
    )
    # Measured ones differ with the rows, so that a row's bits would.
    if not how.batch_invariant:
        measured = tuned.find(launch.device_name(x.device), case, block_m)
        if measured is not None:
            return measured
    return config.choose(
        **case._asdict(),
        architecture=launch.architecture(x.device),
        block_m=block_m,
        batch_invariant=how.batch_invariant,
    )


def _row_major(tensor: Tensor) -> Tensor:
    """With an inner stride of 1, which the kernels length on; itself when it is so already."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
