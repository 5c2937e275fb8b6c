"""What graphs read of the route in force.

A CUDA graph reads a routing in place, so that it is overwritten. A graph of torch.compile reads new
tensors each time, which must always have the same shape.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..core import NONE, Routing, unchecked_routing
from .route import Route

NOBODY = -2  # a handle that no adapter ever has, and that does not mean "none" either
LEAST_PLACES = 4  # adapters in a row for which a compiled model has room from the beginning


@dataclass
class CapturedRouting:
    """A routing on the device that a CUDA graph reads at each replay."""

    routing: Routing
    per_token: bool
    uniform: bool
    holds: Literal["route", "base", "nobody"] = "route"

    def follow(self, route: Route | None) -> None:
        """Write the route in force (None = the base model) to where the graph reads it.

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
            index[:, :J].copy_(route.routing.index)
            index[:, J:] = NONE
            weight[:, :J].copy_(route.routing.weight)

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


class CompiledView:
    """The route in force as compiled models read it.

    For batches with the same number of samples, all routes have the same shape here, including the
    base model and the routes of set_adapter, so that one graph serves them all. torch.compile
    guards shapes and not values: a new tensor for each route costs no new graph.
    """

    def __init__(self) -> None:
        self._rows = 1  # of the last route that had one for each sample
        self._places = LEAST_PLACES  # of the widest route so far
        self._base = self.route = _base(self._rows, self._places, torch.device("cpu"))

    def follow(self, route: Route | None, device: torch.device) -> None:
        """Let compiled models read this route, on this device; None = the base model."""
        if torch.compiler.is_compiling():
            # torch.export is tracing: sizes may be symbols, which must not outlive the trace.
            self.route = route or self._base
            return
        if device.type == "meta":
            device = torch.device("cpu")
        if route is not None:
            self._places = max(self._places, route.routing.index.shape[1])
            if not (route.uniform or route.per_token):
                self._rows = route.routing.rows
            shape = self._rows, self._places, device
            if route.padded is None or route.padded[0] != shape:
                route.padded = shape, self._pad(route, device)
            self.route = route.padded[1]
            return
        index = self._base.routing.index  # reused, because each block ends with the base model
        if index.shape != (self._rows, self._places) or index.device != device:
            self._base = _base(self._rows, self._places, device)
        self.route = self._base

    # Graphs guard inference tensors as well, so these are normal ones even inside inference_mode.
    # Not around `follow`, which set_adapter calls: entering the mode takes a third of its time.
    @torch.inference_mode(False)
    def _pad(self, route: Route, device: torch.device) -> Route:
        index, weight = route.routing.index, route.routing.weight
        if route.uniform:
            index, weight = index.expand(self._rows, -1), weight.expand(self._rows, -1)
        missing = (0, self._places - index.shape[1])
        padded = unchecked_routing(
            nn.functional.pad(index.long(), missing, value=NONE),
            nn.functional.pad(weight, missing),
            route.routing.last_pass,
        )
        return Route(padded.to(device), route.per_token, route.uniform, route.expand)


@torch.inference_mode(False)
def _base(rows: int, places: int, device: torch.device) -> Route:
    return Route(Routing(torch.full((rows, places), NONE, device=device)), uniform=True)
