"""Launches that are made again without triton, on its real path without a GPU: see launches.py.

    python tests/support/relaunches.py

Prints one JSON object, which tests/kernels/test_ready.py judges.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_mux
from fake_driver import LAUNCHES
from interpreter import mend_bf16
from launches import described, on
from lora_mux import Routing, ops
from lora_mux.kernels import pairs
from lora_mux.ops.eager.again import _AGAIN
from oracle import Adapter, forward
from quick_interpreter import without_repetitions

K, N = 32, 48
HALF = torch.bfloat16
# Cases of which the answer is looked at; the interpreter takes a second for each.
COMPUTED = "tokens", "rows apart by 1", "begins at an odd address", "fused, tokens", "after growing"


class Stage:
    """A layer with adapters of one rank, and how often triton launched by itself."""

    def __init__(self, dtype: torch.dtype = HALF, rank: int = 8, fused: bool = False) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(K, N, dtype=dtype)
        self.layer = lora_mux.MuxLinear(self.linear, backend="triton", fused=fused)
        self.adapters: dict[int, Adapter] = {}
        for _ in range(3):
            self.add(rank)

    def add(self, rank: int) -> None:
        dtype = self.linear.weight.dtype
        A, B = (torch.randn(rank, K) / 6).to(dtype), torch.randn(N, rank).to(dtype)
        handle = self.layer.add_adapter(str(len(self.adapters)), A, B, alpha=4)
        self.adapters[handle] = Adapter(A, B, 4 / rank)

    def run(self, x: Tensor, J: int = 1, index: torch.dtype = torch.int64) -> tuple[Any, float]:
        """What is launched for random rows, and the error in units of eps * max|y|."""
        rows = x.reshape(-1, K)
        handles = torch.tensor([-1, *self.adapters])
        chosen = handles[torch.randint(len(handles), (len(rows), J))].to(index)
        weight = torch.randn(len(rows), J)
        LAUNCHES.clear()
        with torch.no_grad():
            y = self.layer(x, Routing(chosen, weight)).reshape(len(rows), N)
            selected = [
                [(self.adapters[h], float(w)) for h, w in zip(hs, ws, strict=True) if h != -1]
                for hs, ws in zip(chosen.tolist(), weight, strict=True)
            ]
            truth = forward(self.linear, rows, selected)
        error = (y.double() - truth).abs().max() / truth.abs().max() / torch.finfo(y.dtype).eps
        return described(), float(error)


def x_of(*shape: int, dtype: torch.dtype = HALF, apart: int = 0, begins: int = 0) -> Tensor:
    """x whose rows begin K + apart elements apart, and the first of them after so many."""
    *outer, width = shape
    length = (width + apart) * torch.Size(outer).numel() + begins
    memory = torch.randn(length).to(dtype)[begins:]
    return memory.reshape(*outer, width + apart)[..., :width]


def cases() -> dict[str, Callable[[], tuple[Any, float]]]:
    """name -> a run; they differ in what triton may look at."""
    stages = {
        "bf16": Stage(),
        "fp16": Stage(torch.float16),
        "fp32": Stage(torch.float32),
        "rank 24": Stage(rank=24),
        "fused": Stage(fused=True),
    }
    half = stages["bf16"]
    grown = Stage()
    runs: dict[str, Callable[[], tuple[Any, float]]] = {
        "plain": lambda: half.run(x_of(5, K)),
        "a row": lambda: half.run(x_of(1, K)),
        "sixteen rows": lambda: half.run(x_of(16, K)),
        "two tiles": lambda: half.run(x_of(17, K)),
        "tokens": lambda: half.run(x_of(2, 3, K)),
        "two places": lambda: half.run(x_of(5, K), J=2),
        "sixteen places": lambda: half.run(x_of(5, K), J=16),
        "int32": lambda: half.run(x_of(5, K), index=torch.int32),
        "begins at an odd address": lambda: half.run(x_of(5, K, begins=1)),
        "begins at 16 bytes": lambda: half.run(x_of(5, K, begins=8)),
        "rows apart by 8": lambda: half.run(x_of(5, K, apart=8)),
        "rows apart by 1": lambda: half.run(x_of(5, K, apart=1)),
        "columns apart": lambda: half.run(x_of(K, 5).T),
        "fp16": lambda: stages["fp16"].run(x_of(5, K, dtype=torch.float16)),
        "fp32": lambda: stages["fp32"].run(x_of(5, K, dtype=torch.float32)),
        "rank 24": lambda: stages["rank 24"].run(x_of(5, K)),
        "fused": lambda: stages["fused"].run(x_of(5, K)),
        "fused, two rows of 16": lambda: stages["fused"].run(x_of(20, K)),
        "fused, too many rows": lambda: stages["fused"].run(x_of(40, K)),
        "fused, tokens": lambda: stages["fused"].run(x_of(2, 3, K)),
        "fused, at an odd address": lambda: stages["fused"].run(x_of(5, K, begins=1)),
    }

    def after_growing() -> tuple[Any, float]:
        # Past the first capacity: other tables, and another union. Past the second one: more slots
        # for the union of a tile of 16 rows, which is as it was.
        for adapters in (3, 12, 40):
            while len(grown.adapters) < adapters:
                grown.add(20)
            grown.run(x_of(5, K))
        return grown.run(x_of(16, K))

    return {**runs, "after growing": after_growing}


def by_triton(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and how many launches of it were triton's own."""
    calls = 0
    run = triton.JITFunction.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += not kwargs["warmup"]
        return run(kernel, *args, **kwargs)

    triton.JITFunction.run = counting
    try:
        return work(), calls
    finally:
        triton.JITFunction.run = run


def again() -> dict[str, Any]:
    """Each case: launched by triton alone, and after all other cases were launched."""
    found: dict[str, Any] = {}
    runs, driver = cases(), triton.runtime.driver.active
    driver.computes = False
    for name, run in runs.items():
        _AGAIN.clear()
        found[name] = {"first": run()[0]}
    for run in runs.values():
        run()
    for name, run in runs.items():
        driver.computes = name in COMPUTED
        (launches, error), calls = by_triton(run)
        found[name] |= {"again": launches, "by triton": calls}
        if driver.computes:
            found[name]["error"] = error
    driver.computes = True
    return found


def watched() -> dict[str, int]:
    """How many launches are triton's own while somebody looks on, of a case that is known."""
    stage, x, found = Stage(), x_of(5, K), {}
    stage.run(x)
    knobs, told = triton.knobs.runtime, []

    def hook(metadata: Any) -> None:
        told.append(metadata)

    def count(name: str) -> None:
        found[name] = by_triton(lambda: stage.run(x))[1]

    count("nobody")
    knobs.launch_enter_hook.add(hook)
    count("a hook before")
    knobs.launch_enter_hook.remove(hook)
    knobs.launch_exit_hook.add(hook)
    count("a hook after")
    knobs.launch_exit_hook.remove(hook)
    knobs.debug = True
    count("debugging")
    knobs.debug = False
    count("nobody any more")
    return found


class Seen(TorchDispatchMode):
    """Which operators torch's dispatcher has met."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that is not torch's own."""


def dispatched() -> dict[str, Any]:
    """Which operators are met in a mode, and whether other tensors and gradients are right."""
    stage, x = Stage(), x_of(5, K)
    stage.run(x)
    with Seen() as seen:
        _, error = stage.run(x)
    handle = next(iter(stage.adapters))
    routing = Routing(torch.tensor([[handle]] * 5))
    leaf = x.clone().requires_grad_()
    stage.layer(leaf, routing).float().sum().backward()
    adapter = stage.adapters[handle]
    change = adapter.scaling * adapter.B.double() @ adapter.A.double()
    expected = (stage.linear.weight.detach().double() + change).sum(0).expand(5, K)
    assert leaf.grad is not None
    with torch.no_grad():
        plain = stage.layer(x, routing)
        other = stage.layer(x.as_subclass(Subclass), routing)
    return {
        "operators": sorted(name for name in seen.names if name.startswith("lora_mux::")),
        "error": error,
        "gradient": float((leaf.grad.double() - expected).abs().max() / expected.abs().max()),
        "subclass": torch.equal(plain, other.as_subclass(Tensor)),
    }


class Training:
    """A layer whose adapters are trained."""

    RANKS = {"a": 8, "b": 24, "c": 3}

    def __init__(
        self, dtype: torch.dtype = HALF, wide: int = K, base: bool = False, **how: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(wide, N, dtype=dtype)).requires_grad_(base)
        self.mux = lora_mux.attach(self.model, backend="triton", **how)
        self.wide, self.dtype = wide, dtype
        self.scaling, self.parameters = {}, {}
        for name, rank in self.RANKS.items():
            A, B = torch.randn(rank, wide) / wide**0.5, torch.randn(N, rank)
            self.mux.add_adapter(name, {"0": (A.to(dtype), B.to(dtype))}, alpha=4)
            self.scaling[name] = 4 / rank
            self.parameters[name] = [*self.mux.train(name).parameters()]

    def run(
        self, rows: int, to_x: bool = True, expanded: bool = False, autocast: bool = False
    ) -> tuple[Any, list[Tensor]]:
        """What is launched for a forward and backward, and the largest error of a gradient."""
        torch.manual_seed(rows)  # the same adapters each time
        names = [(None, "a", "b", "c", "b")[i] for i in torch.randint(5, (rows,)).tolist()]
        x = torch.randn(rows, self.wide).to(self.dtype).requires_grad_(to_x)
        dy = torch.randn(1 if expanded else rows, N).to(self.dtype).expand(rows, N)
        leaves = [x] * to_x + [one for own in self.parameters.values() for one in own]
        for leaf in leaves:
            leaf.grad = None
        LAUNCHES.clear()
        with self.mux.route(names):
            y = self.model(x)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y.backward(dy)
        launched = described()
        return launched, [self._error(leaf, want) for leaf, want in self._truth(names, x, dy)]

    def _truth(self, names: Any, x: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each leaf with its gradient in fp64."""
        rows = x.detach().double().requires_grad_()
        y = rows @ self.model[0].weight.double().T
        pairs = [(x, rows)] if x.requires_grad else []
        for name, own in self.parameters.items():
            A, B = wide = [one.detach().double().requires_grad_() for one in own]
            mine = torch.tensor([n == name for n in names])[:, None]
            part = self.scaling[name] * rows @ A.T @ B.T
            y = y + torch.where(mine, part, 0.0)
            pairs += zip(own, wide, strict=True)
        y.backward(dy.double())
        return [(leaf, wide.grad) for leaf, wide in pairs]

    def _error(self, leaf: Tensor, want: Tensor) -> float:
        """In units of eps * the largest element; None stands for zeros."""
        got = torch.zeros_like(want) if leaf.grad is None else leaf.grad.double()
        assert leaf.grad is None or leaf.grad.stride() == leaf.stride()
        size = want.abs().max().clamp(min=1e-30) * torch.finfo(self.dtype).eps
        return float((got - want).abs().max() / size)


def training() -> dict[str, Any]:
    """Steps that are launched by triton alone, and again after others were; and their gradients."""
    half, wide, learning = Training(), Training(wide=512), Training(base=True)
    invariant = Training(batch_invariant=True)
    runs: dict[str, Callable[[], tuple[Any, Any]]] = {
        "plain": lambda: half.run(20),
        "other rows": lambda: half.run(9),
        "more rows": lambda: half.run(80),
        "parts": lambda: wide.run(20),
        "fp32": lambda: Training(torch.float32).run(20),
        "x needs none": lambda: half.run(20, to_x=False),
        "dy for all": lambda: half.run(20, expanded=True),
        "under autocast": lambda: half.run(20, autocast=True),
        "beside a base that learns": lambda: learning.run(20),
        "invariant": lambda: invariant.run(20),
    }
    found: dict[str, Any] = {}
    driver, patch, pairs_by = triton.runtime.driver.active, pytest.MonkeyPatch(), pairs.pairs_by
    driver.computes = False
    # Nothing has computed the slots.
    patch.setattr(pairs, "pairs_by", lambda slots, numbers: pairs_by(slots.zero_(), numbers))
    for name, run in runs.items():
        _AGAIN.clear()
        found[name] = {"first": run()[0]}
    for run in runs.values():
        run()
    patch.undo()
    driver.computes = True
    for name, run in runs.items():
        (launches, errors), calls = by_triton(run)
        found[name] |= {"again": launches, "by triton": calls, "error": max(errors)}
    return found


def beside_training() -> float:
    """The error of a layer that trains nothing, after one that does; in units of the answer."""
    torch.manual_seed(0)
    first, second = nn.Linear(K, K, dtype=HALF), nn.Linear(K, N, dtype=HALF)
    model = nn.Sequential(first, second).requires_grad_(False)
    mux = lora_mux.attach(model, backend="triton")
    A, B = torch.randn(8, K).to(HALF) / 6, torch.randn(N, 8).to(HALF)
    mux.add_adapter("served", {"1": (A, B)}, scaling=1.0)
    mux.create("trained", r=8, alpha=8, targets=["0"])
    parameters = [*mux.train("trained").parameters()]
    x = torch.randn(5, K).to(HALF)
    with mux.route(["trained", "served", None, "served", "trained"]):
        y = model(x)
    y.float().sum().backward()
    assert all(one.grad is not None for one in parameters)
    want = second(first(x)).double()
    want[[1, 3]] += first(x)[[1, 3]].double() @ A.T.double() @ B.T.double()
    return float((y.detach().double() - want).abs().max() / want.abs().max())


def watched_training() -> dict[str, Any]:
    """Launches by triton while somebody looks on, and gradients by operators: the same bits."""
    stage = Training()
    names, x, dy = ["a", "b", "b"] * 4, torch.randn(12, K).to(HALF), torch.randn(12, N).to(HALF)
    parameters = [one for own in stage.parameters.values() for one in own]

    def step() -> list[Tensor | None]:
        for one in parameters:
            one.grad = None
        leaf = x.clone().requires_grad_()
        with stage.mux.route(names):
            y = stage.model(leaf)
        y.backward(dy)
        return [y.detach(), leaf.grad, *(one.grad for one in parameters)]

    def same(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other if one is None or other is None else torch.equal(one, other)

    for shape, count in (((K,), 1), ((0, K), 0)):  # which are for the operators
        one = Routing(torch.full((count, 1), stage.mux.adapters["a"]))
        assert stage.model[0](torch.zeros(shape, dtype=HALF), one).shape == (*shape[:-1], N)
    step()
    own, alone = by_triton(step)
    with Seen() as seen:
        by_operators = step()
    triton.knobs.runtime.debug = True
    seen_by = by_triton(step)[1]
    triton.knobs.runtime.debug = False
    met = sorted(name for name in seen.names if name.startswith("lora_mux::"))
    return {
        "nobody": alone,
        "debugging": seen_by,
        "operators": met,
        "same": all(map(same, own, by_operators)),
    }


def devices() -> list[int]:
    """Where launches land that are made again for tensors of the second GPU, and then the first."""
    stage, x = Stage(), x_of(5, K)
    stage.run(x)
    driver = triton.runtime.driver.active
    (shrinking,) = [kept for kept in _AGAIN.values() if hasattr(kept, "shrink")]
    patch, pointers = pytest.MonkeyPatch(), (0, 0, (0,) * 7, (0,) * 6)
    patch.setattr(torch.cuda, "current_device", driver.get_current_device)
    patch.setattr(torch.cuda, "_exchange_device", driver.exchange_device)
    patch.setattr(torch.cuda, "_maybe_exchange_device", driver.exchange_device)
    patch.setattr(driver, "computes", False)
    LAUNCHES.clear()
    from lora_mux.kernels.ready import in_order

    for device in (1, 0):
        in_order(device, (shrinking.shrink, pointers), (shrinking.expand, pointers))
    patch.undo()
    return [one.device for one in LAUNCHES]


if __name__ == "__main__":
    on("sm_90")
    ops.dispatch._interpreted = lambda: True  # on the CPU, please
    with mend_bf16(), without_repetitions():
        report: dict[str, Any] = {"again": again()}
        for part in (watched, dispatched, devices, training, watched_training, beside_training):
            _AGAIN.clear()
            report[part.__name__] = part()
        on("gfx942")
        _AGAIN.clear()
        Stage().run(x_of(5, K))
        report["kept on ROCm"] = len(_AGAIN)
    json.dump(report, sys.stdout)
