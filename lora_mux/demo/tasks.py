"""What each of the four adapters does: which query it reads, and which answers it looks for."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .corpus import Corpus, Item

TASKS = ("noisy", "name", "kind", "module")
KINDS = {
    "function": "a module level function",
    "method": "a method of an object",
    "class": "a class",
    "exception class": "an exception class, raised as an error",
}


@dataclass(frozen=True)
class Task:
    """Rank answers for a query.

    Attributes:
        name: The task's name, which is also its adapter's.
        garbled: Whether the query is garbled text rather than the clean description.
        label: The right answer to the query about an item, as the demo shows it.
        describe: The text to embed in place of an answer.
        answers: All possible answers, or None when every item brings its own.
    """

    name: str
    garbled: bool
    label: Callable[[Item], str]
    describe: Callable[[str], str]
    answers: tuple[str, ...] | None = None

    def candidates(self, items: Iterable[Item]) -> tuple[str, ...]:
        """The answers to choose from among `items`, each once."""
        return self.answers or tuple(dict.fromkeys(map(self.label, items)))

    def query(self, item: Item, rng: random.Random, garbled: bool | None = None) -> str:
        """The query whose right answer is `label(item)`."""
        garbled = self.garbled if garbled is None else garbled
        return garble(item.doc, rng) if garbled else item.doc


def make_tasks(corpus: Corpus) -> dict[str, Task]:
    """The demo's four tasks by name."""
    tasks = (
        Task("noisy", True, lambda item: item.doc, str),
        Task("name", False, lambda item: item.name, spaced),
        Task("kind", False, lambda item: item.kind, KINDS.__getitem__, tuple(KINDS)),
        Task(
            "module", False, lambda item: item.module, corpus.about.__getitem__, tuple(corpus.about)
        ),
    )
    assert tuple(task.name for task in tasks) == TASKS
    return {task.name: task for task in tasks}


def garble(text: str, rng: random.Random) -> str:
    """Drop most vowels inside words and one in twenty of the other characters."""
    kept = []
    for before, char in zip(" " + text.lower(), text.lower(), strict=False):
        inner_vowel = char in "aeiou" and before != " "
        if rng.random() >= (0.76 if inner_vowel else 0.05):
            kept.append(char)
    return "".join(kept)


def spaced(name: str) -> str:
    """An identifier as words: `readIntoBuffer` and `read_into_buffer` give `read into buffer`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()
