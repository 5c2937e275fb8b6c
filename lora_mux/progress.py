"""A bar on a terminal, for what takes a while."""

import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


def shown(steps: Collection[T], what: str) -> Iterable[T]:
    """The steps, with a bar on stderr where that is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        return steps
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, description=what, transient=True, console=Console(stderr=True))
