"""Held-out quality: each adapter on each task, and mixes of two on garbled text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import lora_mux

from .search import Index, Search


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy of one routing on one task's held-out queries."""

    task: str
    garbled: bool
    adapters: tuple[str, ...]
    accuracy: float


class Quality:
    """Scores routings on the held-out items, each routing through lora_mux."""

    def __init__(self, search: Search, mux: lora_mux.Mux) -> None:
        self._search = search
        self._mux = mux
        held_out = search.corpus.held_out
        self._indexes: dict[str, Index] = {
            name: search.index(task, held_out) for name, task in search.tasks.items()
        }
        self._vectors: dict[tuple[bool, tuple[str, ...]], Tensor] = {}

    def score(self, task_name: str, garbled: bool, *adapters: str) -> Score:
        """The sum of these adapters on one task; without adapters the base model."""
        task = self._search.tasks[task_name]
        right = [task.label(item) for item in self._search.corpus.held_out]
        # Most items are methods, so each kind counts the same: chance is 0.25.
        accuracy = self._indexes[task_name].accuracy(
            self._queries(task_name, garbled, adapters), right, macro=task_name == "kind"
        )
        return Score(task_name, garbled, adapters, accuracy)

    def _queries(self, task_name: str, garbled: bool, adapters: tuple[str, ...]) -> Tensor:
        key = (garbled, adapters)  # the queries of all tasks are the same texts
        if key not in self._vectors:
            texts = self._search.queries(self._search.tasks[task_name], garbled)
            self._mux.set_adapter(adapters)
            try:
                self._vectors[key] = self._search.encoder.index(texts)
            finally:
                self._mux.set_adapter(None)
        return self._vectors[key]


def singles(quality: Quality, names: list[str]) -> list[list[Score]]:
    """A row for each task, a column for the base and for each adapter."""
    routings: list[tuple[str, ...]] = [(), *((name,) for name in names)]
    return [[quality.score(t, t == "noisy", *r) for r in routings] for t in names]


def mixes(quality: Quality, names: list[str]) -> list[list[Score]]:
    """For each task on garbled text: the base, its adapter, noisy alone, and both together."""
    tasks = [name for name in names if name != "noisy"]
    return [
        [quality.score(t, True, *r) for r in ((), (t,), ("noisy",), ("noisy", t))] for t in tasks
    ]
