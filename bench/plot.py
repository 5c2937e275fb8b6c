"""Draw the records: python bench/plot.py bench/results/cpu.jsonl [more] --out docs/images

For each file a picture with one panel for each layer: what every provider takes, as a share of the
base layer alone. Ours and the roofline in colour, the others in grey, their names at the lines'
ends. For a GPU the roofline is the machine's own, measured in the same run, and the table of
headline goals is printed; for a CPU the table of docs/benchmarks.md. Nothing is drawn that no
record holds.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = {
    "lora_mux": "#d1495b",
    "lora_mux fused": "#7b2d8b",
    "lora_mux as a module": "#edae49",
    "roofline": "#00798c",
}
GREYS = ["#333333", "#555555", "#777777", "#999999", "#bbbbbb"]
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def statistic(record: Record) -> float:
    """Medians count on a GPU, minima on a CPU: lora_mux.measure.timing says why."""
    times: dict[str, float] = record["microseconds"]
    return times["min"] if "CPU" in record["device"] else times["p50"]


def label(workload: Record) -> str:
    """What a panel shows."""
    rows = workload["samples"] * workload["tokens"]
    return f"{workload['K']} x {workload['N']}, {workload['dtype']}, {rows} rows"


def roofline(workload: Record, ceilings: Record) -> float:
    """Microseconds that the machine's own copy and cuBLAS would need for all bytes and FLOPs."""
    w = workload
    rows, J = w["samples"] * w["tokens"], w["selections"]
    used = min(w["adapters"], w["samples"] * J)
    rank_rows = sum(w["ranks"][i % len(w["ranks"])] for i in range(used))
    rank = rank_rows / used
    moved = 2 * (w["K"] * w["N"] + rows * (w["K"] + w["N"]) + rank_rows * (w["K"] + w["N"]))
    flops = 2 * rows * (w["K"] * w["N"] + J * rank * (w["K"] + w["N"]))
    return max(moved / ceilings["copy_TBps"], flops / ceilings["TFLOPs"]) / 1e6


def ceilings_of(records: list[Record]) -> Record | None:
    """The machine's limits, measured in the same run; None on a CPU."""
    measured = next((dict(r["ceilings"]) for r in records if "ceilings" in r), None)
    if measured is None:
        return None
    measured["TFLOPs"] = max(
        2 * w["samples"] * w["tokens"] * w["K"] * w["N"] / statistic(r) / 1e6
        for r in records
        if r.get("provider") == "base" and "microseconds" in r
        for w in (r["workload"],)
    )
    return measured


def panels(records: list[Record]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Panel -> provider -> (case, time as a share of the base), in the order of the records."""
    base = {
        json.dumps(r["workload"]): statistic(r)
        for r in records
        if r.get("provider") == "base" and r["what"] == "layer" and "microseconds" in r
    }
    found: dict[str, dict[str, list[tuple[str, float]]]] = defaultdict(lambda: defaultdict(list))
    ceilings = ceilings_of(records)
    for r in records:
        if "microseconds" not in r or r["what"] != "layer" or r["provider"] == "lora_mux plan":
            continue
        w, name, took = r["workload"], r["provider"], statistic(r)
        if name == "base":
            if ceilings is None:
                continue
            name, took = "roofline", roofline(w, ceilings)
        case = f"{w['adapters']} / {w['selections']}"
        found[label(w)][name].append((case, took / base[json.dumps(w)]))
    return found


def draw(records: list[Record], out: Path) -> None:
    """One picture of all panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = panels(records)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (title, providers) in zip(axes.flat, found.items(), strict=False):
        cases = list(dict.fromkeys(case for points in providers.values() for case, _ in points))
        greys = iter(GREYS * 3)
        for name, points in providers.items():
            colour = OURS.get(name) or next(greys)
            at = [cases.index(case) for case, _ in points]
            shares = [share for _, share in points]
            axis.plot(
                *(at, shares),
                color=colour,
                linewidth=2.5 if name in OURS else 1,
                marker="o",
                markersize=3,
                zorder=3 if name in OURS else 2,
            )
            axis.annotate(
                name,
                (at[-1], shares[-1]),
                (4, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                fontsize=7,
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
        axis.minorticks_off()
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
        axis.set_xlim(-0.3, len(cases) + 1)
        axis.set_title(title, fontsize=9)
    figure.supxlabel("distinct adapters / adapters of a row", fontsize=9)
    figure.supylabel("time, as a share of the base layer alone", fontsize=9)
    figure.suptitle(origin(records[0], "torch"), fontsize=9)
    save(figure, out)


def origin(record: Record, *packages: str) -> str:
    """Where a record comes from, for a title."""
    versions = (f"{package} {record[package]}" for package in packages)
    return ", ".join([record["device"], *versions, f"commit {str(record['commit'])[:10]}"])


def save(figure: Any, out: Path) -> None:
    """Write a picture, and let go of it."""
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


# Settings of docs/benchmarks.md and their goals, as shares of the base's linear layers.
HEADLINES = [
    (
        "decode, 32 rows, 8 adapters of rank 16",
        {"samples": 32, "adapters": 8, "selections": 1},
        1.07,
    ),
    ("decode, 1 row, 1 adapter of rank 16", {"samples": 1, "adapters": 1, "selections": 1}, 1.025),
    ("four weighted adapters a row, of 8", {"samples": 32, "adapters": 8, "selections": 4}, 1.08),
    ("prefill, 8192 rows, 8 requests", {"samples": 8, "tokens": 1024}, 1.08),
]


def headline_table(records: list[Record]) -> str:
    """Markdown: goal and measured share of the base, summed over the sites of a setting.

    A provider that was not measured on each of them has no share.
    """
    lines = ["| setting | goal | fused | separate | best other |", "|---|---|---|---|---|"]
    layers = [r for r in records if r.get("what") == "layer" and "microseconds" in r]
    for title, wanted, goal in HEADLINES:
        sites: dict[str, dict[str, float]] = defaultdict(dict)
        settings = {"weighted": True, "ranks": [16], **wanted}
        for r in layers:
            if all(r["workload"][key] == value for key, value in settings.items()):
                sites[r["provider"]][label(r["workload"])] = statistic(r)
        of_base = sites.pop("base", {})
        base = sum(of_base.values())
        mine = {
            name: sum(took.values())
            for name, took in sites.items()
            if took.keys() == of_base.keys()
        }
        share = {name: f"{took / base:.3f}" for name, took in mine.items()}
        others = {n: t for n, t in mine.items() if not n.startswith("lora_mux")}
        best = min(others, key=lambda name: others[name], default="")
        fused, separate = (
            share.get(name, "not measured") for name in ("lora_mux fused", "lora_mux")
        )
        other = f"{share[best]} ({best})" if best in share else "not measured"
        lines.append(f"| {title} | {goal} | {fused} | {separate} | {other} |")
    return "\n".join(lines)


GPU_COLUMNS = {
    "separate": ("lora_mux",),
    "fused": ("lora_mux fused",),
    "mask": ("masked",),
    "vLLM": ("vLLM",),
    "SGLang's best": ("SGLang triton_v2", "SGLang csgmv", "SGLang triton"),
    "merged": ("merged",),
}


def gpu_table(records: list[Record]) -> str:
    """Markdown: each layer and batch, the base in microseconds, and the others as shares of it.

    Without a base, which may have failed, there are no shares.
    """
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for r in records:
        if r.get("what") == "layer" and "microseconds" in r:
            w = r["workload"]
            ranks = f"{min(w['ranks'])} to {max(w['ranks'])}" if w["ranks"][1:] else w["ranks"][0]
            of_a_row = f"{w['selections']}{'' if w['weighted'] else ', no weights'}"
            batch = f"{w['samples'] * w['tokens']} | {w['adapters']} | {ranks} | {of_a_row}"
            cells[f"{w['K']} x {w['N']} | {batch}"][r["provider"]] = statistic(r)
    head = ["layer", "rows", "adapters", "rank", "of a row", "base, us", *GPU_COLUMNS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell, took in cells.items():
        if "base" not in took:
            continue
        found = [
            min((took[n] for n in names if n in took), default=None)
            for names in GPU_COLUMNS.values()
        ]
        shares = ["" if time is None else f"{time / took['base']:.2f}" for time in found]
        lines.append(f"| {cell} | {took['base']:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


BY_HAND = ("segments", "masked", "gather + bmm")
CPU_CASES = ("1 / 1", "16 / 1", "64 / 1", "16 / 4", "64 / 4")  # adapters / those of a row


def cpu_table(records: list[Record]) -> str:
    """Markdown: ours, ours as a module, the best form by hand, and PEFT, as shares of the base."""
    shares: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for title, providers in panels(records).items():
        for name, points in providers.items():
            for case, share in points:
                shares[title][case][name] = share
    cells = [cell for cases in shares.values() for cell in cases.values()]
    for cell in cells:
        cell["by hand"] = min(cell[name] for name in BY_HAND if name in cell)
    columns = "lora_mux", "lora_mux as a module", "by hand", "PEFT mixed"
    shown = [case for case in CPU_CASES if any(case in cases for cases in shares.values())]
    lines = [f"| layer | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for title, cases in shares.items():
        texts = [" / ".join(f"{cases[case][name]:.2f}" for name in columns) for case in shown]
        lines.append(f"| {title} | {' | '.join(texts)} |")
    for name in columns[:2]:
        near = sum(cell[name] <= 1.1 * cell["by hand"] for cell in cells)
        ahead = sum(cell[name] < cell["PEFT mixed"] for cell in cells)
        lines.append(
            f"\n{name}: within 10 % of the best form by hand in {near} of {len(cells)} cells, "
            f"ahead of PEFT's mixed batch in {ahead}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    for path in args.records:
        records = read(path)
        if not any("workload" in r and "microseconds" in r for r in records):
            print(f"{path}: no times of layers, nothing to draw")
            continue
        if not all(r.get("speed") for r in records):
            print(
                f"{path}: times of an interpreter are no speeds; nothing is drawn", file=sys.stderr
            )
            return 2
        draw(records, args.out / f"{path.stem}.png")
        print(f"wrote {args.out / path.stem}.png")
        on_cpu = "CPU" in records[0]["device"]
        print(cpu_table(records) if on_cpu else headline_table(records))
        if not on_cpu:
            print("", gpu_table(records), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
