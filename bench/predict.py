"""Predictions, not measurements: what our launches would take on an H100.

    python bench/predict.py

A launch takes LAUNCH and WORK, and the longer of two: its bytes over BANDWIDTH, or the loads that
follow one another in a program times LATENCY, as often as programs take turns on a processor. The
loads are counted in the machine code by tests/support/load_chain.py, and test_codegen.py holds them
to CHAINS. The constants are an H100's: launches and base layers as it measured them, and two that
are fitted to one cell each. The first table predicts. The second says how far off that is from what
this H100 measured.
"""

import json
from collections import defaultdict
from statistics import median
from typing import NamedTuple

from lora_mux.kernels import config
from lora_mux.measure.provenance import ROOT
from workloads import Workload, headline

ARCHITECTURE = config.Architecture("wgmma", processors=132, shared=232448)
REGISTERS = 65536  # of a processor

# Microseconds, and bytes and FLOPs in each. From bench/results/h100-launches.jsonl:
LAUNCH = 1.26
JOIN = 0.3  # of a fork and its join, beyond the launches on the way
# From h100-headline.jsonl: a base layer takes START and its bytes or its FLOPs.
START, BANDWIDTH, FLOPS = 3.7, 2.85e6, 780e6
# Fitted to kernels whose chains were twice as long (commit ea5e5cb): a load that is waited for.
LATENCY = 0.353
# What shrink and expand do besides, each: search tables, pass barriers. From h100-headline.jsonl:
# of 4096 x 4096, 32 rows and 8 adapters they took 9.8 us together.
WORK = 2.31


class Chain(NamedTuple):
    """Loads that follow one another in a program, as load_chain.Chain."""

    before: int
    turn: float
    after: int


# (kernel, rows of a tile, width of a window) -> the most that a shipped config has on sm_90, in
# bf16 with rows of whole 16 elements, compiled by triton 3.6 and 3.7.
CHAINS = {
    ("shrink", 16, 16): Chain(1, 0.5, 1),
    ("shrink", 16, 32): Chain(2, 0.5, 1),
    ("shrink", 16, 64): Chain(2, 0.5, 2),
    ("shrink", 64, 16): Chain(2, 1 / 3, 2),
    ("shrink", 64, 32): Chain(2, 1 / 3, 2),
    ("shrink", 64, 64): Chain(2, 1 / 3, 2),
    ("expand", 16, 16): Chain(2, 2, 0),
    ("expand", 16, 32): Chain(2, 2, 0),
    ("expand", 16, 64): Chain(3, 3, 0),
    ("expand", 64, 16): Chain(3, 2, 0),
    ("expand", 64, 32): Chain(3, 2, 0),
    ("expand", 64, 64): Chain(3, 2, 0),
    ("fused", 16, 16): Chain(0, 1 / 3, 4),
    ("fused", 16, 64): Chain(0, 1 / 3, 5),
    ("fused", 32, 16): Chain(0, 1 / 3, 5),
    ("fused", 32, 64): Chain(0, 1 / 3, 7),
    ("fused's shrink", 16, 16): Chain(2, 1 / 3, 2),
    ("fused's shrink", 16, 64): Chain(2, 1 / 3, 3),
    ("fused's shrink", 32, 16): Chain(2, 1 / 3, 2),
    ("fused's shrink", 32, 64): Chain(2, 1 / 3, 3),
}


def chain_of(kernel: str, w: Workload, block_m: int) -> Chain:
    """With the narrowest window that is known and holds all adapters, or else the widest."""
    known = sorted(u for k, m, u in CHAINS if (k, m) == (kernel, block_m))
    return CHAINS[kernel, block_m, next((u for u in known if w.adapters <= u), known[-1])]


def up(a: float, b: float) -> int:
    """a / b, rounded up."""
    return int(-(-a // b))


def blocks(w: Workload, block_m: int) -> float:
    """The mean number of rank blocks in a tile's union."""
    mean = sum(up(w.ranks[i % len(w.ranks)], 16) for i in range(w.adapters)) / w.adapters
    rows = min(block_m, w.rows)
    if w.popularity == "distinct":
        return rows * w.selections * mean
    if w.popularity == "identical" or w.tokens >= rows:
        return w.selections * mean
    return w.adapters * (1 - (1 - w.selections / w.adapters) ** rows) * mean


def adapter_bytes(w: Workload, features: int) -> int:
    """Of A or of B of all adapters."""
    return 2 * features * sum(w.ranks[i % len(w.ranks)] for i in range(w.adapters))


def time(loads: float, waves: float, moved: float) -> float:
    """Of a kernel, without its launch."""
    return max(loads * max(1, waves) * LATENCY, moved / BANDWIDTH)


def resident(warps: int, registers: int | None) -> int:
    """Programs that a GPU holds at once."""
    return ARCHITECTURE.processors * (REGISTERS // (32 * warps * (registers or 255)))


def base(w: Workload) -> float:
    """The base layer's launch, by cuBLAS."""
    moved = 2 * (w.K * w.N + w.rows * (w.K + w.N))
    return START + max(moved / BANDWIDTH, 2 * w.rows * w.K * w.N / FLOPS)


def chosen(w: Workload) -> config.Config:
    return config.choose(w.rows, w.K, w.N, 2, ARCHITECTURE)


def shrink(w: Workload) -> float:
    """Its launch."""
    c = chosen(w)
    chain, tiles = chain_of("shrink", w, c.block_m), up(w.rows, c.block_m)
    wanted = up(blocks(w, c.block_m), c.shrink_group)
    groups = min(wanted, max(1, 2 * ARCHITECTURE.processors // (tiles * c.split_k)))
    steps = up(up(w.K, c.block_k), c.split_k)
    turn = 1 + (steps - 1) * chain.turn + chain.after
    waves = tiles * groups * c.split_k / resident(c.shrink_warps, c.registers)
    moved = adapter_bytes(w, w.K) + 2 * w.rows * w.K
    return LAUNCH + WORK + time(chain.before + up(wanted, groups) * turn, waves, moved)


def expand(w: Workload) -> float:
    """Its launch; y is read and written."""
    c = chosen(w)
    chain, tiles = chain_of("expand", w, c.block_m), up(w.rows, c.block_m)
    turns = up(blocks(w, c.block_m), c.expand_group)
    waves = tiles * up(w.N, c.block_n * c.walk) / resident(c.expand_warps, c.registers)
    loads = chain.before + 1 + (c.walk * turns - 1) * chain.turn + chain.after
    return LAUNCH + WORK + time(loads, waves, adapter_bytes(w, w.N) + 4 * w.rows * w.N)


def fused(w: Workload) -> float | None:
    """Base, shrink and expand in one launch; None for more rows than are taken together."""
    if w.rows > config.FUSED_ROWS:
        return None
    c = config.choose_fused(w.rows, w.N, ARCHITECTURE, w.selections)
    steps, union = up(w.K, c.block_k), blocks(w, c.block_m)
    # Base programs, until h is wanted; programs of shrink beside them.
    chain = chain_of("fused", w, c.block_m)
    waves = up(w.N, c.block_n) / resident(c.warps, c.registers)
    moved = 2 * (w.K * w.N + w.rows * (w.K + w.N)) + adapter_bytes(w, w.K + w.N)
    product = time(1 + (steps - 1) * chain.turn, waves, moved)
    first, wanted = chain_of("fused's shrink", w, c.block_m), up(union, c.shrink_group)
    groups = min(wanted, max(1, ARCHITECTURE.processors // c.split_k))
    turn = 1 + (up(steps, c.split_k) - 1) * first.turn + first.after
    h = time(first.before + up(wanted, groups) * turn, 1, 0)
    # And what follows, of which further rank blocks take expand's turns.
    turns = up(union, c.expand_group)
    further = chain_of("expand", w, 16).turn
    return START + max(product, WORK + h) + time(chain.after + (turns - 1) * further, 1, 0)


def layer(w: Workload) -> dict[str, float | None]:
    """Microseconds of a layer in each form, and of shrink and expand alone."""
    alone, first, second = base(w), shrink(w), expand(w)
    spare = adapter_bytes(w, w.K) / BANDWIDTH  # what shrink takes from the base beside it
    return {
        "base": alone,
        "pair": first + second,
        "separate": alone + first + second,
        "beside": max(alone + spare, first) + JOIN + second,
        "fused": fused(w),
    }


def measured() -> dict[Workload, dict[str, float | None]]:
    """The same of the H100's record, where it has a workload with weights."""
    what = {
        ("layer", "base"): "base",
        ("adapters", "lora_mux"): "pair",
        ("layer", "lora_mux"): "separate",
        ("layer", "lora_mux fused"): "fused",
    }
    found: dict[Workload, dict[str, float | None]] = defaultdict(dict)
    for line in (ROOT / "bench/results/h100-headline.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        name = what.get((record.get("what"), record.get("provider")))
        if name and "microseconds" in record and record["workload"]["weighted"]:
            fields = record["workload"] | {"ranks": tuple(record["workload"]["ranks"])}
            found[Workload(**fields)][name] = record["microseconds"]["p50"]
    return found


def settings() -> dict[str, list[Workload]]:
    """The headline questions, each with its layers."""
    found = defaultdict(list)
    for w in headline():
        ranks = f"rank {w.ranks[0]}" if len(w.ranks) == 1 else "ranks 8 to 128"
        adapters = f"{w.adapters} adapters" if w.adapters > 1 else "1 adapter"
        each = f", {w.selections} a row" if w.selections > 1 else ""
        if w.weighted:
            rows = f"{w.rows} rows" if w.rows > 1 else "1 row"
            found[f"{rows}, {adapters} of {ranks}{each}"].append(w)
    return found


def total(layers: list[dict[str, float | None]], name: str) -> float | None:
    """Of a setting; None where a layer has no number."""
    times = [one.get(name) for one in layers]
    return None if None in times else sum(t for t in times if t is not None)


def predictions() -> str:
    """The first table."""
    lines = [
        "| predicted | layers | base, us | shrink and expand, us | separate | beside | fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, workloads in settings().items():
        layers = [layer(w) for w in workloads]
        alone, pair = total(layers, "base"), total(layers, "pair")
        assert alone is not None
        times = (total(layers, form) for form in ("separate", "beside", "fused"))
        shares = ("" if t is None else f"{t / alone:.2f}" for t in times)
        cells = [name, str(len(layers)), f"{alone:.0f}", f"{pair:.1f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def errors() -> dict[str, dict[str, float]]:
    """Setting -> the share by which the model is above what the H100 measured."""
    record = measured()
    found: dict[str, dict[str, float]] = {}
    for name, workloads in settings().items():
        pairs = [layer(w) for w in workloads], [record[w] for w in workloads]
        found[name] = {}
        for column in ("base", "pair", "separate", "fused"):
            predicted, real = (total(layers, column) for layers in pairs)
            if predicted is not None and real is not None:
                found[name][column] = predicted / real - 1
    return found


def comparison() -> str:
    """The second table."""
    lines = ["| | base | shrink and expand | separate | fused |", "|---|---|---|---|---|"]
    for name, each in errors().items():
        cells = (
            f"{round(100 * each[c]):+d} %" if c in each else ""
            for c in ("base", "pair", "separate", "fused")
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = [abs(each[c]) for each in errors().values() for c in each if c != "base"]
    return "\n".join(lines) + (
        f"\n\nBut for the base, half of the {len(found)} figures are within "
        f"{100 * median(found):.0f} %, and the worst is {100 * max(found):.0f} % off."
    )


def main() -> None:
    assert __doc__ is not None
    print(__doc__.splitlines()[0])
    print("\nOf the kernels as they are; shares of the base, summed over the layers:\n")
    print(predictions())
    print("\nThe same against what the H100 measured:\n")
    print(comparison())


if __name__ == "__main__":
    main()
