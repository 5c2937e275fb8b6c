"""Time ours against the others on this machine: a line of JSON for each workload and provider.

    python bench/run.py --smoke       the sites of an 8B model, in a few minutes on a GPU
    python bench/run.py --headline    the questions of docs/benchmarks.md
    python bench/run.py --subsets     two and four adapters a row, FlashInfer's kernel among others
    python bench/run.py --grid        everything, about an hour
    --sites "8B o"                    only these layers; --compile: each call once, no times, which
                                      fills Triton's cache (several processes may do so at once)
    python bench/run.py --cpu         the CPU's cells, 12 minutes; --quick: the smallest layer;
                                      --count: FLOPs and allocated bytes, no times

Every provider must first agree with the formula in fp64. Only then is it timed, interleaved with
the others. On a GPU the machine's own limits are measured too: a launch, a copy, and the base layer
by cuBLAS. Records go to bench/results/, and bench/plot.py draws them.
TRITON_INTERPRET=1 python bench/run.py --tiny tries the script without a GPU; ignore its times.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

import workloads
from engines import PEERS
from lora_mux.measure import timing
from lora_mux.measure.provenance import ROOT, provenance
from providers import CPU, CUDA, NO_ANSWERS, WHOLE_LAYERS, Call, NotApplicable, Provider
from work import Work, work
from workloads import Problem, Workload

# The largest error against fp64, as a share of the answer's norm. In bf16 the others round h, x or
# both; a wrong adapter makes it 1.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRIDS: dict[str, Callable[[], Iterator[Workload]]] = {
    "smoke": workloads.smoke,
    "headline": workloads.headline,
    "subsets": workloads.subsets,
    "grid": workloads.grid,
    "cpu": workloads.cpu,
    "tiny": workloads.tiny,
}


class Timed(NamedTuple):
    """How long a provider takes."""

    sets: int  # of buffers, which its calls go through in turn
    microseconds: timing.Times


@dataclass(frozen=True)
class Record:
    """What came of one provider on one workload."""

    provider: str
    gate: Literal["passed", "failed", "not applicable", "none"]  # none: it gives no answer
    error: float | None = None  # against the formula in fp64, as a share of the answer's norm
    reason: str | None = None  # why it is not applicable, or what it raised
    figures: Timed | Work | None = None

    def fields(self) -> dict[str, Any]:
        """What stands in a line of JSON."""
        told = {"error": self.error} if self.reason is None else {"reason": self.reason}
        figures = {} if self.figures is None else self.figures._asdict()
        return {"provider": self.provider, "gate": self.gate, **told, **figures}


# The calls of each provider, one for each set of buffers -> what they cost.
Meter: TypeAlias = Callable[[Mapping[str, Sequence[Call]]], Mapping[str, Timed | Work]]


@dataclass(frozen=True)
class Timer:
    """A meter of times; its fields are arguments of timing.microseconds."""

    device: torch.device
    runs: int = 100
    seconds: float = timing.SECONDS
    least: int = 3

    def __call__(self, ready: Mapping[str, Sequence[Call]]) -> dict[str, Timed]:
        sets = max(map(len, ready.values()), default=1)
        calls = {name: lambda n, made=made: made[n]() for name, made in ready.items()}
        times = timing.microseconds(
            calls, sets, self.device, self.runs, seconds=self.seconds, least=self.least
        )
        return {name: Timed(sets, took) for name, took in times.items()}


def count(ready: Mapping[str, Sequence[Call]]) -> dict[str, Work]:
    """A meter of what a call does, on a CPU."""
    return {name: work(made[0]) for name, made in ready.items()}


def compile_only(ready: Mapping[str, Sequence[Call]]) -> dict[str, Timed]:
    """A meter that measures nothing: what was called has been compiled."""
    return {}


def linear_base(problem: Problem) -> Call:
    """The base layer: a module as ours is, whose call costs 20 us on a CPU with cold caches."""
    with torch.device("meta"):
        linear = nn.Linear(problem.W.shape[1], problem.W.shape[0], bias=False)
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    return lambda: linear(problem.x)


def no_base(problem: Problem) -> Call:
    """No base layer: y is there already, and each call adds to it."""
    y = nn.functional.linear(problem.x, problem.W)
    return lambda: y


# What is measured: a layer with its adapters, or the adapters' part by itself.
BASES = {"layer": linear_base, "adapters": no_base}


def bytes_of_a_call(workload: Workload, what: str) -> int:
    """What each provider must read and write: x, y, the adapters in use, and the base's weight."""
    w = workload
    used = min(w.adapters, w.samples * w.selections)
    rank_rows = sum(w.ranks[i % len(w.ranks)] for i in range(used))
    weight = w.K * w.N if what == "layer" else 0
    return w.torch_dtype.itemsize * (weight + (w.rows + rank_rows) * (w.K + w.N))


def measure(
    workload: Workload,
    what: str,
    providers: Mapping[str, Provider],
    device: torch.device,
    meter: Meter,
) -> list[Record]:
    """A record of each provider: checked against fp64, and metered if it may be."""
    sets = timing.sets_for_cold_l2(bytes_of_a_call(workload, what), device)
    problems = [workloads.problem(workload, device, seed=n) for n in range(sets)]
    checked = [check(name, provider, problems, what) for name, provider in providers.items()]
    figures = meter({record.provider: calls for record, calls in checked if calls})
    return [replace(record, figures=figures.get(record.provider)) for record, _ in checked]


def check(
    name: str, provider: Provider, problems: Sequence[Problem], what: str
) -> tuple[Record, list[Call]]:
    """The provider's record, and its call for each problem; no calls if it is not to be metered."""
    first, error = problems[0], None
    try:
        if what == "adapters" and name in WHOLE_LAYERS:
            raise NotApplicable("a whole layer")
        y = provider(first, linear_base(first))()
        if name not in NO_ANSWERS:
            error = first.error(y)
            if not error <= LARGEST_ERROR[first.workload.torch_dtype]:
                return Record(name, "failed", error), []
        calls = [provider(problem, BASES[what](problem)) for problem in problems]
    except NotApplicable as reason:
        return Record(name, "not applicable", reason=str(reason)), []
    except Exception as error:  # an hour of the others' figures is not lost to one of them
        return Record(name, "failed", reason=f"{type(error).__name__}: {error}"), []
    return Record(name, "none" if error is None else "passed", error), calls


def ceilings(device: torch.device) -> dict[str, float]:
    """The machine's own: a launch and two in a graph, in microseconds, and a copy, in TB/s."""
    x = torch.zeros(1, device=device)
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device).unbind()
    times = timing.microseconds(
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


def show(workload: Workload, what: str, records: Sequence[Record], statistic: str) -> None:
    """The workload and what each provider took, as a share of the base layer."""
    w = workload
    print(
        f"{w.site} {w.dtype}, {w.rows} rows, {w.adapters} adapters of rank {w.ranks}, "
        f"J = {w.selections}, {w.popularity}: {what}"
    )
    took = {
        record.provider: record.figures.microseconds[statistic]
        for record in records
        if isinstance(record.figures, Timed)
    }
    for record in records:
        print(f"    {record.provider:24} {_outcome(record, took)}", flush=True)


def _outcome(record: Record, took: Mapping[str, float]) -> str:
    if record.provider in took:
        own, base = took[record.provider], took.get("base")
        share = f" {own / base:6.3f} x base" if base else ""
        assert isinstance(record.figures, Timed)
        how = ", without a graph" if record.figures.microseconds.get("syncs") else ""
        return f"{own:10.1f} us{share}{how}"
    if isinstance(record.figures, Work):
        flops, allocated = record.figures
        return f"{flops / 1e6:10.1f} MFLOP {allocated / 1e6:10.2f} MB"
    if record.gate == "failed" and record.error is not None:
        return f"WRONG by {record.error:.1e} of the norm"
    return record.reason or ""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grids = parser.add_mutually_exclusive_group(required=True)
    for name in GRIDS:
        grids.add_argument(f"--{name}", dest="grid", action="store_const", const=name)
    parser.add_argument("--quick", action="store_true", help="with --cpu: the smallest layer only")
    parser.add_argument("--count", action="store_true", help="with --cpu: FLOPs, bytes, no times")
    parser.add_argument("--sites", nargs="+", choices=workloads.SITES, help="of an 8B or 70B model")
    parser.add_argument("--compile", action="store_true", help="only compile the kernels")
    parser.add_argument("--out", type=Path, help="default: bench/results/<grid>-<time>.jsonl")
    args = parser.parse_args(given)
    if (args.count or args.quick) and args.grid != "cpu":
        parser.error("--count and --quick go with --cpu")
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    cpu_cells = args.grid == "cpu"
    interpreted = not cpu_cells and os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if cpu_cells or interpreted else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no GPU; --cpu needs none", file=sys.stderr)
        return 2
    if cpu_cells:
        grid, providers, parts = workloads.cpu(args.quick), CPU, ["layer"]
        # Minima of three runs scatter by 40 % beside other processes.
        meter: Meter = count if args.count else Timer(device, runs=1000, least=8)
    else:
        grid, providers = GRIDS[args.grid](), {**CUDA, **PEERS}
        parts = ["layer"] if args.compile else ["layer", "adapters"]
        meter = Timer(device, seconds=0.0) if interpreted else Timer(device)
    if args.sites:
        grid = (workload for workload in grid if workload.site in args.sites)
    moment = datetime.now(timezone.utc)
    out = args.out or ROOT / "bench" / "results" / f"{args.grid}-{moment:%Y%m%d-%H%M%S}.jsonl"
    if args.compile:
        meter, out = compile_only, Path(os.devnull)
    out.parent.mkdir(parents=True, exist_ok=True)
    common = {**provenance(device), "speed": not interpreted}
    failed = 0
    with out.open("w", encoding="utf-8") as file, torch.inference_mode():
        if device.type == "cuda" and not args.compile:
            print(json.dumps({**common, "ceilings": ceilings(device)}), file=file, flush=True)
        for workload in grid:
            for what in parts:
                records = measure(workload, what, providers, device, meter)
                for record in records:
                    failed += record.gate == "failed" and record.provider.startswith("lora")
                    head = {**common, "workload": asdict(workload), "what": what}
                    print(json.dumps({**head, **record.fields()}), file=file, flush=True)
                show(workload, what, records, "p50" if device.type == "cuda" else "min")
    print(f"wrote {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
