"""Time ours against the others on this machine: a line of JSON for each workload and provider.

    python bench/run.py --smoke       the sites of an 8B model, in a few minutes on a GPU
    python bench/run.py --headline    the questions of docs/benchmarks.md
    python bench/run.py --grid        everything, about an hour
    python bench/run.py --cpu         the CPU's cells, 12 minutes; --quick: the smallest layer;
                                      --count: FLOPs and allocated bytes, no times

Every provider must first agree with the formula in fp64; only then it is timed, interleaved with
the others. On a GPU also the machine's own limits: a launch, a copy, and the base layer by cuBLAS.
Records go to bench/results/; bench/plot.py draws them.
TRITON_INTERPRET=1 python bench/run.py --tiny tries the script without a GPU; no speeds.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import workloads
from engines import PEERS
from lora_mux.measure import timing
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import Times, microseconds, sets_for_cold_l2
from providers import CPU, CUDA, NO_ANSWERS, WHOLE_LAYERS, Call, NotApplicable, Provider
from work import work
from workloads import Problem, Workload

# Of the norm, against fp64. In bf16 the others round h, x or both; a wrong adapter costs 1.
GATE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRIDS: dict[str, Callable[[], Iterator[Workload]]] = {
    "smoke": workloads.smoke,
    "headline": workloads.headline,
    "grid": workloads.grid,
    "cpu": workloads.cpu,
    "tiny": workloads.tiny,
}


def linear_base(problem: Problem) -> Call:
    """The base layer: a module as ours is, whose call costs 20 us on a CPU with cold caches."""
    with torch.device("meta"):
        linear = nn.Linear(problem.W.shape[1], problem.W.shape[0], bias=False)
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    return lambda: linear(problem.x)


def adapters_only(problem: Problem) -> Call:
    """No base layer: y is there already, and each call adds to it."""
    y = nn.functional.linear(problem.x, problem.W)
    return lambda: y


def measured(
    workload: Workload,
    providers: dict[str, Provider],
    device: torch.device,
    alone: bool,
    count: bool,
) -> Iterator[dict[str, Any]]:
    """A record for each provider; `alone`: of the adapters without the base layer.

    `count`: of what a call does instead of how long it takes.
    """
    w = workload
    bytes_of_a_call = w.torch_dtype.itemsize * (w.K * w.N + w.rows * (w.K + w.N))
    sets = sets_for_cold_l2(bytes_of_a_call, device)
    problems = [workloads.problem(w, device, seed=n) for n in range(sets)]
    ready: dict[str, list[Call]] = {}
    for name, provider in providers.items():
        try:
            if alone and name in WHOLE_LAYERS:
                raise NotApplicable("a whole layer")
            y, error = provider(problems[0], linear_base(problems[0]))(), None
            if name not in NO_ANSWERS:
                error = problems[0].error(y)
                if not error <= GATE[w.torch_dtype]:
                    yield {"provider": name, "gate": "failed", "error": error}
                    continue
            base = adapters_only if alone else linear_base
            ready[name] = [provider(problem, base(problem)) for problem in problems]
        except NotApplicable as reason:
            yield {"provider": name, "gate": "not applicable", "reason": str(reason)}
        else:
            if device.type == "cuda" and not _can_be_captured(ready[name][0]):
                del ready[name]
                reason = "reads the GPU's values: no CUDA graph"
                yield {"provider": name, "gate": "not applicable", "reason": reason}
            else:
                gate = "none" if error is None else "passed"
                yield {"provider": name, "gate": gate, "error": error}
    if count:
        yield from ({"provider": name, **work(made[0])} for name, made in ready.items())
        return
    calls = {name: lambda n, made=made: made[n]() for name, made in ready.items()}
    runs = 100 if device.type == "cuda" else 1000  # there time is up before, except for small ones
    for name, times in microseconds(calls, sets, device, runs).items():
        yield {"provider": name, "sets": sets, "microseconds": times}


def _can_be_captured(call: Call) -> bool:
    try:
        timing.graph(lambda n: call(), sets=1)
    except RuntimeError:
        torch.cuda.synchronize()
        return False
    return True


def ceilings(device: torch.device) -> dict[str, float]:
    """The machine's own: a launch and two in a graph, in microseconds, and a copy, in TB/s."""
    x = torch.zeros(1, device=device)
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device).unbind()
    times = microseconds(
        {
            "launch": lambda n: x.add_(1),
            "two launches": lambda n: (x.add_(1), x.add_(1)),
            "copy": lambda n: target.copy_(source),
        },
        1,
        device,
    )
    return {
        "launch_us": times["launch"]["p50"],
        "two_launches_us": times["two launches"]["p50"],
        "copy_TBps": 2 * source.numel() / times["copy"]["p50"] / 1e6,
    }


def merge(records: Iterator[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One record for each provider: its gate and its times."""
    merged: dict[str, dict[str, Any]] = {}
    for record in records:
        merged.setdefault(record["provider"], {}).update(record)
    return merged


def show(workload: Workload, what: str, records: dict[str, dict[str, Any]], statistic: str) -> None:
    """The workload and what each provider took, as a share of the base layer."""
    w = workload
    print(
        f"{w.site} {w.dtype}, {w.rows} rows, {w.adapters} adapters of rank {w.ranks}, "
        f"J = {w.selections}, {w.popularity}: {what}"
    )
    times: dict[str, Times] = {n: r["microseconds"] for n, r in records.items() if "sets" in r}
    base = times.get("base", {}).get(statistic)
    for name, record in records.items():
        if name in times:
            ratio = f" {times[name][statistic] / base:6.3f} x base" if base else ""
            print(f"    {name:24} {times[name][statistic]:10.1f} us{ratio}")
        elif "flops" in record:
            megabytes = record["allocated_bytes"] / 1e6
            print(f"    {name:24} {record['flops'] / 1e6:10.1f} MFLOP {megabytes:10.2f} MB")
        elif record["gate"] == "failed":
            print(f"    {name:24} WRONG by {record['error']:.1e} of the norm")
        else:
            print(f"    {name:24} {record['reason']}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grids = parser.add_mutually_exclusive_group(required=True)
    for name in GRIDS:
        grids.add_argument(f"--{name}", dest="grid", action="store_const", const=name)
    parser.add_argument("--quick", action="store_true", help="with --cpu: the smallest layer only")
    parser.add_argument("--count", action="store_true", help="with --cpu: FLOPs, bytes, no times")
    parser.add_argument("--out", type=Path, help="default: bench/results/<grid>-<time>.jsonl")
    args = parser.parse_args()
    if (args.count or args.quick) and args.grid != "cpu":
        parser.error("--count and --quick go with --cpu")
    on_cpu = args.grid == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    if not on_cpu and not torch.cuda.is_available():
        print("bench: torch sees no GPU; --cpu needs none", file=sys.stderr)
        return 2
    device = torch.device("cpu" if on_cpu else "cuda")
    grid = workloads.cpu(args.quick) if args.grid == "cpu" else GRIDS[args.grid]()
    providers = CPU if args.grid == "cpu" else {**CUDA, **PEERS}
    moment = datetime.now(timezone.utc)
    out = args.out or ROOT / "bench" / "results" / f"{args.grid}-{moment:%Y%m%d-%H%M%S}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    common = {**provenance(device), "speed": args.grid == "cpu" or not on_cpu}
    if not common["speed"]:
        timing.SECONDS = 0.0
    elif args.grid == "cpu":
        timing.LEAST = 8  # minima of three scatter by 40 % beside other processes
    failed = 0
    with out.open("w", encoding="utf-8") as file, torch.inference_mode():
        if device.type == "cuda":
            print(json.dumps({**common, "ceilings": ceilings(device)}), file=file, flush=True)
        for workload in grid:
            for what in ("layer",) if args.grid == "cpu" else ("layer", "adapters"):
                found = measured(workload, providers, device, what == "adapters", args.count)
                records = merge(found)
                for record in records.values():
                    failed += record["gate"] == "failed" and record["provider"].startswith("lora")
                    line = {**common, "workload": asdict(workload), "what": what, **record}
                    print(json.dumps(line), file=file, flush=True)
                show(workload, what, records, "p50" if device.type == "cuda" else "min")
    print(f"wrote {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
