"""The router: the routing of one model, which all its layers read.

One small object per model, so that switching adapters costs the same for ten targets and for a
thousand. It follows rows: at the model's top it learns the batch of the forward in progress, and
a layer's input is matched against that batch by equality, never by divisibility.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .errors import RoutingBusyError, RoutingError
from .pool import Pool
from .routing import NONE, Routing
from .slots import Slots

# Guards the look at Router._owner and what follows; held for microseconds, so one serves all.
_TAKE = threading.Lock()

NOBODY = -2  # a handle that no adapter ever has, and that does not mean "none" either

# Where a model's batch is seen, most telling first; else the first tensor argument tells it.
INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Route:
    """A routing, and what one of its rows stands for."""

    routing: Routing
    unit: Literal["batch", "sample", "token"]
    expand: Literal["interleave", "tile"] | None = None  # how samples may be repeated

    @property
    def selects(self) -> bool:
        """False when no row selects an adapter; only the CPU can tell without a sync."""
        index = self.routing.index
        return index.device.type != "cpu" or bool((index >= 0).any())


@dataclass
class Captured:
    """A routing on the device that a CUDA graph reads at each replay."""

    routing: Routing
    unit: Literal["batch", "sample", "token"]
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
        same = route.unit == self.unit and rows == mine
        return places <= most and (same or route.unit == "batch")

    def _fill(self, holds: Literal["base", "nobody"], handle: int) -> None:
        if self.holds != holds:  # else each switch would cost a launch for each graph
            self.holds = holds
            self.routing.index.fill_(handle)


class Router:
    """The route in force, the forward in progress, and who may change them."""

    def __init__(self, slots: Slots, settings: ops.Settings) -> None:
        self.slots = slots
        self.settings = settings
        self.route: Route | None = None  # None = the base model
        self.active = False  # some row may select an adapter
        self._disables = 0  # depth of disable_adapter blocks
        self._generating = False
        self._owner: int | None = None  # the thread inside a `with` block
        self._depth = 0  # of its blocks
        self._batch: tuple[int, int] | None = None  # (samples, tokens of each) of this forward
        # Of this forward, by row count, device and method.
        self._plans: dict[tuple[int, torch.device, ops.Method], ops.Plan | None] = {}
        self._on: dict[torch.device, Routing] = {}  # the route in force, on each device
        self._alive_at = -1  # slots.version when the host last looked at the route's handles
        self._captured: list[Captured] = []

    @property
    def disabled(self) -> bool:
        return self._disables > 0

    def set(self, route: Route | None) -> None:
        """Put a route in force until the next one, or until the surrounding block ends."""
        with _TAKE:
            self._refuse_other_thread()
            self._put(route)

    @contextmanager
    def routed(self, route: Route) -> Iterator[Routing]:
        """The route in force inside the block; the one before it afterwards, come what may."""
        with self._block():
            before = self.route
            self._put(route)
            try:
                yield route.routing
            finally:
                self._put(before)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The base model inside the block, whatever is routed."""
        with self._block():
            self._disables += 1
            self._refresh()
            try:
                yield
            finally:
                self._disables -= 1
                self._refresh()

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Inside generate(), which repeats samples in order (beams, num_return_sequences)."""
        self._check_batch(_batch_of(args, kwargs))
        before, self._generating = self._generating, True
        try:
            yield
        finally:
            self._generating = before

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: learn the batch, refuse one that is not as routed."""
        self.end_forward()
        batch = _batch_of(args, kwargs)
        self._check_batch(batch)
        self._batch = batch

    def end_forward(self, *hook_arguments: object) -> None:
        """Forward hook of the model: what was learnt of the batch ends with it."""
        self._batch = None
        self._plans.clear()

    def plan(self, x: Tensor, pool: Pool) -> ops.Plan | None:
        """The plan for a layer's input x [..., in_features]; None = nothing to add."""
        assert self.route is not None
        rows = prod(x.shape[:-1])
        # Shapes are checked for each layer; plans of equal row counts are the same.
        samples = self._samples(self.route, x, rows)
        method = ops.method(self.settings, x, rows, pool)
        key = rows, x.device, method
        if self._batch is not None and key in self._plans:
            return self._plans[key]
        routing = self._spread(self.route, self._routing_on(x.device, method), rows, samples)
        plan = ops.plan(routing, self.slots, method)
        if self._batch is not None:
            self._plans[key] = plan
        return plan

    def _routing_on(self, device: torch.device, method: ops.Method) -> Routing:
        """The route's own rows on a device; handles that the host knows are checked there."""
        assert self.route is not None
        routing, given = self._on.get(device), self.route.routing
        if given.index.device.type == "cpu" and self._alive_at != self.slots.version:
            self.slots.resolve(given.index)
            self._alive_at = self.slots.version
        capturing = ops.capturing(device)
        if routing is None:
            if capturing:
                raise RoutingError(
                    "run the model once under this route before capturing it in a CUDA graph; "
                    "while capturing nothing can be copied to the GPU"
                )
            # A copy: what a graph reads is written to by later routes, and this one may return.
            routing = self._on[device] = given.to(device, copy=method.operators)
        if capturing and all(routing is not captured.routing for captured in self._captured):
            if given.weight.requires_grad:
                raise RoutingError("a route whose weights need gradients can not be captured")
            self._captured.append(Captured(routing, self.route.unit))
        return routing

    def _samples(self, route: Route, x: Tensor, rows: int) -> int:
        """How many samples x holds, after checking its shape against the route and the batch."""
        if route.unit == "batch":
            return rows
        if route.unit == "token":
            if rows != route.routing.rows:
                raise RoutingError(
                    f"`index` must have one row per token, here {rows} (x is {list(x.shape)}), "
                    f"got {route.routing.rows}"
                )
            return rows
        samples = x.shape[0] if x.ndim >= 2 else 1
        if self._batch is not None:
            batch, tokens = self._batch
            flattened = x.ndim == 2 and samples == batch * tokens
            if not flattened and samples != batch:
                raise RoutingError(
                    f"a layer's input must begin with the batch of {batch} samples (or, flattened, "
                    f"with its {batch} x {tokens} tokens), got {list(x.shape)}; "
                    "use route_tokens for rows in another order"
                )
            samples = batch
        self._repeats(route, samples)
        return samples

    def _spread(self, route: Route, routing: Routing, rows: int, samples: int) -> Routing:
        """A route's routing with one row per row of x."""
        if route.unit == "batch":
            return routing.expand_rows(rows)
        if route.unit == "token":
            return routing
        spread = routing.tile if route.expand == "tile" else routing.repeat_interleave
        each = rows // samples if samples else 1
        return spread(self._repeats(route, samples)).repeat_interleave(each)

    def _check_batch(self, batch: tuple[int, int] | None) -> None:
        if batch is not None and self.active and self.route is not None:
            if self.route.unit == "sample":
                self._repeats(self.route, batch[0])

    def _repeats(self, route: Route, samples: int) -> int:
        """How many rows of the batch each routed sample has become."""
        routed = route.routing.rows
        if samples == routed:
            return 1
        if (self._generating or route.expand) and routed and samples % routed == 0:
            return samples // routed
        raise RoutingError(
            f"`rows` must have one entry per sample of the batch, here {samples}, got {routed}"
            + (
                ""
                if route.expand
                else '; if samples are repeated, say expand="interleave" or "tile"'
            )
        )

    def _put(self, route: Route | None) -> None:
        self.route = route
        self._on.clear()
        self._alive_at = -1
        self._refresh()

    def _refresh(self) -> None:
        self.active = not self.disabled and self.route is not None and self.route.selects
        self._plans.clear()
        for captured in self._captured:
            captured.follow(self.route if self.active else None)

    def _refuse_other_thread(self) -> None:
        if self._owner not in (None, threading.get_ident()):
            raise RoutingBusyError(
                "another thread is inside a `with` block of this model; put the requests of both "
                "into one batch, with one entry of `rows` for each sample"
            )

    @contextmanager
    def _block(self) -> Iterator[None]:
        """A `with` block: no other thread may open one, or change the route, until it ends."""
        with _TAKE:
            self._refuse_other_thread()
            self._owner = threading.get_ident()
            self._depth += 1
        try:
            yield
        finally:
            with _TAKE:
                self._depth -= 1
                if not self._depth:
                    self._owner = None


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(samples, tokens of each) of a model's inputs; None when no tensor tells."""
    candidates = [kwargs.get(name) for name in INPUTS] + [*args, *kwargs.values()]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.ndim:
            # Ids are [samples, tokens]; embeddings and hidden states [samples, tokens, features].
            has_tokens = tensor.ndim == (3 if tensor.is_floating_point() else 2)
            return tensor.shape[0], tensor.shape[1] if has_tokens else 1
    return None
