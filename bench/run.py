"""Check and time the kernels on this machine: one line of JSON for each workload.

    python bench/run.py --smoke              on a GPU, into bench/results/
    TRITON_INTERPRET=1 python bench/run.py --smoke --device cpu    tries the script, times nothing

For each workload: MuxLinear against the formula in fp64, then the base linear alone, the plan, the
pair of shrink and expand, and the whole layer.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from record import ROOT, provenance
from timing import microseconds, sets_for_cold_l2
from torch import nn

import lora_mux
from lora_mux import ops

ERROR = 1.2e-2  # of the norm, in bf16


@dataclass(frozen=True)
class Workload:
    """One layer, one batch: each row selects `selections` of `adapters` at random."""

    site: str
    K: int
    N: int
    rows: int
    adapters: int
    rank: int
    selections: int = 1


SITES = {
    "8B o": (4096, 4096),
    "8B qkv": (4096, 6144),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
}


def workloads(tiny: bool) -> Iterator[Workload]:
    """The sites of an 8B model; decode and prefill; one adapter, eight, four of eight for a row."""
    if tiny:
        yield Workload("tiny", 64, 48, 5, 3, 8, 2)
        return
    for (site, size), rows in itertools.product(SITES.items(), (1, 32, 128, 2048)):
        for adapters, selections in ((1, 1), (8, 1), (8, 4)):
            if adapters <= max(rows, selections):
                yield Workload(site, *size, rows, adapters, 16, selections)


def measured(workload: Workload, device: torch.device) -> dict[str, Any]:
    """The gate's error and the microseconds of each part."""
    torch.manual_seed(0)
    K, N, M = workload.K, workload.N, workload.rows
    half = {"device": device, "dtype": torch.bfloat16}
    traffic = 2 * (K * N + M * K + M * N)
    sets = sets_for_cold_l2(traffic, device)
    layers, inputs, routings = [], [], []
    for _ in range(sets):
        linear = nn.Linear(K, N, bias=False, **half)
        layer = lora_mux.MuxLinear(linear, backend="triton")
        layer.reserve(workload.adapters, workload.rank)
        handles = [
            layer.add_adapter(
                f"{i}",
                torch.randn(workload.rank, K) / K**0.5,
                torch.randn(N, workload.rank) / workload.rank,
                scaling=1.0,
            )
            for i in range(workload.adapters)
        ]
        layers.append(layer)
        inputs.append(torch.randn(M, K, **half))
        chance = torch.rand(M, workload.adapters, device=device)
        chosen = chance.topk(workload.selections).indices
        index = torch.tensor(handles, device=device)[chosen]
        routings.append(lora_mux.Routing(index, torch.rand(M, workload.selections, device=device)))
    method = ops.method(layers[0].mux_settings, inputs[0], M, layers[0].mux_pool)
    plans = [ops.plan(r, la.mux_slots, method) for r, la in zip(routings, layers, strict=True)]
    outputs = [torch.zeros(M, N, **half) for _ in range(sets)]

    def pair(n: int) -> None:
        plan = plans[n]
        assert plan is not None
        ops.add_lora(outputs[n], inputs[n], layers[n].mux_pool, plan, owned=True)

    with torch.no_grad():
        error = _error(layers[0], inputs[0], routings[0])
        if not error <= ERROR:
            return {"error": error, "gate": "failed"}
        times = microseconds(
            {
                "base": lambda n: layers[n](inputs[n]),
                "plan": lambda n: ops.plan(routings[n], layers[n].mux_slots, method),
                "pair": pair,
                "layer": lambda n: layers[n](inputs[n], routings[n]),
            },
            sets,
            device,
        )
    return {"error": error, "gate": "passed", "sets": sets, "microseconds": times}


def _error(layer: lora_mux.MuxLinear, x: torch.Tensor, routing: lora_mux.Routing) -> float:
    """Relative norm of the error of a layer, against the formula in fp64."""
    pool = layer.mux_pool.rows
    base: torch.Tensor = layer(x).double()
    want, got = base.clone(), layer(x, routing).double()
    for adapter, handle in enumerate(layer.adapters.values()):
        strength = torch.where(routing.index == handle, routing.weight, 0.0).sum(1).double()
        start, rank = int(pool.offset[adapter]), int(pool.rank[adapter])
        rows = slice(start, start + rank)
        h = x.double() @ pool.A_rows[rows, : x.shape[1]].double().T
        want += strength[:, None] * (h @ pool.B_rows[rows, : base.shape[1]].double())
    return float((got - want).norm() / want.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--smoke", action="store_true", required=True, help="the short sweep")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="default: bench/results/smoke-<time>.jsonl")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no GPU; --device cpu tries the script", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    moment = datetime.now(timezone.utc)
    out = args.out or ROOT / "bench" / "results" / f"smoke-{moment:%Y%m%d-%H%M%S}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    common = {**provenance(device), "time": moment.isoformat(timespec="seconds")}
    failed = 0
    with out.open("w", encoding="utf-8") as file:
        for workload in workloads(tiny=device.type == "cpu"):
            result = measured(workload, device)
            failed += result["gate"] == "failed"
            print(json.dumps({**common, "workload": asdict(workload), **result}), file=file)
            times = result.get("microseconds", {})
            shown = "  ".join(f"{name} {t['p50']:8.1f} us" for name, t in times.items())
            print(f"{workload.site:10} {workload.rows:5} rows  {result['gate']}  {shown}")
    print(f"wrote {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
