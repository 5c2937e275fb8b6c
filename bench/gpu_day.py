"""Everything to do on the day a GPU is there: python bench/gpu_day.py --out DIR

Steps, in the order of what matters most; each is a process of its own, of ten minutes at most:

    tests         python -m pytest tests -m gpu
    memcheck      some of them under compute-sanitizer, where that is installed; racecheck as well
    compile       the kernels of the next steps, in parallel, into Triton's cache; compile-train
    launches      what a launch, a dependent launch, a fork and a join cost in a graph
    headline      the questions of docs/benchmarks.md
    subsets       several adapters a row, FlashInfer's kernel among the others
    train         training several adapters on one layer, against PEFT and forms by hand
    model         switching adapters in a whole model, against PEFT
    residency     adapters that are not all resident, against PEFT
    tune          tables for the layers of an 8B model on this GPU
    tuned         the questions again, with these tables
    smoke, grid   more workloads, as time allows
    plots         pictures of what was recorded, in each call again

The first five time nothing, and run side by side. A step writes its records and its log at once,
DIR/report.md says what passed and what lost, and a second call goes on with the steps that have not
ended well. No network is needed, and no more than torch, triton, pytest, peft and transformers;
pytest-xdist makes the tests faster, and matplotlib draws: `--steps plots` does so later, elsewhere.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import plot
import workloads

ROOT = Path(__file__).parents[1]
SECONDS = 600  # of a step, at most
TIMED = ("headline", "subsets", "tuned", "smoke", "grid")  # the records that are drawn


class Step(NamedTuple):
    """Commands that run side by side."""

    name: str
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = {}
    needs: str = ""  # a program, or a package, without which there is nothing to run
    times: bool = True  # so nothing else may run meanwhile


@dataclass(frozen=True)
class Done:
    """What came of a step."""

    step: str
    ended: str  # "well", "with <return code>", "after too long", "left out: <why>"
    seconds: float


def steps(out: Path) -> Iterator[Step]:
    """What is to be done, one step after the other."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--durations=10", "-m", "gpu", "-p", "no:cacheprovider"]
    # pytest-benchmark warns of xdist, and warnings are errors.
    workers = ["-n", "8", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    run = [python, "bench/run.py"]

    def records(name: str) -> list[str]:
        return ["--out", str(out / f"{name}.jsonl")]

    yield Step("tests", [[*pytest, *workers, "tests"]], times=False)
    small = ["tests/kernels/test_gpu.py", "-k", "test_named_cases and (bfloat16 or Fused)"]
    for tool in ("memcheck", "racecheck"):
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an overrun would stay in a block
        yield Step(tool, [[*check, *pytest, *small]], unpooled, needs=check[0], times=False)
    sites = list(workloads.SITES)[:4]
    compile_only = [*run, "--headline", "--compile", "--sites"]
    yield Step("compile", [[*compile_only, site] for site in sites], times=False)
    train = [python, "bench/train.py", "--device", "cuda", "--dtype", "bfloat16", "--width", "4096"]
    once = [*train, "--runs", "2", "--seconds", "0", "--out", os.devnull, "--cells"]
    cells = [[*once, str(number)] for number in range(6)]
    yield Step("compile-train", cells, needs="peft", times=False)
    yield Step("launches", [[python, "bench/launches.py", *records("launches")]])
    for grid in ("headline", "subsets"):
        yield Step(grid, [[*run, f"--{grid}", *records(grid)]])
    yield Step("train", [[*train, "--seconds", "4", *records("train")]], needs="peft")
    # Half a minute each: sizes and runs that a CPU's hour would have are left to it.
    fewer = {
        "model": "--least 2 --seconds 2",
        "residency": "--adapters 2000 --peft 16 --crowd 1000 --big 128 --registered 500",
    }
    for script, options in fewer.items():
        command = [python, f"bench/{script}.py", "--device", "cuda", *options.split()]
        yield Step(script, [[*command, *records(script)]], needs="peft")
    table = str(out / "table.json")
    for K, N in (workloads.SITES[site] for site in sites):
        tune = [python, "-m", "lora_mux", "tune", "--rows", "1", "32", "--rounds", "1"]
        sizes = ["--in-features", str(K), "--out-features", str(N)]
        yield Step(f"tune-{K}x{N}", [[*tune, *sizes, "--out", table]])
    yield Step("tuned", [[*run, "--headline", *records("tuned")]], {"LORA_MUX_TUNED": table})
    for grid in ("smoke", "grid"):
        yield Step(grid, [[*run, f"--{grid}", *records(grid)]])


def plots(out: Path) -> Step:
    """The pictures of what was recorded so far."""
    recorded = [str(path) for name in TIMED if (path := out / f"{name}.jsonl").exists()]
    draw = [sys.executable, "bench/plot.py", *recorded, "--out", str(out)]
    return Step("plots", [draw] if recorded else [], needs="matplotlib")


def is_missing(name: str) -> bool:
    """Whether there is neither a program nor a package of that name."""
    return shutil.which(name) is None and importlib.util.find_spec(name) is None


def run_step(step: Step, out: Path, seconds: float, stop: Event | None = None) -> Done:
    """Run a step's commands, until `stop` is set; what they print goes to its log."""
    if step.needs and is_missing(step.needs):
        return Done(step.name, f"left out: {step.needs} is not installed", 0.0)
    start, ended = time.monotonic(), "well"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            for command in step.commands
        ]
        try:
            for process in running:
                code = _wait(process, start + max(1.0, seconds), stop)
                if code and ended == "well":
                    ended = f"with {code}"
        except subprocess.TimeoutExpired:
            ended = "after too long"
        finally:  # with all that they started, which would disturb the times of the next step
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Done(step.name, ended, time.monotonic() - start)


def _wait(process: subprocess.Popen[bytes], end: float, stop: Event | None) -> int:
    """The return code of a process; TimeoutExpired at `end`, or soon after `stop` is set."""
    while True:
        try:
            return process.wait(min(0.5, max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end or (stop is not None and stop.is_set()):
                raise


def report(out: Path, done: Sequence[Done]) -> str:
    """What happened, in Markdown."""
    lines = ["# What this GPU said", "", "| step | ended | seconds |", "|---|---|---|"]
    lines += [f"| {one.step} | {one.ended} | {one.seconds:.0f} |" for one in done]
    for one in done:
        path = out / f"{one.step}.log"
        if one.ended not in ("well",) and path.exists():
            tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            lines += ["", f"## {one.step} ended {one.ended}; its log ends with", "", *_code(tail)]
    for name in ("launches", "train", "model", "residency"):
        path = out / f"{name}.log"
        if path.exists():
            lines += ["", f"## {name}", "", *_code(path.read_text(encoding="utf-8").splitlines())]
    for name in TIMED:
        path = out / f"{name}.jsonl"
        if path.exists():
            records = plot.read(path)
            tables = plot.headline_table(records), "", plot.gpu_table(records)
            lines += ["", f"## {name}", "", *_lost(records), "", *tables]
    for name in TIMED:
        if (out / f"{name}.png").exists():
            lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def _code(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


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


def _together(left: Sequence[Step]) -> Iterator[list[Step]]:
    """What may run side by side: neighbours that time nothing; every other step is alone."""
    for _, together in groupby(left, key=lambda step: step.name if step.times else ""):
        yield list(together)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [step.name for step in steps(Path())]
    parser.add_argument("--out", type=Path, required=True, help="a folder; made if it is missing")
    parser.add_argument(
        "--steps", nargs="+", choices=[*known, "plots"], default=known, help="default: all"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a step, at most (600)")
    args = parser.parse_args(given)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Done] = {}
    left: list[Step] = []
    stop = Event()

    def in_order() -> list[Done]:
        return [done[name] for name in (*known, "plots") if name in done]

    def run_and_keep(step: Step) -> None:
        done[step.name] = now = run_step(step, out, args.seconds, stop)
        (out / f"{step.name}.done").write_text(json.dumps(asdict(now)), encoding="utf-8")
        print(f"{step.name} ended {now.ended}, {now.seconds:.0f} s", flush=True)

    for step in steps(out):
        kept = out / f"{step.name}.done"
        if kept.exists():
            done[step.name] = Done(**json.loads(kept.read_text("utf-8")))
        if step.name in args.steps and not (kept.exists() and done[step.name].ended == "well"):
            left.append(step)
    for together in _together(left):
        print(f"{', '.join(step.name for step in together)} ...", flush=True)
        with ThreadPoolExecutor(len(together)) as threads:
            try:
                for _ in threads.map(run_and_keep, together):
                    pass
            except BaseException:  # an interrupt, which only this thread gets
                stop.set()
                raise
        (out / "report.md").write_text(report(out, in_order()), encoding="utf-8")
    done["plots"] = run_step(plots(out), out, args.seconds)
    (out / "report.md").write_text(report(out, in_order()), encoding="utf-8")
    print((out / "report.md").read_text("utf-8"))
    ends = [one.ended for one in done.values()]
    return 0 if all(end == "well" or end.startswith("left") for end in ends) else 1


if __name__ == "__main__":
    raise SystemExit(main())
