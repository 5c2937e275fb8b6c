"""The tables and the picture of docs/scale.md, from the record of bench/fleet.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plot

from .costs import adapter_bytes
from .routing import ROUTINGS

COLOURS = dict(zip(ROUTINGS, ("#999999", "#333333", "#edae49", "#d1495b", "#00798c"), strict=True))
Record = dict[str, Any]


def tables(records: list[Record]) -> list[str]:
    """Markdown, in the order of the page."""
    shown = costs_table, levels_table, scale_table, needed_table, mixes_table, deaths_table
    return [f(records) for f in shown]


def costs_table(records: list[Record]) -> str:
    """What the engine's work costs, where that comes from, and which flag takes another figure."""
    costs = records[0]["fleet"]["costs"]
    base, adapters = costs["base"], costs["adapters"]
    gpu = "h100-headline.jsonl"
    rows = (
        ("a step of 32 rows, no adapters", base[32], f"{gpu}, `base`, and 2 ms assumed", "step-ms"),
        ("a step of 1 row", base[1], f"{gpu}, `base`, and 2 ms assumed", "step-ms"),
        ("more for 8 adapters in a step", adapters[8], f"{gpu}, `lora_mux fused`", "adapter-us"),
        ("more for 32", adapters[32], f"{gpu}, the better of two, between ranks", "adapter-us"),
        ("a prompt of 512 tokens", 512 * costs["token"], f"{gpu}, `lora_mux`", "prompt-us"),
        ("a load, while the batch waits", costs["load"], "residency.jsonl, `first use`", "load-ms"),
        ("an eviction for it", costs["evict"], "residency.jsonl, `evicting each time`", "load-ms"),
    )
    lines = ["| what | takes | from | yours |", "|---" * 4 + "|"]
    lines += [
        f"| {what} | {_ms(took)} | {source} | `--{flag}` |" for what, took, source, flag in rows
    ]
    return "\n".join(lines)


def levels_table(records: list[Record]) -> str:
    """Where adapters are, how many fit there, and what it takes from there to the host."""
    fleet, bytes_ = records[0]["fleet"], adapter_bytes(16)
    lines = ["| level | adapters | bytes | until one is on the host | yours |", "|---" * 5 + "|"]
    levels = [["device", fleet["device"], None, None], *fleet["levels"]]
    for name, slots, wait, transfer in levels:
        took = "" if not transfer else f"{_ms(wait + transfer)}, one every {_ms(transfer)}"
        fits = "all | 84 TB" if slots is None else f"{slots:,} | {slots * bytes_ / 1e9:.0f} GB"
        flags = {"store": "`--store-ms`, `--store-gbps`", "disk": "`--disk`, `--disk-gbps`"}
        lines.append(f"| {name} | {fits} | {took} | {flags.get(name, f'`--{name}`')} |")
    return "\n".join(lines)


def scale_table(records: list[Record]) -> str:
    """By size of the fleet: hits, p50 and p99."""
    found = _grid(records, "scale", "replicas", "routing")
    cells = {(row, name): _all(r) for (row, name), r in found.items()}
    return _table("replicas", cells, ROUTINGS)


def needed_table(records: list[Record]) -> str:
    """By cost of a load: how many replicas."""
    found = _grid(records, "needed", "load", "routing")
    cells = {
        (f"{1000 * load:.0f} ms", name): str(r["replicas"] or "never")
        for (load, name), r in found.items()
    }
    return _table("a load takes", cells, ROUTINGS)


def mixes_table(records: list[Record]) -> str:
    """By adapters of a request: hits, p50 and p99."""
    cells = {
        (case["mix"], case["routing"] + ", by its rarest" * (case["key"] == "rarest")): _all(r)
        for r in records
        if r["simulation"] == "mixes"
        for case in [r["case"]]
    }
    return _table("adapters of a request", cells, dict.fromkeys(name for _, name in cells))


def deaths_table(records: list[Record]) -> str:
    """By routing: what a replica's death costs, before, while it is gone, and when it is back."""
    head = "| routing | hits before, dead, back | p99 before, dead, back | interrupted | lost |"
    lines = [head, "|---" * 5 + "|"]
    for r in (r for r in records if r["simulation"] == "deaths"):
        parts = [r[when] for when in ("before", "dead", "back")]
        hits = " / ".join(f"{100 * part['hits']:.1f} %" for part in parts)
        waits = " / ".join(_seconds(part["p99"]) for part in parts)
        lines.append(
            f"| {r['case']['routing']} | {hits} | {waits} | {r['interrupted']} | {r['lost']} |"
        )
    return "\n".join(lines)


def _grid(records: list[Record], part: str, row: str, column: str) -> dict[Any, Record]:
    return {(r["case"][row], r["case"][column]): r for r in records if r["simulation"] == part}


def _table(corner: str, cells: dict[Any, str], columns: Iterable[str]) -> str:
    columns = [*columns]
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in dict.fromkeys(row for row, _ in cells):
        found = " | ".join(cells[row, column] for column in columns)
        lines.append(f"| {row:,} | {found} |" if isinstance(row, int) else f"| {row} | {found} |")
    return "\n".join(lines)


def _all(r: Record) -> str:
    return f"{100 * r['hits']:.0f} %, {_seconds(r['p50'])}, {_seconds(r['p99'])}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def draw(records: list[Record], out: Path) -> None:
    """Hits and p99 by size of the fleet, and the replicas needed by cost of a load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = (
        ("scale", "replicas", "hits", "adapters that were on the device"),
        ("scale", "replicas", "p99", "p99 until the first token, s"),
        ("needed", "load", "replicas", "replicas needed"),
    )
    for axis, (part, across, up, title) in zip(axes, panels, strict=True):
        for name, colour in COLOURS.items():
            found = _grid(records, part, across, "routing")
            points = [(at, r[up]) for (at, of), r in found.items() if of == name and r[up]]
            across_, up_ = zip(*sorted(points), strict=True)
            axis.plot(across_, up_, color=colour, marker="o", markersize=3, label=name)
        axis.set_xscale("log")
        if up != "hits":
            axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds of a load" if across == "load" else across, fontsize=9)
    axes[0].set_ylim(0, 1)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"simulated, not measured: 1,000,000 adapters, commit {str(records[0]['commit'])[:10]}",
        fontsize=9,
    )
    plot.save(figure, out)
