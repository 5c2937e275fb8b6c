"""The command `lora-mux demo`: its options, what it checks first, and what it shows in turn.

The packages of the extra `demo` are imported by name, and only when the demo runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import warnings
from pathlib import Path

import lora_mux

from .batch import demo_rows, mixed_batch, peft_rows
from .corpus import PACKAGES, QUICK_PACKAGES, Corpus, read_corpus
from .encoder import MODEL_NAME, Encoder, load_encoder
from .quality import Quality, mixes, singles
from .report import Report
from .search import Search
from .tasks import TASKS, make_tasks
from .train import STEPS, save_adapter, train_adapter

SHIPPED = Path(__file__).parent / "adapters"
ALLOWED_DIFFERENCE = 1e-4
LIMITS = (
    "Limits: the adapters were trained with one seed. Garbled queries often get poor answers, "
    "the more so when they are short or about something outside the standard library."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux demo`."""
    parser.description = (
        "Search Python's standard library with a small encoder and four LoRA adapters. One batch "
        "of 16 rows uses 8 different mixes of adapters, and PEFT checks the result row by row. "
        "Exit code 0: the results agree; 1: they differ; 2: the demo could not run."
    )
    parser.add_argument("--text", metavar="QUERY", help="answer a query of your own instead")
    parser.add_argument(
        "--adapters",
        type=adapter_weights,
        default={},
        metavar="ROW",
        help="the adapters for --text, such as name+0.5*noisy (default: the base model alone)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"search only {len(QUICK_PACKAGES)} packages of the library, in a tenth of the time",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="also measure quality on held-out text"
    )
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="first train the adapters with PEFT and save them in --adapter-folder",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="a transformers encoder to use in place of the demo's own",
    )
    parser.add_argument(
        "--adapter-folder",
        type=Path,
        metavar="FOLDER",
        help="a folder of PEFT checkpoints (default: the four that come with lora-mux)",
    )


def adapter_weights(text: str) -> dict[str, float]:
    """The row of adapters in a text, such as `name+0.5*noisy`."""
    try:
        return lora_mux.parse_row(text)
    except lora_mux.errors.RoutingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0: it agrees with PEFT, 1: it differs.

    Raises:
        LoraMuxError: a package, a model or an adapter folder is missing or is not the expected
            one. The message says what the user can do.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _check_options(args)
    _check_installed()
    with warnings.catch_warnings():
        # transformers and peft deprecate each other's names, which is no news to the user.
        warnings.simplefilter("ignore", FutureWarning)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    report, folder = Report(), args.adapter_folder or SHIPPED
    encoder = load_encoder(args.base)
    corpus = read_corpus(QUICK_PACKAGES if args.quick else PACKAGES)
    if args.retrain:
        _retrain(report, encoder, corpus, folder)
    names = _adapter_names(folder)
    _check_adapters(args, names)
    base = copy.deepcopy(encoder.model)  # for PEFT, without lora_mux
    mux = lora_mux.attach(encoder.model)
    for name in names:
        mux.load(name, folder / name)
    report.line(
        f"The base model indexes {len(corpus.items)} documented objects of {len(corpus.about)} "
        f"packages{'.' if args.quick else ': a minute or two on two cores (--quick: seconds).'}"
    )
    search = Search(encoder, corpus)
    if args.text is not None:
        _answer(report, search, mux, args.text, args.adapters)
        code = 0
    else:
        code = _mixed_batch(report, search, mux, base, folder)
    if args.evaluate:
        _evaluate(report, search, mux)
    report.line(LIMITS)
    return code


def _check_options(args: argparse.Namespace) -> None:
    if args.adapters and args.text is None:
        raise lora_mux.LoraMuxError("--adapters applies to a query of your own: add --text QUERY")
    if args.retrain and args.adapter_folder is None:
        raise lora_mux.LoraMuxError(
            "--retrain needs a folder to save the new adapters in: add --adapter-folder FOLDER"
        )
    if args.quick and (args.retrain or args.evaluate):
        raise lora_mux.LoraMuxError(
            "--quick reads too little text for --retrain and --evaluate: leave out --quick"
        )


def _check_installed() -> None:
    missing = [name for name in ("transformers", "peft", "rich") if not _is_installed(name)]
    if missing:
        raise lora_mux.LoraMuxError(
            f"the demo needs {', '.join(missing)}: pip install 'lora-mux[demo]'"
        )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _adapter_names(folder: Path) -> list[str]:
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if not names:
        raise lora_mux.LoraMuxError(
            f"--adapter-folder: expected folders that PEFT saved inside {folder}, found none; "
            "leave the option out for the adapters that come with lora-mux, or add --retrain"
        )
    return names


def _check_adapters(args: argparse.Namespace, names: list[str]) -> None:
    unknown = sorted(args.adapters.keys() - set(names))
    if unknown:
        raise lora_mux.LoraMuxError(
            f"--adapters: no adapter is called {unknown[0]!r}; there are {', '.join(names)}"
        )
    needed = set(TASKS) if args.evaluate else set()
    if args.text is None:
        needed |= {name for row in demo_rows() for name in row.adapters}
    if not needed <= set(names):
        raise lora_mux.LoraMuxError(
            f"--adapter-folder: expected the adapters {', '.join(sorted(needed))}, "
            f"found {', '.join(names)}; a query of your own (--text) works with any"
        )


def _mixed_batch(
    report: Report, search: Search, mux: lora_mux.Mux, base: object, folder: Path
) -> int:
    rows = demo_rows()
    ours, seconds = mixed_batch(search.encoder, mux, rows)
    cells = []
    for row, vector in zip(rows, ours, strict=True):
        best = search.indexes[row.task].best(vector, 1 if row.task == "noisy" else 3)
        task = "doc" if row.task == "noisy" else row.task
        cells.append([row.query, row.label, task, " | ".join(best)])
    routings = len({row.label for row in rows})
    report.table(
        f"One batch: {len(rows)} rows, {routings} routings",
        ["query", "adapters", "task", "best answers"],
        cells,
    )
    theirs, peft_seconds = peft_rows(search.encoder, base, folder, list(mux.adapters), rows)
    difference = (ours - theirs).abs().max().item()
    report.line(f"Largest difference from PEFT: {difference:.1e}")
    report.line(
        f"On this machine: {seconds * 1e3:.0f} ms for the batch, "
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
    label = ", ".join(f"{n}={w:g}" for n, w in adapters.items()) or "the base model"
    report.table(f"{text!r} with {label}", ["task", "best answers"], rows)


def _evaluate(report: Report, search: Search, mux: lora_mux.Mux) -> None:
    quality, names = Quality(search, mux), list(search.tasks)
    report.quality("Each adapter on each task", ["base", *names], singles(quality, names))
    columns = ["base", "its adapter", "noisy", "noisy + its adapter"]
    report.quality("Sums of two on garbled text", columns, mixes(quality, names))


def _retrain(report: Report, encoder: Encoder, corpus: Corpus, folder: Path) -> None:
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
