"""The torch operators: plan, add_lora (functional), add_lora_ (into y), linear, strength_gradient.

    plan = lora_mux::plan(index, weight, live, ...)
    y' = lora_mux::add_lora(y, x, *rows, *plan, ...),  y' = y + the adapters of each row
    lora_mux::add_lora_(y, x, *rows, *plan, ...)       the same, written to y
    y = lora_mux::linear(x, W, bias, *rows, *plan, ...)  the base layer and the adapters at once

They are opaque to torch.compile and torch.export, so that one graph serves every routing and every
set of adapters. add_lora has gradients to y, x and strength. On CUDA and ROCm they run the Triton
kernels, elsewhere the reference, unless `triton` says otherwise. An operator takes tensors one by
one: `rows` are the fields of lora_mux.core.RankRows, `plan` those of lora_mux.kernels.tensors.Plan.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from ..core import RankRows
from ..kernels.tensors import DEAD, Pool, empty_plan
from ..kernels.tensors import Plan as Plan
from . import plan_in_torch, reference, tuned

if TYPE_CHECKING:
    from ..kernels.ready import AddAgain, LinearAgain

F = TypeVar("F", bound=Callable[..., Any])


class How(NamedTuple):
    """The options of an operator."""

    max_rank: int  # at least every rank of the pool
    batch_invariant: bool = False
    triton: bool | None = None  # None = on CUDA


SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
    bool | None: "bool?",
}


def schema(fields: Any) -> str:
    """The fields of a NamedTuple class as arguments of an operator: "Tensor slots, ..."."""
    types = get_type_hints(fields, localns={"Tensor": Tensor})
    defaults = {name: f"={value}" for name, value in fields._field_defaults.items()}
    return ", ".join(
        f"{SCHEMA_TYPES[types[name]]} {name}{defaults.get(name, '')}" for name in fields._fields
    )


# The last arguments of every operator but plan; the first are tensors of its own.
SHARED = ", ".join(schema(fields) for fields in (RankRows, Plan, How))
# The names of add_lora's arguments, in their order.
ADD_LORA = ("y", "x", *RankRows._fields, *Plan._fields, *How._fields)
# Library costs a third of what custom_op's Python wrapper does: docs/backends.md has the figures.
LIBRARY: Any = torch.library.Library("lora_mux", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "plan(Tensor index, Tensor weight, Tensor live, SymInt capacity, SymInt block_m, "
    f"bool? triton=None) -> ({schema(Plan)})",
    f"add_lora(Tensor y, Tensor x, {SHARED}) -> Tensor",
    f"add_lora_(Tensor(a!) y, Tensor x, {SHARED}) -> ()",
    f"linear(Tensor x, Tensor weight, Tensor? bias, {SHARED}) -> Tensor",
    f"strength_gradient(Tensor grad, Tensor x, {SHARED}) -> Tensor",
):
    LIBRARY.define(_signature, tags=torch.Tag.pt2_compliant_tag)

_ROWS = len(RankRows._fields)
_TENSORS = _ROWS + len(Plan._fields)


def _unpack(shared: tuple[Any, ...]) -> tuple[RankRows, Plan, How]:
    """The arguments that all operators share, as what they are."""
    return RankRows(*shared[:_ROWS]), Plan(*shared[_ROWS:_TENSORS]), How(*shared[_TENSORS:])


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
    if not _on_triton(index, triton):
        return plan_in_torch.plan(index, weight, live, capacity, block_m)
    from ..kernels import launch

    return launch.plan(index, computable(weight), live, capacity, block_m)


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
    rows, plan, how = _unpack(shared)
    if _on_triton(y, how.triton):
        triton_add_(y, x, rows, plan, how)
        return
    added = reference.add_lora(y, x, rows, reference.plan(plan.slots, plan.strength))
    y.copy_(torch.where((plan.state == DEAD)[:, None], torch.nan, added))


@_kernel("add_lora")
def _add_lora(y: Tensor, x: Tensor, *shared: Any) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    _add_lora_(out, x, *shared)
    return out


@_kernel("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *shared: Any) -> Tensor:
    rows, plan, how = _unpack(shared)
    if _on_triton(x, how.triton):
        fused = triton_linear(x, weight, bias, rows, plan, how)
        if fused is not None:
            return fused[0]
    with torch.autocast(x.device.type, enabled=False):  # y is to have x's dtype
        y = torch.nn.functional.linear(x, weight, bias)
    _add_lora_(y, x, *shared)
    return y


@_kernel("strength_gradient")
def _strength_gradient(grad: Tensor, x: Tensor, *shared: Any) -> Tensor:
    rows, plan, how = _unpack(shared)
    if _on_triton(grad, how.triton):
        return _triton_strength_gradient(grad, x, rows, plan, how)
    gradient = reference.strength_gradient(grad, x, rows, plan.slots)
    return gradient.to(plan.strength.dtype)


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
    _, plan, _ = _unpack(shared)
    return torch.empty_like(plan.strength, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *shared = inputs
    # Not the pool's tensors: torch would refuse a backward after an adapter came or went, though
    # the rank rows of those in use stay as they are until it is over.
    ctx.rows = shared[:_ROWS]
    ctx.save_for_backward(x, *shared[_ROWS:_TENSORS])
    ctx.how = shared[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dy = grad; dx is add_lora again, with A and B in each other's place."""
    x, *tensors = ctx.saved_tensors
    rows, plan, how = _unpack((*ctx.rows, *tensors, *ctx.how))
    # A base that answers in another dtype than x's would be multiplied in fp32 for nothing.
    upstream = grad.to(x.dtype) if x.is_floating_point() else grad
    operators, gradients = torch.ops.lora_mux, {"y": grad}
    # Shorter where the call left options to their defaults.
    needed = dict(zip(ADD_LORA, ctx.needs_input_grad, strict=False))
    if needed["x"]:
        zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
        gradients["x"] = operators.add_lora(zeros, upstream, *_transposed(rows), *plan, *how)
    if needed["strength"]:
        gradients["strength"] = operators.strength_gradient(upstream, x, *rows, *plan, *how)
    return tuple(gradients.get(name) for name in ADD_LORA)


torch.library.register_autograd(
    "lora_mux::add_lora", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _transposed(rows: RankRows) -> RankRows:
    """The adapters from y to x: A and B in each other's place. A bias does not depend on x."""
    return rows._replace(A_rows=rows.B_rows, B_rows=rows.A_rows, constant=None)


def computable(tensor: Tensor) -> Tensor:
    """fp32 for bf16 in Triton's interpreter, which multiplies bf16's bits (triton #11584)."""
    from ..kernels import launch

    return tensor.float() if launch.INTERPRETED and tensor.dtype is torch.bfloat16 else tensor


def _pool(rows: RankRows) -> Pool:
    """The same tensors, as the launchers take them."""
    return Pool(computable(rows.A_rows), computable(rows.B_rows), *rows[2:])


def triton_add_(y: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How) -> "AddAgain | None":
    """Launch shrink and expand; what does so again, where the tensors need no copies."""
    from ..kernels import launch, ready

    if not (y.numel() and plan.slots.shape[1]):
        return None
    pool = _pool(rows)
    given, x, out = x, _row_major(computable(x)), _row_major(computable(y))
    shrink = None
    if x.is_floating_point():
        config = _config(x, out, pool.A_rows, plan, how)
        h = x.new_empty(launch.h_shape(plan, how.max_rank, config), dtype=torch.float32)
        shrink = launch.shrink(x, h, plan, pool, config)
    else:
        config = dataclasses.replace(_config(out, out, pool.B_rows, plan, how), split_k=1)
        h = _columns(x, rows, plan, launch.h_shape(plan, how.max_rank, config))
    expand = launch.expand(h, out, plan, pool, config)
    if out is not y:
        y.copy_(out)
    if shrink is None or expand is None or x is not given or out is not y:
        return None
    return ready.AddAgain(tuple(h.shape), shrink, expand)


def _columns(
    x: Tensor, rows: RankRows, plan: Plan, shape: tuple[int, ...], weighted: bool = True
) -> Tensor:
    """h [M, J, R, 1] as shrink makes it, for ints x [M, 1]: columns of A, which need no product."""
    slots, S = plan.slots[:, :, None], len(rows.rank)
    place = torch.arange(shape[2], device=x.device)
    if not (S and len(rows.A_rows)):
        return x.new_zeros(*shape[:3], 1, dtype=torch.float32)
    known = (slots >= 0) & (slots < S)
    slot = torch.where(known, slots, 0).long()  # [M, J, 1]
    held = known & (place < rows.rank[slot])
    row = torch.where(held, rows.offset[slot] + place, 0)
    h = rows.A_rows[row, x[:, :, None]].float()
    if rows.constant is not None:
        h = torch.where(rows.constant[row], 1.0, h)
    if weighted:
        h = h * (plan.strength[:, :, None] * rows.scaling[slot])
    return torch.where(held, h, 0.0)[..., None].contiguous()


def triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: RankRows, plan: Plan, how: How
) -> "tuple[Tensor, LinearAgain | None] | None":
    """The fused launch, and what makes it again where x needs no copy; None = there is none."""
    from ..kernels import config, launch

    (M, K), N, stream = x.shape, weight.shape[0], launch.stream_number(x.device)
    one_tile = M <= config.FUSED_ROWS and plan.block_m == config.fused_tile_rows(M)
    if stream is None or not one_tile or not (x.numel() and N and plan.slots.shape[1]):
        return None
    pool, W, inputs = _pool(rows), computable(weight), _row_major(computable(x))
    if inputs.stride(0) % 8:  # its rows could not be loaded by 16 bytes
        inputs = inputs.contiguous()
    case = tuned.Case(M, K, N, max(1, how.max_rank), 1, x.element_size())
    chosen = tuned.fused(launch.device_name(x.device), case, plan.block_m)
    if chosen is None:
        chosen = config.choose_fused(M, N, launch.architecture(x.device))
    arguments = inputs, W, bias, plan, pool, how.max_rank, stream, chosen
    y, again = launch.linear_and_again(*arguments)
    return y.to(x.dtype), again if inputs is x else None


def _triton_strength_gradient(
    grad: Tensor, x: Tensor, rows: RankRows, plan: Plan, how: How
) -> Tensor:
    """<B^T grad, A x> * scaling at the first place of each slot, else 0."""
    from ..kernels import launch

    gradient = plan.strength.new_zeros(plan.strength.shape)
    if not gradient.numel():
        return gradient
    products = []
    for vectors, pool in ((x, _pool(rows)), (grad, _pool(_transposed(rows)))):
        if not vectors.is_floating_point():
            shape = launch.h_shape(plan, how.max_rank, _config(grad, grad, pool.B_rows, plan, how))
            products.append(_columns(vectors, rows, plan, shape, weighted=False).sum(3))
            continue
        vectors = _row_major(computable(vectors))
        config = _config(vectors, vectors, pool.A_rows, plan, how)
        shape = launch.h_shape(plan, how.max_rank, config)
        h = x.new_zeros(shape, dtype=torch.float32)
        launch.shrink(vectors, h, plan, pool, config, weighted=False)
        products.append(h.sum(3))
    scaling = torch.where(plan.slots >= 0, rows.scaling[plan.slots.clamp(min=0)], 0.0)
    return gradient.copy_((products[0] * products[1]).sum(2) * scaling)


def _config(x: Tensor, y: Tensor, factor: Tensor, plan: Plan, how: How) -> Any:
    """The measured Config for a batch, or the chosen one."""
    from ..kernels import config, launch

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
        measured = tuned.find(launch.device_name(x.device), case, plan.block_m)
        if measured is not None:
            return measured
    return config.choose(
        *(case.rows, case.in_features, case.out_features, case.itemsize),
        architecture=launch.architecture(x.device),
        block_m=plan.block_m,
        batch_invariant=how.batch_invariant,
    )


def _row_major(tensor: Tensor) -> Tensor:
    """With an inner stride of 1, as the kernels take it for granted; itself where it has that."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
