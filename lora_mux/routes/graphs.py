"""What CUDA graphs read of the rows in force: tensors in place, which later routes overwrite.

A replay is no forward pass, so that nothing can check whose rows it has. A block therefore holds
the tensors until it ends, and the blocks of other threads wait for it.
"""

import threading
from dataclasses import dataclass
from typing import Literal

from ..core import NONE, Routing, site_on
from ..errors import RoutingBusyError
from .route import Route
from .scopes import Scope
from .threads import running_name

NOBODY = -2  # a handle that no adapter ever has, and that does not mean "none" either
PATIENCE = 30.0  # seconds that a block waits for another one to end


@dataclass
class CapturedRouting:
    """A routing on the device that a CUDA graph reads at each replay."""

    routing: Routing
    per_token: bool
    uniform: bool
    holds: Literal["route", "base", "nobody"] = "route"

    def follow(self, route: Route | None) -> None:
        """Write a route (None = the base model) to where the graph reads it.

        The graph would compute a route of another shape wrongly. It gets a handle that nobody ever
        has instead, and answers NaN.
        """
        index, weight = self.routing.index, self.routing.weight
        if route is None:
            self._fill("base", NONE)
        elif not self._fits(route):
            self._fill("nobody", NOBODY)
        else:
            self.holds = "route"
            J = route.routing.index.shape[1]
            given = route.at(site_on(index.device), copy=False)
            index[:, :J].copy_(given.index)
            index[:, J:] = NONE
            weight[:, :J].copy_(given.weight)

    def _fits(self, route: Route) -> bool:
        rows, places = route.routing.index.shape
        captured_rows, captured_places = self.routing.index.shape
        same_kind = (route.per_token, route.uniform) == (self.per_token, self.uniform)
        same_rows = same_kind and rows == captured_rows
        return places <= captured_places and (same_rows or route.uniform)

    def _fill(self, holds: Literal["base", "nobody"], handle: int) -> None:
        if self.holds != holds:  # otherwise each switch would cost a launch for each graph
            self.holds = holds
            self.routing.index.fill_(handle)


class CapturedRoutings:
    """All that CUDA graphs of one model read, and the block that holds it."""

    def __init__(self) -> None:
        self._all: list[CapturedRouting] = []
        self._changed = threading.Condition()
        self._holder: Scope | None = None  # None = the sticky rows

    def __bool__(self) -> bool:
        return bool(self._all)

    def __getitem__(self, i: int) -> CapturedRouting:
        return self._all[i]

    def add(self, routing: Routing, route: Route, scope: Scope | None) -> None:
        """Note that a graph reads the routing, which is the one of this scope."""
        with self._changed:
            self._all.append(CapturedRouting(routing, route.per_token, route.uniform))
            self._holder = scope

    def wait(self, around: list[Scope]) -> None:
        """Wait until a scope may begin inside of these.

        Raises:
            RoutingBusyError: another one does not end, or can not because this one would wait for
                it in the same thread.
        """
        with self._changed:
            while self._taken(around):
                holder = self._holder
                here = holder is not None and holder.thread == threading.get_ident()
                if here or not self._changed.wait(PATIENCE):
                    waited = "" if here else f" (waited {PATIENCE:.0f} s)"
                    raise RoutingBusyError(
                        f"a block of {running_name()} cannot begin while the {holder} is open: "
                        "CUDA graphs of this model read one routing in place; let one end before "
                        f"the other begins{waited}"
                    )

    def enter(self, scope: Scope, around: list[Scope]) -> None:
        """A scope begins, inside of others: graphs follow it. Waits as `wait`."""
        with self._changed:
            self.wait(around)
            self._holder = scope
            self._follow(scope.route)

    def _taken(self, around: list[Scope]) -> bool:
        holder = self._holder
        if holder is None or holder.ended or holder.is_left_behind:
            return False
        return holder not in around

    def leave(self, scope: Scope, outer: Scope | None, sticky: Route | None) -> None:
        """A scope has ended: graphs follow the one around it, or the sticky rows."""
        with self._changed:
            if self._holder is scope:
                self._holder = outer
                self._follow(sticky if outer is None else outer.route)
                self._changed.notify_all()

    def follow_sticky(self, sticky: Route | None) -> None:
        """The sticky rows have changed."""
        with self._changed:
            if self._holder is None or self._holder.ended:
                self._holder = None
                self._follow(sticky)

    def _follow(self, route: Route | None) -> None:
        for captured in self._all:
            captured.follow(route if route is not None and route.selects else None)
