"""`lora-mux demo`: one batch of a real model whose rows choose their own adapters.

all-MiniLM-L6-v2 searches Python's standard library; four adapters, trained by PEFT, change how
queries are read. Only what `run` needs is imported, and only when it runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DemoError

if TYPE_CHECKING:
    import lora_mux

    from .corpus import Corpus
    from .encoder import Encoder
    from .report import Report
    from .search import Search

# Of a clone; a wheel does not carry it.
ADAPTERS = Path(__file__).parents[2] / "examples" / "stdlib_search"
ALLOWED_DIFFERENCE = 1e-4
LIMITS = (
    "limits: top-1 on 250 held-out items, one seed; short garbled queries about things that are "
    "not in the standard library still get poor neighbours"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux demo`."""
    parser.add_argument("--text", help="answer a query of your own")
    parser.add_argument(
        "--adapters",
        type=adapter_weights,
        default={},
        metavar="NAME[=WEIGHT],...",
        help="the adapters for --text, e.g. name=1.0,noisy=0.5; without: the base model",
    )
    parser.add_argument("--evaluate", action="store_true", help="also measure held-out quality")
    parser.add_argument("--retrain", action="store_true", help="train the adapters anew with PEFT")
    parser.add_argument("--base", type=Path, help="folder of another transformers encoder")
    parser.add_argument(
        "--adapter-folder", type=Path, default=ADAPTERS, help="folder of PEFT folders"
    )


def adapter_weights(text: str) -> dict[str, float]:
    """`name=1.0,noisy=0.5` as a mapping; an adapter without a weight has weight 1."""
    weights = {}
    for part in text.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = float("nan")
        if not name or name in weights or not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected different adapters like name=1.0,noisy=0.5, got {text!r}"
            )
        weights[name] = value
    return weights


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 = as PEFT says, 1 = it differs from PEFT, 2 = it could not run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _check_options(args)
        _check_installed()
        with warnings.catch_warnings():
            # transformers and peft deprecate each other's names; that is no news for the reader.
            warnings.simplefilter("ignore", FutureWarning)
            return _run(args)
    except DemoError as error:
        print(f"lora-mux demo: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import lora_mux

    from .corpus import read_corpus
    from .encoder import load_encoder
    from .report import Report
    from .search import Search

    report = Report()
    encoder, corpus = load_encoder(args.base), read_corpus()
    if args.retrain:
        _retrain(report, encoder, corpus, args.adapter_folder)
    names = _adapter_names(args.adapter_folder)
    _check_adapters(args, names)
    base = copy.deepcopy(encoder.model)  # for PEFT, plain
    mux = lora_mux.attach(encoder.model)
    for name in names:
        mux.load(name, args.adapter_folder / name)
    search = Search(encoder, corpus)
    report.line(
        f"{len(corpus.items)} documented objects of {len(corpus.about)} packages, "
        f"indexed by the base model"
    )
    if args.text is not None:
        _answer(report, search, mux, args.text, args.adapters)
        code = 0
    else:
        code = _mixed_batch(report, search, mux, base, args.adapter_folder)
    if args.evaluate:
        _evaluate(report, search, mux)
    report.line(LIMITS)
    return code


def _check_options(args: argparse.Namespace) -> None:
    if args.adapters and args.text is None:
        raise DemoError("--adapters is for a query of your own: give it with --text")
    if args.retrain and args.adapter_folder == ADAPTERS and not ADAPTERS.parent.is_dir():
        raise DemoError("--retrain outside a clone of the repository needs --adapter-folder")


def _check_installed() -> None:
    missing = [name for name in ("transformers", "peft", "rich") if not _is_installed(name)]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed: pip install 'lora-mux[demo]'")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _adapter_names(folder: Path) -> list[str]:
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if not names:
        raise DemoError(
            f"no adapters in {folder}: clone the repository (they are in examples/), give "
            "--adapter-folder, or train them with --retrain"
        )
    return names


def _check_adapters(args: argparse.Namespace, names: list[str]) -> None:
    from .batch import demo_rows
    from .tasks import TASKS

    unknown = sorted(args.adapters.keys() - set(names))
    if unknown:
        raise DemoError(f"--adapters: unknown adapter {unknown[0]!r}; there are {', '.join(names)}")
    needed = set(TASKS) if args.evaluate else set()
    if args.text is None:
        needed |= {name for row in demo_rows() for name in row.adapters}
    if not needed <= set(names):
        raise DemoError(
            f"--adapter-folder: the adapters {', '.join(sorted(needed))} are needed, "
            f"got {', '.join(names)}; --text works with any"
        )


def _mixed_batch(
    report: Report, search: Search, mux: lora_mux.Mux, base: object, folder: Path
) -> int:
    from .batch import demo_rows, mixed_batch, peft_rows

    rows = demo_rows()
    ours, seconds = mixed_batch(search.encoder, mux, rows)
    cells = []
    for row, vector in zip(rows, ours, strict=True):
        best = search.indexes[row.task].best(vector, 1 if row.task == "noisy" else 3)
        cells.append([row.query, row.label, row.task, " | ".join(best)])
    routings = len({row.label for row in rows})
    report.table(
        f"one batch, {len(rows)} rows, {routings} routings",
        ["query", "adapters", "task", "best answers"],
        [[q, a, "doc" if t == "noisy" else t, b] for q, a, t, b in cells],
    )
    theirs, peft_seconds = peft_rows(search.encoder, base, folder, list(mux.adapters), rows)
    difference = (ours - theirs).abs().max().item()
    report.line(f"largest difference from PEFT: {difference:.1e}")
    report.line(
        f"this machine: {seconds * 1e3:.0f} ms for the batch, "
        f"{peft_seconds * 1e3:.0f} ms for PEFT row by row"
    )
    return 0 if difference < ALLOWED_DIFFERENCE else 1


def _answer(
    report: Report, search: Search, mux: lora_mux.Mux, text: str, adapters: dict[str, float]
) -> None:
    with mux.route([adapters]):
        vector = search.encoder.embed([text])[0]
    rows = [
        ["doc" if name == "noisy" else name, " | ".join(index.best(vector, 3))]
        for name, index in search.indexes.items()
    ]
    label = ", ".join(f"{n}={w:g}" for n, w in adapters.items()) or "base"
    report.table(f"{text!r} with {label}", ["task", "best answers"], rows)


def _evaluate(report: Report, search: Search, mux: lora_mux.Mux) -> None:
    from .quality import Quality, mixes, singles

    quality, names = Quality(search, mux), list(search.tasks)
    report.quality("each adapter on each task", ["base", *names], singles(quality, names))
    columns = ["base", "its adapter", "noisy", "noisy + its adapter"]
    report.quality("mixes of two on garbled text", columns, mixes(quality, names))


def _retrain(report: Report, encoder: Encoder, corpus: Corpus, folder: Path) -> None:
    from .encoder import MODEL_NAME
    from .tasks import make_tasks
    from .train import STEPS, save_adapter, train_adapter

    tasks = make_tasks(corpus)
    with report.progress(STEPS * len(tasks)) as advance:
        for name, task in tasks.items():
            model = train_adapter(
                encoder,
                task,
                corpus,
                lambda loss, name=name: advance(f"{name} (loss {loss:.2f})"),  # type: ignore[misc]
            )
            save_adapter(model, name, MODEL_NAME, folder)
