"""One thread at a time: functions and methods that run with a lock held."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def holding(lock: AbstractContextManager[Any], work: Callable[[], Result]) -> Result:
    """What `work` returns, which runs with the lock held."""
    # The one place where a lock is taken, and on one line. Python runs nothing between a lock's own
    # __enter__ or __exit__ and the line, so that no interrupt leaves the lock held. A block of
    # several lines has such a place, its end, where a tracer may raise.
    with lock: return work()  # fmt: skip  # noqa: E701


def synchronized(
    method: Callable[Concatenate[Any, Parameters], Result],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """A method that holds its object's `_lock` while it runs."""

    @functools.wraps(method)
    def held(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._lock: return method(self, *args, **kwargs)  # fmt: skip  # noqa: E701

    return held
