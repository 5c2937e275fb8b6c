"""Run the loops of docs/training.md, and draw what they learn: python bench/learning.py

Writes bench/results/learning.jsonl, one line for each tenant: its losses in mixed batches, and
those of PEFT alone. `--draw` only draws what is there, as docs/images/learning.png.
"""

import argparse
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import plot
from lora_mux.measure.provenance import ROOT, provenance

RECORD, PICTURE = "bench/results/learning.jsonl", "docs/images/learning.png"
COLOURS = ("#d1495b", "#00798c", "#edae49")
GAP = 0.06  # of the loss, between two names in the picture
WINDOW = 10  # steps of the running mean that is drawn
Record = dict[str, Any]


def measure() -> list[Record]:
    """What the page's blocks find, as far as the comparison with PEFT."""
    page = (ROOT / "docs/training.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    known = provenance(torch.device("cpu"))
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own
        os.chdir(folder)
        try:
            while "alone" not in names:
                exec(blocks.pop(0), names)
        finally:
            os.chdir(here)
    return [
        {**known, "tenant": t, "rows": names["ROWS"][t], "lr": names["RATES"][t]}
        | {"mixed": names["curves"][t], "alone": names["alone"][t]}
        for t in names["curves"]
    ]


def sentence(records: list[Record]) -> str:
    """What docs/training.md says of the curves."""
    furthest = max(abs(a - b) for r in records for a, b in zip(r["mixed"], r["alone"], strict=True))
    steps = len(records[0]["mixed"])
    return f"over {steps} steps, no loss is further than {furthest:.1e} from PEFT's"


def smooth(losses: list[float]) -> list[float]:
    """The running mean."""
    return [
        sum(part) / len(part)
        for i in range(len(losses))
        for part in [losses[max(0, i - WINDOW + 1) : i + 1]]
    ]


def draw(records: list[Record], out: Path) -> None:
    """One picture of all tenants."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    places: dict[float, float] = {}
    for end in sorted(smooth(r["mixed"])[-1] for r in records):
        places[end] = max(end, max(places.values(), default=0.0) + GAP)
    for r, colour in zip(records, COLOURS, strict=True):
        mixed = smooth(r["mixed"])
        axis.plot(smooth(r["alone"]), color=colour, linewidth=5, alpha=0.3)
        axis.plot(mixed, color="black", linewidth=0.9, linestyle="--")
        axis.text(
            *(len(mixed) + 1, places[mixed[-1]], f"{r['tenant']}, {r['rows']} of 7 rows"),
            color=colour,
            va="center",
            fontsize=8,
        )
    axis.plot([], color="grey", linewidth=5, alpha=0.3, label="each alone, by PEFT")
    axis.plot([], color="black", linewidth=0.9, linestyle="--", label="all in one batch")
    axis.legend(frameon=False, fontsize=8)
    axis.set_xlim(0, len(records[0]["mixed"]) * 1.25)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(f"loss, mean of {WINDOW} steps", fontsize=9)
    axis.set_title(plot.origin(records[0], "torch", "peft"), fontsize=8)
    plot.save(figure, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw the record that is there")
    record = ROOT / RECORD
    if not parser.parse_args().draw:
        text = "".join(json.dumps(r) + "\n" for r in measure())
        record.write_text(text, encoding="utf-8")
    records = plot.read(record)
    draw(records, ROOT / PICTURE)
    print(sentence(records))


if __name__ == "__main__":
    main()
