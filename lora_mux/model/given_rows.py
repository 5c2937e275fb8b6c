"""Running blocks and calls under rows, which hooks and wrapped methods of a model need of a Mux."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from ..adapters import AnyRoute
from ..errors import ArgumentTypeError
from ..routes import Kind, Route, Rows, Scope, make_route
from .trained import TrainedAdapters

Result = TypeVar("Result")

# What a function may return before it has run: generators, map(), what a pool of threads runs.
LATER = (Iterator, AsyncIterator, Future)
Parameters = ParamSpec("Parameters")

KEYWORD = "adapter_names"  # of forward() and generate(), as in PEFT


class GivenRows(TrainedAdapters):
    """A Mux as `top`, `generation` and `continuous_batching` see it."""

    def _maker(self, make: Callable[[], Route]) -> Callable[[], Route]:
        """Makes a route now, and again if a name changes before it is needed."""
        self._check_attached()
        name_changes, first = self._slots.name_changes, make()

        def current() -> Route:
            changed = self._slots.name_changes != name_changes
            return make() if first.named and changed else first

        return current

    def _under(
        self,
        make: Callable[[], AnyRoute],
        kind: Kind,
        beams: int | None = None,
        inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> AbstractContextManager[AnyRoute]:
        """Inside, passes have the rows of a route, whose adapters are resident and stay."""

        def open_scope(scope: Scope) -> AnyRoute:
            def publish(route: AnyRoute) -> AnyRoute:
                self._router.open(scope, route)
                return route

            self._router.wait_for_graphs()
            return self._adapters.resident(make, publish)

        return self._scope(open_scope, kind, beams, inputs)

    @contextmanager
    def _scope(
        self,
        open_scope: Callable[[Scope], Result],
        kind: Kind,
        beams: int | None = None,
        inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[Result]:
        """A block or a call, whose scope `open_scope` opens; it ends whatever happens."""
        router = self._router
        scope = router.scopes.new(kind, beams, inputs)
        try:
            try:
                yield open_scope(scope)
            finally:
                router.close(scope)
        finally:  # an interrupt may have ended the first one, or have come before it
            router.close(scope)

    def _generating(
        self, rows: Rows | None, beams: int, inputs: Mapping[str, Any]
    ) -> AbstractContextManager[Route | None]:
        """A call of generate(): its own rows, or those that are in force when it begins."""
        if rows is None:
            return self._under(self._router.rows_of_generate, "call", beams, inputs)
        return self._under(lambda: self._route_of_call(rows), "call", beams, inputs)

    def _give(self, rows: Rows, begin: Callable[[Route], None]) -> None:
        """Make the rows of one call, and let a pass begin with them while their adapters stay."""
        self._adapters.resident(lambda: self._route_of_call(rows), begin)

    def _route_of_call(self, rows: Rows) -> Route:
        return make_route(rows, None, self._slots, argument=KEYWORD)


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
