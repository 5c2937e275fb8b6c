"""The routes of set_adapter, which give all rows of a batch the same adapters."""

from collections.abc import Mapping

from ..core import Slots, routing_from_names
from .route import Route

MAX_ROUTES = 256


class UniformRoutes:
    """Routes by adapters and weights, kept because callers switch to and fro between a few."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._routes: dict[tuple[tuple[str, float], ...], Route] = {}
        self._name_changes = 0  # slots.name_changes when the routes were made

    def find(self, weights: Mapping[str, float]) -> Route | None:
        """The route that selects these adapters with these weights; None for the base model.

        Args:
            weights: name -> weight; empty for the base model.

        Raises:
            UnknownAdapterError: a name is not loaded.
        """
        if not weights:
            return None
        if self._name_changes != self._slots.name_changes:  # a name may mean another adapter now
            self._routes.clear()
            self._name_changes = self._slots.name_changes
        key = tuple(weights.items())
        if key not in self._routes:
            if len(self._routes) == MAX_ROUTES:
                self._routes.clear()
            routing = routing_from_names([weights], self._slots.lookup)
            self._routes[key] = Route(routing, uniform=True, named=True)
        return self._routes[key]
