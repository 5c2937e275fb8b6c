"""`lora-mux tune`: search tile sizes, warps, stages and splits for a GPU and a layer's sizes."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import tuned
from ..errors import BackendError
from ..progress import shown
from .cost import DTYPES, add_sizes, positive
from .provenance import provenance
from .timing import microseconds, sets_for_cold_l2

if TYPE_CHECKING:
    from ..kernels.config import Config

# What is tried for each field, besides what is chosen without measuring.
CHOICES: dict[str, tuple[int, ...]] = {
    "shrink_group": (1, 2, 4),
    "block_k": (32, 64, 128, 256),
    "split_k": (1, 2, 4, 8, 16),
    "shrink_warps": (2, 4, 8),
    "shrink_stages": (2, 3, 4),
    "expand_group": (1, 2, 4),
    "block_n": (32, 64, 128),
    "expand_warps": (2, 4, 8),
    "expand_stages": (1, 2, 3),
    "registers": (128, 168, 192, 255),
}
# No more memory than what three of the largest stages take: ptxas refuses anyway, after seconds.
SHARED = 200_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux tune`."""
    add_sizes(parser)
    parser.add_argument("--rounds", type=positive, default=2, help="over all fields (2)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help=f"default: {tuned.user_table()}")


def run(args: argparse.Namespace) -> int:
    """Tune each number of rows, and write the table that the package loads from then on.

    Raises:
        BackendError: there is no GPU.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("`--device` must be a GPU to tune for, and torch sees none")
    from ..kernels import launch

    out = args.out or tuned.user_table()
    entries = []
    for rows in args.rows:
        problem = Problem(args, rows, device)
        chosen = problem.chosen()
        best, times = search(problem, chosen, args.rounds)
        entries.append((problem.case, best, times))
        gain = times["chosen"] / times["tuned"]
        print(f"{rows:6} rows: {times['tuned']:.1f} us, {gain:.2f} times as fast as unmeasured")
    tuned.write(out, {**provenance(device), "device": launch.device_name(device)}, entries)
    print(f"wrote {out}")
    return 0


class Problem:
    """The pair of shrink and expand for one batch, as a function of the Config."""

    def __init__(self, args: argparse.Namespace, rows: int, device: torch.device) -> None:
        from ..kernels import config, launch

        K, N, R, J = args.in_features, args.out_features, args.rank, args.selections
        dtype, S = DTYPES[args.dtype], max(args.adapters, args.selections)
        self.case = tuned.Case(rows, K, N, R, J, dtype.itemsize)
        self.device, self.architecture = device, launch.architecture(device)
        self.block_m = config.tile_rows(rows, dtype.itemsize)
        self.sets = sets_for_cold_l2(dtype.itemsize * S * R * (K + N), device)
        self.buffers = []
        for _ in range(self.sets):
            index = torch.rand(rows, S).topk(J).indices.to(torch.int32)
            live = torch.full((1 << 16,), -1, dtype=torch.int32)
            live[:S] = torch.arange(S)
            plan = launch.plan(
                index.to(device),
                torch.ones(rows, J, device=device),
                live.to(device),
                S,
                self.block_m,
            )
            like: dict[str, Any] = {"device": device, "dtype": dtype}
            table = [torch.arange(S) * R, torch.full((S,), R), torch.ones(S)]
            offset, rank, scaling = (t.to(device) for t in table)
            self.buffers.append(
                (
                    torch.randn(rows, K, **like),
                    torch.randn(S * R, -(-K // 16) * 16, **like),
                    torch.zeros(S * R, -(-N // 16) * 16, **like),  # y stays finite
                    torch.zeros(rows, N, **like),
                    plan,
                    (offset.int(), rank.int(), scaling.float()),
                )
            )

    def chosen(self) -> "Config":
        """What is used as long as nothing was measured."""
        from ..kernels import config

        return config.choose(
            **self.case._asdict(), architecture=self.architecture, block_m=self.block_m
        )

    def call(self, config: "Config", n: int) -> None:
        """One shrink and one expand on the n-th set of buffers."""
        from ..kernels import launch

        x, A, B, y, plan, (offset, rank, scaling) = self.buffers[n]
        slots, strength, union, length, place, state = plan
        shape = launch.h_shape(slots, self.case.rank, config)
        h = torch.empty(shape, device=self.device, dtype=torch.float32)
        launch.shrink(x, A, h, strength, union, length, place, offset, rank, scaling, None, config)
        launch.expand(h, B, y, union, length, place, state, offset, rank, config)

    def microseconds(self, configs: dict[str, "Config"], runs: int) -> dict[str, float]:
        """Medians of interleaved runs."""
        calls = {name: lambda n, c=c: self.call(c, n) for name, c in configs.items()}
        times = microseconds(calls, self.sets, self.device, runs)
        return {name: time["p50"] for name, time in times.items()}


def search(problem: Problem, chosen: "Config", rounds: int) -> tuple["Config", dict[str, float]]:
    """Change one field after the other, keep what is faster by 2 %; rounds over all fields.

    Two kernels with independent fields, measured as the pair that is run: a full grid would take
    hours where this takes minutes.
    """
    best = chosen
    for field, values in shown([*CHOICES.items()] * rounds, f"{problem.case.rows} rows"):
        tried = {"best": best}
        for value in values:
            candidate = _with(best, field, value)
            if candidate is not None and candidate != best:
                tried[str(value)] = candidate
        times = problem.microseconds(_that_run(problem, tried), runs=30)
        fastest = min(times, key=lambda name: times[name])
        if times[fastest] < 0.98 * times["best"]:
            best = tried[fastest]
    times = problem.microseconds({"chosen": chosen, "tuned": best}, runs=100)
    # Measured once more, side by side: what was picked as the best of many may have been luck.
    if times["tuned"] > times["chosen"]:
        return chosen, {"chosen": times["chosen"], "tuned": times["chosen"]}
    return best, times


def _with(config: "Config", field: str, value: int) -> "Config | None":
    """The Config with one field changed; None when it can not be."""
    if field == "registers" and config.registers is None:
        return None  # AMD's compiler does not know the option
    candidate = replace(config, **{field: value})
    A_and_x = (16 * candidate.shrink_group + candidate.block_m) * candidate.block_k
    return candidate if 4 * A_and_x * candidate.shrink_stages <= SHARED else None


def _that_run(problem: Problem, tried: dict[str, "Config"]) -> dict[str, "Config"]:
    """Those that the compiler takes: shared memory and registers end somewhere."""
    running = {}
    for name, config in tried.items():
        try:
            problem.call(config, 0)
        except Exception as error:  # triton's own classes differ between versions
            if name == "best":
                raise
            print(f"left out {config}: {type(error).__name__}", file=sys.stderr)
        else:
            running[name] = config
    return running
