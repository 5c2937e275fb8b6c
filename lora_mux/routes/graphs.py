"""What graphs read of the route in force: CUDA graphs in place, torch.compile's in one shape."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..core import NONE, Routing, unchecked
from .route import Route

NOBODY = -2  # a handle that no adapter ever has, and that does not mean "none" either
PLACES = 4  # of each row of a compiled model, at least


@dataclass
class Captured:
    """A routing on the device that a CUDA graph reads at each replay."""

    routing: Routing
    per_token: bool
    uniform: bool
    holds: Literal["route", "base", "nobody"] = "route"

    def follow(self, route: Route | None) -> None:
        """Write the route in force (None = the base) where the graph reads it.

        A route of another shape would be computed wrongly, so that the graph gets a handle that
        nobody ever has, and answers NaN.
        """
        index, weight = self.routing.index, self.routing.weight
        if route is None:
            self._fill("base", NONE)
        elif not self._fits(route):
            self._fill("nobody", NOBODY)
        else:
            self.holds = "route"
            J = route.routing.index.shape[1]
            index[:, :J].copy_(route.routing.index)
            index[:, J:] = NONE
            weight[:, :J].copy_(route.routing.weight)

    def _fits(self, route: Route) -> bool:
        rows, places = route.routing.index.shape
        mine, most = self.routing.index.shape
        kind = (route.per_token, route.uniform) == (self.per_token, self.uniform)
        return places <= most and ((kind and rows == mine) or route.uniform)

    def _fill(self, holds: Literal["base", "nobody"], handle: int) -> None:
        if self.holds != holds:  # else each switch would cost a launch for each graph
            self.holds = holds
            self.routing.index.fill_(handle)


class Shown:
    """The route in force as compiled models read it.

    Every route of a batch of the same number of samples has the same shape here, the base model
    and those of set_adapter too, so that one graph serves them all. torch.compile guards shapes
    and not values, so that a new tensor for each route costs no new graph.
    """

    def __init__(self) -> None:
        self._rows = 1  # of the last route that had one for each sample
        self._places = PLACES  # of the widest route so far
        self._base = self.route = _base(self._rows, self._places, torch.device("cpu"))

    def follow(self, route: Route | None, device: torch.device) -> None:
        """Show a route, on a device; None = the base model."""
        if torch.compiler.is_compiling():
            # Inside of what torch.export traces: sizes may be symbols, which are not to be kept.
            self.route = route or self._base
            return
        if device.type == "meta":
            device = torch.device("cpu")
        if route is not None:
            self._places = max(self._places, route.routing.index.shape[1])
            if not (route.uniform or route.per_token):
                self._rows = route.routing.rows
            shape = self._rows, self._places, device
            if route.shown is None or route.shown[0] != shape:
                route.shown = shape, self._padded(route, device)
            self.route = route.shown[1]
            return
        index = self._base.routing.index  # which each block ends with, so that it is kept
        if index.shape != (self._rows, self._places) or index.device != device:
            self._base = _base(self._rows, self._places, device)
        self.route = self._base

    # Normal tensors also inside inference_mode: graphs guard that as well. Not around `follow`,
    # which set_adapter calls: entering costs a third of it.
    @torch.inference_mode(False)
    def _padded(self, route: Route, device: torch.device) -> Route:
        index, weight = route.routing.index, route.routing.weight
        if route.uniform:
            index, weight = index.expand(self._rows, -1), weight.expand(self._rows, -1)
        missing = (0, self._places - index.shape[1])
        padded = unchecked(
            nn.functional.pad(index.long(), missing, value=NONE),
            nn.functional.pad(weight, missing),
            route.routing.found,
        )
        return Route(padded.to(device), route.per_token, route.uniform, route.expand)


@torch.inference_mode(False)
def _base(rows: int, places: int, device: torch.device) -> Route:
    return Route(Routing(torch.full((rows, places), NONE, device=device)), uniform=True)
