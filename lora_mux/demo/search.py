"""What the demo searches: the answers of each task, embedded once by the base model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .corpus import Corpus, Item
from .encoder import Encoder
from .tasks import Task, make_tasks


@dataclass(frozen=True)
class Index:
    """The answers of one task and their unit vectors [answers, hidden]."""

    answers: tuple[str, ...]
    vectors: Tensor

    def best(self, query: Tensor, count: int) -> list[str]:
        """The answers nearest to one query vector."""
        scores = self.vectors @ query
        return [self.answers[i] for i in scores.topk(min(count, len(self.answers))).indices]

    def accuracy(self, queries: Tensor, right: Sequence[str], macro: bool) -> float:
        """Share of queries whose nearest answer is right; averaged over the answers if `macro`."""
        found = (queries @ self.vectors.T).argmax(1).tolist()
        hits = torch.tensor([self.answers[f] == r for f, r in zip(found, right, strict=True)])
        if not macro:
            return hits.float().mean().item()
        groups = [[r == answer for r in right] for answer in dict.fromkeys(right)]
        return sum(hits[torch.tensor(g)].float().mean().item() for g in groups) / len(groups)


class Search:
    """The corpus, its tasks, and an index of each, which the base model makes."""

    def __init__(self, encoder: Encoder, corpus: Corpus) -> None:
        self.encoder = encoder
        self.corpus = corpus
        self.tasks = make_tasks(corpus)
        self.indexes = {name: self.index(task, corpus.items) for name, task in self.tasks.items()}

    def index(self, task: Task, items: Sequence[Item]) -> Index:
        """The task's answers among `items`."""
        answers = task.candidates(items)
        return Index(answers, self.encoder.index([task.describe(answer) for answer in answers]))

    def queries(self, task: Task, garbled: bool) -> list[str]:
        """The held-out queries of a task, garbled the same way at every call."""
        rng = random.Random(1)
        return [task.query(item, rng, garbled) for item in self.corpus.held_out]
