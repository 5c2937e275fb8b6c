"""Running blocks and calls under rows, which hooks and wrapped methods of a model need of a Mux."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from ..adapters import AnyRoute
from ..routes import Kind, Route, Rows, make_route
from .loaded import LoadedAdapters

KEYWORD = "adapter_names"  # of forward() and generate(), as in PEFT


class GivenRows(LoadedAdapters):
    """A Mux as `top`, `generation` and `continuous_batching` see it."""

    def _maker(self, make: Callable[[], Route]) -> Callable[[], Route]:
        """Makes a route now, and again if a name changes before it is needed."""
        self._check_attached()
        name_changes, first = self._slots.name_changes, make()

        def current() -> Route:
            changed = self._slots.name_changes != name_changes
            return make() if first.named and changed else first

        return current

    @contextmanager
    def _under(
        self,
        make: Callable[[], AnyRoute],
        kind: Kind,
        beams: int | None = None,
        inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[AnyRoute]:
        """Inside, passes have the rows of a route, whose adapters are resident and stay."""
        self._router.wait_for_graphs()
        with ExitStack() as stack:
            with self._adapters.resident(make) as route:
                stack.enter_context(self._router.opened(route, kind, beams, inputs))
            yield route

    def _generating(
        self, rows: Rows | None, beams: int, inputs: Mapping[str, Any]
    ) -> AbstractContextManager[Route | None]:
        """A call of generate(): its own rows, or those that are in force when it begins."""
        if rows is None:
            return self._under(self._router.rows_of_generate, "call", beams, inputs)
        return self._under(lambda: self._route_of_call(rows), "call", beams, inputs)

    def _given(self, rows: Rows) -> AbstractContextManager[Route]:
        """A block in which the rows of one call are made, and a pass can begin with them."""
        return self._adapters.resident(lambda: self._route_of_call(rows))

    def _route_of_call(self, rows: Rows) -> Route:
        return make_route(rows, None, self._slots, argument=KEYWORD)
