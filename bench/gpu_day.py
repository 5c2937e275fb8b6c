"""Everything to do on the day a GPU is there: python bench/gpu_day.py --out DIR

Steps, in the order of what matters most; each is a process of its own, of ten minutes at most:

    tests         python -m pytest tests -m gpu
    memcheck      some of them under compute-sanitizer, where that is installed; racecheck as well
    launches      what a launch, a dependent launch, a fork and a join cost in a graph
    compile       the kernels of the next steps, in parallel, into Triton's cache
    headline      the questions of docs/benchmarks.md
    tune          tables for the layers of an 8B model on this GPU
    tuned         the questions again, with these tables
    smoke, grid   more workloads, as time allows

A step writes its records and its log at once, DIR/report.md says what passed and what lost, and a
second call goes on with the steps that have not ended well. No network is needed, and no more than
torch, triton, pytest, peft and transformers; pytest-xdist makes the tests faster.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import workloads

ROOT = Path(__file__).parents[1]
SECONDS = 600  # of a step, at most
Command = list[str]


@dataclass(frozen=True)
class Done:
    """What came of a step."""

    step: str
    ended: str  # "well", "with <return code>", "after too long", "left out: <why>"
    seconds: float


def steps(out: Path) -> Iterator[tuple[str, list[Command]]]:
    """(name, commands); the commands of "compile" run side by side, others one after the other."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--durations=10", "-m", "gpu", "-p", "no:cacheprovider"]
    # pytest-benchmark warns of xdist, and warnings are errors.
    workers = ["-n", "8", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    run = [python, "bench/run.py"]
    table = ["--out", str(out / "tuned.json")]

    yield "tests", [[*pytest, *workers, "tests"]]
    small = ["tests/kernels/test_gpu.py", "-k", "test_named_cases and (bfloat16 or Fused)"]
    for tool in ("memcheck", "racecheck"):
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        yield tool, [[*check, *pytest, *small]]
    yield "launches", [[python, "bench/launches.py", "--out", str(out / "launches.jsonl")]]
    sites = list(workloads.SITES)[:4]
    yield "compile", [[*run, "--headline", "--compile", "--sites", site] for site in sites]
    yield "headline", [[*run, "--headline", "--out", str(out / "headline.jsonl")]]
    sizes = [workloads.SITES[site] for site in sites]
    rows = ["--rows", "1", "32", "--rounds", "1"]
    yield (
        "tune",
        [
            [python, "-m", "lora_mux", "tune", "--in-features", str(K), "--out-features", str(N)]
            + rows
            + table
            for K, N in sizes
        ],
    )
    yield "tuned", [[*run, "--headline", "--out", str(out / "tuned.jsonl")]]
    for grid in ("smoke", "grid"):
        yield grid, [[*run, f"--{grid}", "--out", str(out / f"{grid}.jsonl")]]


def run_step(name: str, commands: Sequence[Command], out: Path, seconds: float) -> Done:
    """Run a step's commands; what they print goes to its log."""
    start = time.monotonic()
    if shutil.which(commands[0][0]) is None:
        return Done(name, f"left out: {commands[0][0]} is not installed", 0.0)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if name == "tuned":
        environment["LORA_MUX_TUNED"] = str(out / "tuned.json")
    if name in ("memcheck", "racecheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # an overrun would stay in a block
    together = len(commands) if name == "compile" else 1
    ended = "well"
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        for first in range(0, len(commands), together):
            running = [
                subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
                for command in commands[first : first + together]
            ]
            for process in running:
                try:
                    code = process.wait(max(1.0, start + seconds - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    ended = "after too long"
                else:
                    if code and ended == "well":
                        ended = f"with {code}"
    return Done(name, ended, time.monotonic() - start)


def report(out: Path, done: Sequence[Done]) -> str:
    """What happened, in Markdown."""
    lines = ["# What this GPU said", "", "| step | ended | seconds |", "|---|---|---|"]
    lines += [f"| {one.step} | {one.ended} | {one.seconds:.0f} |" for one in done]
    for one in done:
        path = out / f"{one.step}.log"
        if one.ended not in ("well",) and path.exists():
            tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            lines += ["", f"## {one.step} ended {one.ended}; its log ends with", "", *_code(tail)]
    for name in ("launches", "headline", "tuned", "smoke", "grid"):
        path = out / f"{name}.jsonl"
        if path.exists():
            records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            lines += ["", f"## {name}", "", *(_launches if name == "launches" else _lost)(records)]
    return "\n".join(lines) + "\n"


def _code(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _launches(records: Sequence[dict[str, Any]]) -> list[str]:
    return _code([f"{r['what']:44} {r['microseconds']['p50']:8.3f} us" for r in records])


def _lost(records: Sequence[dict[str, Any]]) -> list[str]:
    """Where another is faster than the best of ours, and whose answers were wrong."""
    lines = []
    cells: dict[str, dict[str, float]] = {}
    for r in records:
        if "workload" not in r:
            continue
        w = r["workload"]
        cell = (
            f"{w['site']}, {w['samples'] * w['tokens']} rows, {w['adapters']} adapters of rank "
            f"{w['ranks']}, J = {w['selections']}, {r['what']}"
        )
        if r["gate"] == "failed":
            lines.append(f"- WRONG: {r['provider']} at {cell}: {r.get('error', r.get('reason'))}")
        elif "microseconds" in r:
            cells.setdefault(cell, {})[r["provider"]] = r["microseconds"]["p50"]
    for cell, took in cells.items():
        ours = {n: t for n, t in took.items() if n in ("lora_mux", "lora_mux fused")}
        others = {n: t for n, t in took.items() if n != "base" and not n.startswith("lora_mux")}
        if ours and others:
            us, them = min(ours, key=lambda n: ours[n]), min(others, key=lambda n: others[n])
            word = "lost to" if others[them] < ours[us] else "ahead of"
            base = f", base {took['base']:.1f}" if "base" in took else ""
            lines.append(
                f"- {cell}: {us} {ours[us]:.1f} us, {word} {them} {others[them]:.1f} us{base}"
            )
    return lines


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name, _ in steps(Path())]
    parser.add_argument("--out", type=Path, required=True, help="a folder; made if it is missing")
    parser.add_argument("--steps", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a step, at most (600)")
    args = parser.parse_args(given)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    for name, commands in steps(out):
        kept = out / f"{name}.json"
        earlier = Done(**json.loads(kept.read_text("utf-8"))) if kept.exists() else None
        if earlier and (earlier.ended == "well" or name not in args.steps):
            done.append(earlier)
            continue
        if name not in args.steps:
            continue
        print(f"{name} ...", flush=True)
        done.append(run_step(name, commands, out, args.seconds))
        print(f"{name} ended {done[-1].ended}, {done[-1].seconds:.0f} s", flush=True)
        kept.write_text(json.dumps(asdict(done[-1])), encoding="utf-8")
        (out / "report.md").write_text(report(out, done), encoding="utf-8")
    print((out / "report.md").read_text("utf-8"))
    return 0 if all(one.ended == "well" or one.ended.startswith("left") for one in done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
