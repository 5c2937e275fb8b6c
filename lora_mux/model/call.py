"""One call of any function, inside which all passes have the same rows."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

from ..errors import ArgumentTypeError

# What a function may return before it has run: generators, map(), what a pool of threads runs.
LATER = (Iterator, AsyncIterator, Future)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Call:
    """Runs functions under rows; `Mux.call` makes it."""

    def __init__(self, rows: Callable[[], AbstractContextManager[Any]]) -> None:
        self._rows = rows

    def __call__(
        self,
        function: Callable[Parameters, Result],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        """What the function returns for these arguments."""
        with self._rows():
            result = function(*args, **kwargs)
        if inspect.isawaitable(result) or isinstance(result, LATER):
            if inspect.iscoroutine(result):
                result.close()  # else Python warns that nobody awaited it
            raise ArgumentTypeError(
                f"`function` must have run when it returns, got a {type(result).__name__}, which "
                "runs after the call; open a `with mux.route(rows)` block inside it"
            )
        return result
