"""The launchers, run for real without a GPU: see fake_driver. Prints one JSON object.

    python tests/support/launches.py

A script of its own, for TRITON_INTERPRET must not be set where triton compiles; test_launch.py
runs it and judges what it prints.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import codegen
import fake_driver
import lora_mux
from fake_cuda import FakeCuda
from fake_driver import LAUNCHES
from gradients import SMALL, Batch
from interpreter import mend_bf16
from lora_mux import ops
from lora_mux.kernels import launch, launch_gradient, pairs, weight_gradient
from lora_mux.kernels.tensors import Pool
from lora_mux.ops import operators
from lora_mux.ops.eager import again
from oracle import Adapter, forward
from problem import FusedProblem, Problem
from quick_interpreter import without_repetitions

KERNELS = "plan", "shrink", "expand", "fused", "weight_gradient", "reduce", "parts"


def on(architecture: str, computes: bool = True) -> None:
    """Launch for that architecture, and let the launchers think that it is there."""
    fake_driver.install(architecture, computes)
    for kernel in (getattr(launch, f"{name}_kernel") for name in KERNELS[:4]):
        kernel.device_caches.clear()
    for kernel in (getattr(weight_gradient, f"{name}_kernel") for name in KERNELS[4:]):
        kernel.device_caches.clear()
    again._AGAIN.clear()
    pairs._kept.cache_clear()  # which may be of fake tensors
    launch.architecture = lambda device: codegen.ARCHITECTURES[architecture]  # type: ignore[assignment]


def described() -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "grid": one.grid,
            "shared": one.metadata.shared,
            "stages": one.metadata.num_stages,
            "specialised": {k: str(v) for k, v in one.specialised().items()},
            "signature": one.source.signature,
        }
        for one in LAUNCHES
    ]


def values() -> dict[str, Any]:
    """Each architecture: what was launched, and that the answer is right."""
    found = {}
    aligned = {"rows": 5, "K": 64, "N": 80, "ranks": (8, 20), "J": 2}
    cases = {
        **{
            f"{name} aligned": (name, {**aligned, "dtype": torch.bfloat16})
            for name in codegen.SWEPT
        },
        "sm_90 odd": ("sm_90", {"dtype": torch.float16}),
        "sm_90 fp32": ("sm_90", aligned),
        "sm_90 many rows": ("sm_90", {**aligned, "rows": 70, "dtype": torch.bfloat16}),
    }
    for name, (architecture, sizes) in cases.items():
        on(architecture)
        problem = Problem(**sizes)
        problem.check(problem.run())
        found[name] = described()
    return found


def fused() -> Any:
    """The fused launch for a few rows, and that its answers are right."""
    on("sm_90")
    problem = FusedProblem(rows=5, K=64, N=80, ranks=(8, 20), J=2, dtype=torch.bfloat16)
    problem.check(problem.run(block_n=32, block_k=16, split_k=2))
    return described()


def gradient() -> Any:
    """The weight gradient in two parts, and that its answer is right."""
    on("sm_90")
    batch = Batch(
        torch.tensor([[0, 1], [1, -1]]).repeat(20, 1),
        *([40, 8], [1, 0]),
        columns=80,
        dtype=torch.bfloat16,
    )
    batch.check(batch.run(replace(SMALL, block_c=64)))
    return described()


def compiled_variants() -> dict[str, int]:
    """How many variants of shrink 20 batches need that differ in rows, routing and adapters."""
    on("sm_90", computes=False)
    for rows in (1, 2, 15, 16, 17, 48, 64):
        for ranks in ((8, 20), (20, 3), (16, 16)):
            Problem(rows=rows, K=64, N=80, ranks=ranks, J=2, dtype=torch.bfloat16).run(split_k=1)
    for rows in (17, 30, 32):
        for ranks in ((8, 20), (20, 3), (16, 16)):
            FusedProblem(rows=rows, K=64, N=80, ranks=ranks, J=2, dtype=torch.bfloat16).run()
    for rows in (1, 16, 40, 100):
        for trained in ([0], [1, 0], [2, 1, 0]):
            slots = torch.arange(2 * rows).view(rows, 2) % 3
            of = {"columns": 80, "parts": 2, "dtype": torch.bfloat16}
            batch = Batch(slots, [8, 40, 16], trained, **of)
            batch.run(replace(SMALL, block_c=64))
    return {name: len(set(_hashes(name))) for name in KERNELS}


def _hashes(name: str) -> list[str]:
    return [one.metadata.hash for one in LAUNCHES if one.name == f"{name}_kernel"]


def graph(fused: bool) -> dict[str, Any]:
    """Launches of one forward pass, replayed after all that may change between replays."""
    on("sm_90")
    ops.dispatch._interpreted = lambda: True  # on the CPU, please
    torch.manual_seed(0)
    dtype = torch.bfloat16 if fused else torch.float32
    linear = nn.Linear(40, 24, dtype=dtype)
    layer = lora_mux.MuxLinear(linear, backend="triton", fused=fused)
    layer.reserve(adapters=5, rank=33)
    adapters: dict[int, Adapter] = {}

    def load(name: str, rank: int) -> int:
        A, B = (torch.randn(rank, 40) / 6).to(dtype), torch.randn(24, rank).to(dtype)
        handle = layer.add_adapter(name, A, B, alpha=4)
        adapters[handle] = Adapter(A, B, 4 / rank)
        return handle

    a, b = load("a", 5), load("b", 20)
    x = torch.randn(6, 40).to(dtype)
    index, weight = torch.full((6, 3), -1), torch.ones(6, 3)
    index[:2, 0] = a
    with torch.no_grad():
        LAUNCHES.clear()
        y = layer(x, lora_mux.Routing(index, weight))
    recorded = list(LAUNCHES)

    def replayed() -> float:
        """The largest error of a replay in units of eps * max|y|, or of a NaN that is missing."""
        with torch.no_grad():
            y.copy_(linear(x))
            for one in recorded:
                one.replay()
            rows = [
                [(adapters[h], float(w)) for h, w in zip(hs, ws, strict=True) if h in adapters]
                for hs, ws in zip(index.tolist(), weight, strict=True)
            ]
            truth = forward(linear, x, rows)
        dead = [any(h != -1 and h not in adapters for h in hs) for hs in index.tolist()]
        if y.isnan().any(1).tolist() != dead or y.isnan().all(1).tolist() != dead:
            return float("inf")
        alive = ~torch.tensor(dead)
        error = (y.double() - truth)[alive].abs().max() / truth[alive].abs().max()
        return float(error / torch.finfo(y.dtype).eps)

    errors = {"same": replayed()}
    index[:] = torch.tensor(
        [[b, a, -1], [-1, -1, -1], [b, b, a], [-1, a, -1], [b, -1, -1], [a] * 3]
    )
    errors["another routing"] = replayed()
    weight.copy_(torch.randn(6, 3))
    errors["other weights"] = replayed()
    c = load("c", 33)
    index[1] = torch.tensor([c, a, b])
    errors["an adapter more"] = replayed()
    layer.remove_adapter("a")
    del adapters[a]
    errors["an adapter less, whose handle still stands"] = replayed()
    d = load("d", 7)
    errors["its slot has another tenant"] = replayed()
    index[index == a] = d
    errors["which is routed to"] = replayed()
    x.copy_(torch.randn(6, 40))
    errors["another x"] = replayed()
    return {"launches": [one.name for one in recorded], "errors": errors}


def fake_tensors() -> list[dict[str, Any]]:
    """Sizes past 2^31 elements, on tensors without values: whatever would sync raises."""
    on("sm_90", computes=False)
    rows, K, N, J, C, S = 70_000, 4096, 40_000, 2, 600_000, 64
    with FakeTensorMode():
        half, ints = {"dtype": torch.bfloat16}, {"dtype": torch.int32}
        x, y = torch.empty(rows, K, **half), torch.empty(rows, N, **half)
        pool = Pool(
            *(torch.empty(C, K, **half), torch.empty(C, N, **half)),
            *(torch.empty(C, dtype=torch.bool), torch.empty(S, **ints), torch.empty(S, **ints)),
            torch.empty(S),
        )
        index = torch.empty(rows, J, dtype=torch.int64)
        live = torch.empty(1 << 16, **ints)
        plan = operators._plan(index, torch.empty(rows, J), live, S, 64, True)
        operators._add_lora_(y, x, *pool, *plan, 64, False, True)
        operators._strength_gradient(y, x, *pool, *plan, 64, False, True)
        W, few = torch.empty(N, K, **half), torch.empty(20, J, dtype=torch.int64)
        plan = operators._plan(few, torch.empty(20, J), live, S, 32, True)
        operators._linear(x[:20], W, None, *pool, *plan, 64, False, True)
        u, slots = torch.empty(rows, J, 64, 2), torch.empty(rows, J, **ints)
        found = pairs.pairs_of(slots, torch.empty(S, **ints), S)
        ranks = [(number, 64) for number in range(S)]
        launch_gradient.weight_gradient(u, x, torch.empty(rows, J), found, ranks)
    return described()


def devices() -> dict[str, list[int]]:
    """Where the launches for tensors of two GPUs land, while the first is the current one."""
    on("sm_90", computes=False)
    driver = triton.runtime.driver.active
    patch = pytest.MonkeyPatch()
    cuda, found = FakeCuda(patch), {}
    patch.setattr(torch.cuda, "current_device", driver.get_current_device)
    patch.setattr(torch.cuda, "_exchange_device", driver.exchange_device)
    patch.setattr(torch.cuda, "_maybe_exchange_device", driver.exchange_device)
    patch.setattr(launch, "stream_number", lambda device: 0)
    patch.setattr(launch, "device_name", lambda device: "NVIDIA")
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        LAUNCHES.clear()
        problem = FusedProblem(rows=5, K=64, N=80, ranks=(8, 20), J=2, dtype=torch.bfloat16)
        with cuda:
            problem.to(device)
        with cuda.fake:
            plan = operators._plan(problem.index, problem.weight, problem.live, 2, 16)
            shared = *problem.pool, *plan, 20, False
            operators._add_lora_(problem.y, problem.x, *shared)
            operators._strength_gradient(problem.y, problem.x, *shared)
            operators._linear(problem.x, problem.W, problem.b, *shared)
        found[device] = [one.device for one in LAUNCHES]
        assert driver.device == 0, "another device is left current"
    patch.undo()
    return found


if __name__ == "__main__":
    with mend_bf16(), without_repetitions():
        report = {
            "values": values(),
            "fused": fused(),
            "gradient": gradient(),
            "variants": compiled_variants(),
            "graph": graph(fused=False),
            "fused graph": graph(fused=True),
            "fake": fake_tensors(),
            "devices": devices(),
        }
    json.dump(report, sys.stdout)
