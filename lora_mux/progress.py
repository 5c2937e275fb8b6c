"""A progress bar for work that takes a while."""

import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

Step = TypeVar("Step")


def progress_bar(steps: Collection[Step], title: str) -> Iterable[Step]:
    """The steps, with a bar on stderr if they are several, it is a terminal, and rich is there."""
    if len(steps) < 2 or not sys.stderr.isatty():
        return steps
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, description=title, transient=True, console=Console(stderr=True))
