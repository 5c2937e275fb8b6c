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
from .routing import Routing
from .slots import Slots

# Guards the look at Router._owner and what follows; held for microseconds, so one serves all.
_TAKE = threading.Lock()

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


class Router:
    """The route in force, the forward in progress, and who may change them."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.route: Route | None = None  # None = the base model
        self.active = False  # some row may select an adapter
        self._disables = 0  # depth of disable_adapter blocks
        self._generating = False
        self._owner: int | None = None  # the thread inside a `with` block
        self._depth = 0  # of its blocks
        self._batch: tuple[int, int] | None = None  # (samples, tokens of each) of this forward
        self._plans: dict[tuple[int, torch.device], ops.Plan | None] = {}  # of this forward

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

    def plan(self, x: Tensor) -> ops.Plan | None:
        """The plan for a layer's input x [..., in_features]; None = nothing to add."""
        assert self.route is not None
        key = prod(x.shape[:-1]), x.device
        # Shapes are checked for each layer; plans of equal row counts are the same.
        routing = self._spread(self.route, x)
        if self._batch is None:
            return ops.plan(routing.to(x.device), self.slots)
        if key not in self._plans:
            self._plans[key] = ops.plan(routing.to(x.device), self.slots)
        return self._plans[key]

    def _spread(self, route: Route, x: Tensor) -> Routing:
        """The routing with one row per row of x."""
        rows, routing = prod(x.shape[:-1]), route.routing
        if route.unit == "batch":
            return routing.expand_rows(rows)
        if route.unit == "token":
            if rows != routing.rows:
                raise RoutingError(
                    f"`index` must have one row per token, here {rows} (x is {list(x.shape)}), "
                    f"got {routing.rows}"
                )
            return routing
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
        repeats = self._repeats(route, samples)
        spread = routing.tile if route.expand == "tile" else routing.repeat_interleave
        return spread(repeats).repeat_interleave(rows // samples if samples else 1)

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
        self._refresh()

    def _refresh(self) -> None:
        self.active = not self.disabled and self.route is not None and self.route.selects
        self._plans.clear()

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
