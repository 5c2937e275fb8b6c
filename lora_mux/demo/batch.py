"""One batch in which rows choose their own adapters, and the same rows through PEFT, one by one."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_mux

from .encoder import Encoder, pooled
from .tasks import garble

DOCS_TASK = "noisy"  # its answers are the descriptions themselves


@dataclass(frozen=True)
class Row:
    """One query and the weights of its adapters; without adapters the base model reads it."""

    query: str
    adapters: Mapping[str, float]

    @property
    def label(self) -> str:
        """The adapters as the demo shows them: `noisy + 0.7 name`."""
        parts = (n if w == 1 else f"{w:g} {n}" for n, w in self.adapters.items())
        return " + ".join(parts) or "base"

    @property
    def task(self) -> str:
        """What the row asks for: the task of its last adapter, or else a description."""
        return next(reversed(list(self.adapters)), DOCS_TASK)


def demo_rows() -> list[Row]:
    """16 rows, 8 different routings: the base, four single adapters and three weighted mixes."""
    clean = [
        "Return a list of all the words in the text, split on whitespace.",
        "Raised when an operation runs out of time.",
    ]
    rng = random.Random(3)
    noisy = [
        garble("Open a connection to the mail server and log in.", rng),
        garble("Compress the data and write it to the file.", rng),
    ]
    singles: list[dict[str, float]] = [{}, {"name": 1.0}, {"kind": 1.0}, {"module": 1.0}]
    mixes = [{"noisy": 1.0}, {"noisy": 0.7, "name": 1.0}, {"noisy": 1.0, "kind": 1.0}]
    mixes.append({"noisy": 0.8, "module": 1.0})
    return [Row(q, a) for q in clean for a in singles] + [Row(q, a) for q in noisy for a in mixes]


def mixed_batch(encoder: Encoder, mux: lora_mux.Mux, rows: Sequence[Row]) -> tuple[Tensor, float]:
    """All rows in one forward pass: vectors [rows, hidden], and the seconds it took."""
    tokens = encoder.tokens([row.query for row in rows])
    with torch.no_grad(), mux.route([row.adapters for row in rows]):
        return _timed(lambda: pooled(encoder.model, tokens))


def peft_rows(
    encoder: Encoder, base: Any, folder: Path, names: Sequence[str], rows: Sequence[Row]
) -> tuple[Tensor, float]:
    """The same rows through PEFT, one at a time but padded alike, on a plain copy of the base."""
    peft: Any = importlib.import_module("peft")
    model = peft.PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.eval()
    tokens = encoder.tokens([row.query for row in rows])

    def run() -> Tensor:
        vectors = []
        for i, row in enumerate(rows):
            with _peft_adapters(model, row.adapters):
                vectors.append(pooled(model, {k: v[i : i + 1] for k, v in tokens.items()}))
        return torch.cat(vectors)

    with torch.no_grad():
        return _timed(run)


@contextmanager
def _peft_adapters(model: Any, adapters: Mapping[str, float]) -> Iterator[None]:
    """PEFT's own way to sum weighted adapters: several active ones, each layer's scale set."""
    if not adapters:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter(list(adapters))
    scaled = [m for m in model.modules() if hasattr(m, "set_scale")]
    for name, weight in adapters.items():
        for module in scaled:
            module.set_scale(name, weight)
    yield
    for name in adapters:
        for module in scaled:
            module.set_scale(name, 1.0)


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    run()  # the first pass pays for allocations and caches
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start
