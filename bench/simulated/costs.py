"""What things cost: from records where there are any, else assumptions, each with its flag.

Records are read, not copied: a figure here changes with the line that it comes from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from lora_mux.measure.provenance import ROOT

GPU, HOST = "bench/results/h100-headline.jsonl", "bench/results/residency.jsonl"
BLOCKS = 32  # of the 8B model whose four layers the GPU's record has
ROWS = 32  # the most that the record has of one step on all four layers

# The number of blocks, and [K, N] of the targets in each. The record has the 8B model's.
MODELS = {
    "8B": (BLOCKS, 2 * [(4096, 4096)] + 2 * [(4096, 1024)] + 3 * [(4096, 14336)]),
    "70B": (80, 2 * [(8192, 8192)] + 2 * [(8192, 1024)] + 3 * [(8192, 28672)]),
}


class Level(NamedTuple):
    """Where an adapter may lie, below the device."""

    name: str
    slots: float  # adapters that fit
    wait: float  # seconds until its first byte
    transfer: float  # seconds for which one adapter keeps the way from there busy


@dataclass(frozen=True)
class Costs:
    """Seconds. A step takes base[rows] + adapters[distinct] + selection * (named - rows)."""

    base: Sequence[float]
    adapters: Sequence[float]
    selection: float
    token: float  # of a prompt
    load: float  # of an adapter into the pool, while which the batch stands still
    evict: float  # of one that makes room for it

    def step(self, rows: int, distinct: int, named: int) -> float:
        """A step of `rows` that name `named` adapters, `distinct` ones among them."""
        return self.base[rows] + self.adapters[distinct] + self.selection * (named - rows)


def adapter_bytes(rank: int, model: str = "8B") -> int:
    """2 r (K + N) bytes for each target: A and B in 16 bits."""
    blocks, targets = MODELS[model]
    return 2 * rank * blocks * sum(K + N for K, N in targets)


@cache
def read(name: str) -> list[dict[str, Any]]:
    """The lines of a record."""
    return [json.loads(line) for line in (ROOT / name).read_text("utf-8").splitlines()]


def forward(provider: str, wanted: Mapping[str, Any]) -> float:
    """Seconds of the linear layers in one pass of the 8B model, by medians of the GPU's record."""
    took = {
        r["workload"]["site"]: r["microseconds"]["p50"]
        for r in read(GPU)
        if r.get("what") == "layer" and r["provider"] == provider
        if "microseconds" in r and wanted.items() <= _listless(r["workload"]).items()
    }
    if len(took) != 4:
        raise ValueError(f"{GPU} must have {provider} on 4 layers of {wanted}, got {sorted(took)}")
    return BLOCKS * float(sum(took.values())) / 1e6


def _listless(workload: dict[str, Any]) -> dict[str, Any]:
    return {**workload, "ranks": tuple(workload["ranks"])}


# Settings of the GPU's record; ranks apart, they are headlines of docs/benchmarks.md.
Setting = dict[str, Any]
ONE: Setting = {"samples": 1, "tokens": 1, "adapters": 1, "selections": 1, "ranks": (16,)}
EIGHT: Setting = {**ONE, "samples": 32, "adapters": 8, "weighted": True}
FOUR_OF_EIGHT = {**EIGHT, "selections": 4}
MIXED = {**EIGHT, "adapters": 32, "ranks": (8, 16, 32, 64, 128)}
PREFILL = {**EIGHT, "samples": 8, "tokens": 1024}


def rank_rows(workload: Mapping[str, Any]) -> float:
    """Rank rows that a uniform draw of the workload is expected to name."""
    n, ranks = workload["adapters"], workload["ranks"]
    named = 1 - (1 - workload["selections"] / n) ** workload["samples"]
    return float(named * sum(ranks[i % len(ranks)] for i in range(n)))


def added(workload: Mapping[str, Any]) -> float:
    """Seconds that adapters add to a step, by the best of our forms."""
    one_launch = workload["samples"] * workload["tokens"] <= ROWS  # there is none for more
    forms = ("lora_mux", "lora_mux fused") if one_launch else ("lora_mux",)
    return min(forward(form, workload) for form in forms) - forward("base", workload)


def load_and_evict(bytes_: float) -> tuple[float, float]:
    """Seconds by the record of residency, in proportion to bytes: minima, for it is a CPU's."""
    times = read(HOST)[0]["milliseconds"]["lora_mux"]
    first, evicting = times["first use"]["min"], times["route, evicting each time"]["min"]
    share = bytes_ / times["bytes of an adapter"] / 1e3
    return (first - times["route, resident"]["min"]) * share, (evicting - first) * share


def from_records(rank: int, most: int, rest: float) -> Costs:
    """Costs of the 8B model with adapters of one rank, up to `most` distinct ones in a batch.

    `rest` is what a step takes besides linear layers. No record has it: an assumption.
    """
    one, full = forward("base", ONE), forward("base", EIGHT)
    base = [one + (full - one) * (rows - 1) / (ROWS - 1) + rest for rows in range(ROWS + 1)]
    points = [(rank_rows(w), added(w)) for w in (ONE, EIGHT, MIXED)]
    adapters = [0.0, *(_between(points, rank * n) for n in range(1, most + 1))]
    more = ROWS * (FOUR_OF_EIGHT["selections"] - 1)
    load, evict = load_and_evict(adapter_bytes(rank))
    return Costs(
        base,
        adapters,
        (added(FOUR_OF_EIGHT) - added(EIGHT)) / more,
        forward("lora_mux", PREFILL) / (PREFILL["samples"] * PREFILL["tokens"]),
        load,
        evict,
    )


def _between(points: list[tuple[float, float]], x: float) -> float:
    """On the line through the two points around x, or through the nearest two."""
    (a, left), (b, right) = points[:2] if x <= points[1][0] else points[1:]
    return max(0.0, left + (right - left) * (x - a) / (b - a))
