"""Ways to compute a problem, ours and others', each a function (problem, base) -> call.

`base()` returns a new y [M, N] that holds the base layer's answer, and call() returns y with the
adapters added. Work that many layers share (sorting rows, packing weights) is done before the call
and is not timed. A provider that cannot do a problem raises NotApplicable.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import lora_mux
from lora_mux import ops
from workloads import Problem

Call: TypeAlias = Callable[[], Tensor]
Provider: TypeAlias = Callable[[Problem, Call], Call]


class NotApplicable(Exception):
    """Why a provider cannot do a problem here."""


def base_alone(problem: Problem, base: Call) -> Call:
    """The base layer without adapters: the floor, not the answer."""
    return base


def merged(problem: Problem, base: Call) -> Call:
    """The adapters merged into the weight, if all rows select the same ones."""
    if not bool((problem.index == problem.index[:1]).all()) or bool(
        (problem.weight != problem.weight[:1]).any()
    ):
        raise NotApplicable("rows select different adapters")
    W = problem.W.double()
    for adapter, weight in zip(problem.index[0].tolist(), problem.weight[0].tolist(), strict=True):
        if adapter >= 0:
            W += weight * problem.B[adapter].double() @ problem.A[adapter].double()
    W = W.to(problem.W.dtype)
    return lambda: nn.functional.linear(problem.x, W)


def masked(problem: Problem, base: Call) -> Call:
    """Two products with the rank rows of all adapters, and a mask between them."""
    A, B = torch.cat(problem.A), torch.cat(problem.B, 1)
    ranks = torch.tensor([len(A) for A in problem.A], device=A.device)
    mask = problem.strength.repeat_interleave(ranks, 1).to(A.dtype)  # [M, sum of ranks]
    x = problem.x

    def call() -> Tensor:
        return base().addmm_((x @ A.T).mul_(mask), B.T)

    return call


def gather_bmm(problem: Problem, base: Call) -> Call:
    """A copy of A and B for each row, and batched products."""
    A, B = stacked(problem)
    x, index, J = problem.x, problem.index, problem.index.shape[1]
    weight = problem.weight.masked_fill(index < 0, 0).to(A.dtype)
    if x.shape[0] * J * (A[0].numel() + B[0].numel()) * A.element_size() > 1e9:
        raise NotApplicable("copies of more than 1 GB")
    chosen = index.clamp(min=0).flatten()

    def call() -> Tensor:
        rows = x.repeat_interleave(J, 0)[:, :, None]
        h = torch.bmm(A[chosen], rows)[:, :, 0]  # [M * J, r]
        h = h * weight.view(-1, 1)
        added = torch.bmm(B[chosen], h[:, :, None])
        return base().add_(added.view(len(x), J, -1).sum(1))

    return call


def segments(problem: Problem, base: Call) -> Call:
    """A loop over the adapters, each with its own rows."""
    x, B = problem.x, problem.B
    parts = []
    for adapter, A in enumerate(problem.A):
        rows = (problem.index == adapter).any(1).nonzero().flatten()
        if len(rows):
            parts.append((rows, A, B[adapter], problem.strength[rows, adapter, None].to(x.dtype)))

    def call() -> Tensor:
        y = base()
        for rows, A, B, strength in parts:
            y.index_add_(0, rows, (x[rows] @ A.T).mul_(strength) @ B.T)
        return y

    return call


def grouped_mm(problem: Problem, base: Call) -> Call:
    """torch's grouped product over rows that are sorted by adapter; one pass for each place."""
    if not hasattr(torch, "_grouped_mm") or problem.x.dtype != torch.bfloat16:
        raise NotApplicable("torch._grouped_mm is not there, or not for this dtype")
    if problem.x.device.type != "cuda":
        raise NotApplicable("torch._grouped_mm is a loop on the CPU")
    A, B = stacked(problem)
    x = problem.x
    sorted_places = []
    for place in problem.index.unbind(1):
        order = place.argsort(stable=True)
        order = order[int((place < 0).sum()) :]
        counts = torch.bincount(place[order], minlength=len(A))
        ends = counts.cumsum(0).to(torch.int32)
        strength = problem.weight[order, len(sorted_places), None].to(x.dtype)
        sorted_places.append((order, ends, strength))

    def call() -> Tensor:
        y = base()
        for order, ends, strength in sorted_places:
            h = torch._grouped_mm(x[order], A.transpose(1, 2), offs=ends)
            y.index_add_(0, order, torch._grouped_mm(h * strength, B.transpose(1, 2), offs=ends))
        return y

    return call


def peft_mixed(problem: Problem, base: Call) -> Call:
    """PEFT's mixed batch: one pass for each place of a row, since it takes one adapter a row."""
    try:
        import peft
    except ImportError as error:
        raise NotApplicable("peft is not installed") from error
    w = problem.workload
    if w.weighted or len(set(w.ranks)) > 1:
        raise NotApplicable("PEFT has no weights for rows; different ranks are not set up here")
    with torch.device("meta"):
        linear = nn.Linear(w.K, w.N, bias=False)
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    rank = w.ranks[0]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, "a0")
    for adapter in range(1, len(problem.A)):
        model.add_adapter(f"a{adapter}", config)
    layer: Any = model.eval().base_model.model[0]
    for adapter, (A, B) in enumerate(zip(problem.A, problem.B, strict=True)):
        layer.lora_A[f"a{adapter}"].weight.data = A
        layer.lora_B[f"a{adapter}"].weight.data = B
    x = problem.x.view(w.samples, w.tokens, -1)
    names = [
        ["__base__" if adapter < 0 else f"a{adapter}" for adapter in place]
        for place in problem.index[:: w.tokens].T.tolist()
    ]

    def call() -> Tensor:
        y = layer(x, adapter_names=names[0])
        for place in names[1:]:
            y = y + layer(x, adapter_names=place) - base().view(y.shape)
        return y.flatten(0, 1)

    return call


def ours(backend: ops.Backend = "auto", batch_invariant: bool = False) -> Provider:
    """The adapters of a MuxLinear; the plan, which layers of a model share, is made beforehand."""

    def prepare(problem: Problem, base: Call) -> Call:
        layer, routing = mux_linear(problem, backend, batch_invariant)
        x, pool = problem.x, layer.mux_pool
        method = ops.method(layer.mux_settings, x, len(x), pool)
        plan = ops.plan(routing, layer.mux_slots, method)
        if plan is None:
            return base
        assert not isinstance(plan, ops.FusedPlan)
        return lambda: plan.add(base(), x, pool, owned=True)

    return prepare


def ours_fused(problem: Problem, base: Call) -> Call:
    """The whole layer in one launch; the plan is made beforehand."""
    layer, routing = mux_linear(problem, "triton", fused=True)
    x, weight = problem.x, layer.weight
    method = ops.method(layer.mux_settings, x, len(x), layer.mux_pool, weight)
    if method.form != "fused":
        raise NotApplicable("the fused kernel takes 16-bit types")
    plan = ops.plan(routing, layer.mux_slots, method)
    assert isinstance(plan, ops.FusedPlan)
    return lambda: plan.linear(x, weight, None, layer.mux_pool)


def ours_as_a_module(backend: ops.Backend = "auto") -> Provider:
    """A MuxLinear called with its routing, so the plan is part of the call."""

    def prepare(problem: Problem, base: Call) -> Call:
        layer, routing = mux_linear(problem, backend)
        return lambda: layer(problem.x, routing)

    return prepare


def plan_alone(problem: Problem, base: Call) -> Call:
    """What a forward pass pays once for all its layers; not an answer."""
    layer, routing = mux_linear(problem, "triton")
    method = ops.method(layer.mux_settings, problem.x, len(problem.x), layer.mux_pool)

    def call() -> Tensor:
        ops.plan(routing, layer.mux_slots, method)
        return problem.x

    return call


def mux_linear(
    problem: Problem,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = False,
) -> tuple[lora_mux.MuxLinear, lora_mux.Routing]:
    """The problem as a layer of ours."""
    with torch.device("meta"):
        linear = nn.Linear(problem.W.shape[1], problem.W.shape[0], bias=False)
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    layer = lora_mux.MuxLinear(
        linear, backend=backend, batch_invariant=batch_invariant, fused=fused
    )
    layer.reserve(len(problem.A), max(map(len, problem.A)))
    handles = [
        layer.add_adapter(f"{i}", A, B, scaling=1.0)
        for i, (A, B) in enumerate(zip(problem.A, problem.B, strict=True))
    ]
    table = torch.tensor([*handles, -1], device=problem.index.device)
    return layer, lora_mux.Routing(table[problem.index], problem.weight)


def stacked(problem: Problem) -> tuple[Tensor, Tensor]:
    """A [adapters, r, K] and B [adapters, N, r], padded with zeros to the largest rank."""
    most = max(map(len, problem.A))
    pad = nn.functional.pad
    return (
        torch.stack([pad(A, (0, 0, 0, most - len(A))) for A in problem.A]),
        torch.stack([pad(B, (0, most - B.shape[1])) for B in problem.B]),
    )


NO_ANSWERS = ("base", "lora_mux plan")  # timed without a gate
WHOLE_LAYERS = ("base", "merged", "PEFT mixed", "lora_mux as a module", "lora_mux fused")
CPU: dict[str, Provider] = {
    "base": base_alone,
    "lora_mux": ours(),
    "lora_mux as a module": ours_as_a_module(),
    "PEFT mixed": peft_mixed,
    "segments": segments,
    "masked": masked,
    "gather + bmm": gather_bmm,
}
CUDA: dict[str, Provider] = {
    **CPU,
    "lora_mux": ours("triton"),
    "lora_mux batch-invariant": ours("triton", batch_invariant=True),
    "lora_mux fused": ours_fused,
    "lora_mux as a module": ours_as_a_module("triton"),
    "lora_mux plan": plan_alone,
    "merged": merged,
    "grouped_mm": grouped_mm,
}
