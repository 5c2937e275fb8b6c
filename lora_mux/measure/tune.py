"""`lora-mux tune`: search tile sizes, warps, stages and splits for a GPU and a layer's sizes."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import BackendError
from ..ops import tuned
from ..progress import progress_bar
from .bench import add_sizes, positive
from .problem import Problem
from .provenance import provenance

if TYPE_CHECKING:
    from ..kernels.config import Config, FusedConfig, TileSizes

C = TypeVar("C", bound="TileSizes")
Call = Callable[[C, int], None]  # does its work on the n-th set of buffers

# The values tried for each field, besides the one chosen without measuring.
CHOICES: dict[str, tuple[int, ...]] = {
    "shrink_group": (1, 2, 4),
    "block_k": (32, 64, 128, 256),
    "split_k": (1, 2, 4, 8, 16),
    "shrink_warps": (2, 4, 8),
    "shrink_stages": (2, 3, 4),
    "expand_group": (1, 2, 4, 8),
    "block_n": (32, 64, 128),
    "walk": (1, 2, 4),
    "expand_warps": (2, 4, 8),
    "expand_stages": (1, 2, 3),
    "registers": (128, 168, 192, 255),
}
FUSED_CHOICES: dict[str, tuple[int, ...]] = {
    "block_n": (16, 32, 64, 128),
    "block_k": (32, 64, 128, 256),
    "shrink_group": (1, 2, 4),
    "split_k": (1, 2, 4),
    "expand_group": (1, 2, 4, 8),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6),
    "registers": (128, 168, 255),
}
# Bytes of shared memory, about as much as a program may have: ptxas refuses more, after seconds.
SHARED = 200_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux tune`."""
    add_sizes(parser)
    parser.description = (
        "Measure tile sizes, warps, stages and splits of the kernels on this GPU, and write the "
        "best into a table that lora_mux uses from then on."
    )
    add = parser.add_argument
    add("--rounds", type=positive, default=2, metavar="N", help="over all the fields to tune (2)")
    add("--device", default="cuda", metavar="DEVICE", help="the GPU to tune for (cuda)")
    add("--out", type=Path, metavar="FILE", help=f"the table ({tuned.user_table()})")


def run(args: argparse.Namespace) -> int:
    """Tune each number of rows, and write the table that the package loads from then on.

    Raises:
        BackendError: there is no GPU.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("`--device` must be a GPU to tune for, and torch sees none")
    from ..kernels import config, launch

    fuses = launch.FUSES and not config.obstacle(launch.capability(device), modern=True)
    out = args.out or tuned.user_table()
    entries, fused = [], []
    for rows in args.rows:
        problem = Problem(args, rows, device)
        best, times = search(problem, problem.pair, problem.chosen(), CHOICES, args.rounds)
        entries.append((problem.case, best, times))
        gain = times["chosen"] / times["tuned"]
        print(f"{rows:6} rows: {times['tuned']:.1f} us, {gain:.2f} times as fast as unmeasured")
        if problem.case.itemsize == 2 and fuses and rows <= config.FUSED_ROWS:
            case, best_fused, times = tune_fused(problem, best, args.rounds)
            fused.append((case, best_fused, times))
            separate, one = times["separate"], times["fused"]
            print(f"{'':6} whole layer: {separate:.1f} us, in one launch {one:.1f} us")
    tuned.write(out, {**provenance(device), "device": launch.device_name(device)}, entries, fused)
    print(f"wrote {out}")
    return 0


def tune_fused(
    problem: Problem, separate: "Config", rounds: int
) -> tuple[tuned.Case, "FusedConfig", dict[str, float]]:
    """(case, the best FusedConfig, microseconds of the layer in separate launches and in one)."""
    best, _ = search(problem, problem.fused, problem.chosen_fused(), FUSED_CHOICES, rounds)
    calls = {
        "separate": partial(problem.separate, separate),
        "fused": partial(problem.fused, best),
    }
    return problem.case._replace(selections=1), best, problem.microseconds(calls, runs=100)


def search(
    problem: Problem, call: Call[C], chosen: C, choices: dict[str, tuple[int, ...]], rounds: int
) -> tuple[C, dict[str, float]]:
    """(the best config, its microseconds and those of `chosen`), by changing one field at a time.

    A value is kept when it is faster by 2 %; `rounds` times over all fields. A full grid would take
    hours where this takes minutes.
    """
    best = chosen
    for field, values in progress_bar([*choices.items()] * rounds, f"{problem.case.rows} rows"):
        tried = {"best": best}
        for value in values:
            candidate = _with(best, field, value)
            if candidate is not None and candidate != best:
                tried[str(value)] = candidate
        running = _runnable(call, tried)
        calls = {name: partial(call, config) for name, config in running.items()}
        times = problem.microseconds(calls, runs=30)
        fastest = min(times, key=lambda name: times[name])
        if times[fastest] < 0.98 * times["best"]:
            best = tried[fastest]
    calls = {"chosen": partial(call, chosen), "tuned": partial(call, best)}
    times = problem.microseconds(calls, runs=100)
    # Measured once more, side by side: the best of many may have been lucky.
    if times["tuned"] > times["chosen"]:
        return chosen, {"chosen": times["chosen"], "tuned": times["chosen"]}
    return best, times


def _with(config: C, field: str, value: int) -> C | None:
    """The config with one field changed; None when that is impossible."""
    if field == "registers" and config.registers is None:
        return None  # AMD's compiler has no such option
    candidate = replace(config, **{field: value})
    return candidate if _staged(candidate) <= SHARED else None


def _staged(config: Any) -> int:
    """Bytes of shared memory that the loads under way take."""
    rows = config.block_m + 16 * config.shrink_group
    if hasattr(config, "shrink_stages"):
        return 4 * int(rows * config.block_k * config.shrink_stages)  # as if of fp32
    # The fused kernel takes 16-bit types only.
    return 2 * int(max(rows, config.block_m + config.block_n) * config.block_k * config.stages)


def _runnable(call: Call[C], tried: dict[str, C]) -> dict[str, C]:
    """The configs that compile: others need too much shared memory or too many registers."""
    running = {}
    for name, config in tried.items():
        try:
            call(config, 0)
        except Exception as error:  # triton's own classes differ between versions
            if name == "best":
                raise
            print(f"left out {config}: {type(error).__name__}", file=sys.stderr)
        else:
            running[name] = config
    return running
