"""The demo on a terminal: tables and progress, by rich."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .quality import Score

# A file or a pipe has no width of its own, and in rich's 80 columns the answers would be cramped.
WIDTH_OF_A_PIPE = 120


class Report:
    """Prints to stdout."""

    def __init__(self) -> None:
        console = importlib.import_module("rich.console")
        width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
        self._console: Any = console.Console(width=width, highlight=False)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        tables = importlib.import_module("rich.table")
        table = tables.Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        self._console.print(table)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar of `total` steps; each call of what it gives, with a text, is one step."""
        bars = importlib.import_module("rich.progress")
        with bars.Progress(console=self._console) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)

    def quality(self, title: str, columns: Sequence[str], table: Sequence[Sequence[Score]]) -> None:
        rows = []
        for scores in table:
            best = max(score.accuracy for score in scores)
            query = "garbled" if scores[0].garbled else "clean"
            cells = [f"{s.accuracy:.3f}{' *' if s.accuracy == best else ''}" for s in scores]
            rows.append([f"{query} -> {scores[0].task}", *cells])
        self.table(title, ["held-out top-1", *columns], rows)
