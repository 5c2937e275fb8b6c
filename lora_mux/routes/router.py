"""The router: the route of one model, which all its layers read.

There is one small object per model, so that switching adapters costs the same for ten targets and
for a thousand. At the model's top it learns the batch of the forward pass in progress. The input
of a layer must have exactly as many samples; a multiple is never good enough.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..core import LastPass, Pool, Routing, Slots, host_may_read, unchecked_routing
from ..errors import RoutingBusyError, RoutingError
from .graphs import CapturedRouting, CompiledView
from .passes import Pass, PassesAwaitingBackward
from .plans import Plans
from .route import Batch, Route, batch_of, tensors_in

# Held while Router._owner is read and while the route in force changes: for microseconds, so that
# one lock serves all routers.
_TAKE = threading.RLock()


class Router:
    """The route in force, the forward in progress, and who may change them."""

    def __init__(self, slots: Slots, settings: ops.Settings) -> None:
        self.slots = slots
        self.settings = settings
        self.anchor: Pool | None = None  # the first target's, which shows where the model is
        self.route: Route | None = None  # None = the base model
        self._disables = 0  # depth of disable_adapter blocks
        self._serving = False  # a continuous batching manager computes a batch
        self._served: Route | None = None  # the route of that batch, whatever `route` is
        self._generating = False
        self._owner: int | None = None  # the thread inside a `with` block
        self._outer: tuple[Route | None, ...] = ()  # the routes that its blocks go back to
        self._depth = 0  # how many blocks it is inside
        self._runner: int | None = None  # the thread whose forward is in progress
        self._heir: tuple[Route, Route] | None = None  # a route, and its successor
        # Of the forward in progress. Not a tuple, whose values torch.compile would guard.
        self._samples: int | None = None
        self._tokens = 0  # of each sample
        self._plans = Plans()
        self._on: dict[torch.device, Routing] = {}  # the route in force, on each device
        self._checked_at = -1  # slots.suspensions when the host last checked the route's handles
        self._captured: list[CapturedRouting] = []
        self._compiled_view = CompiledView()
        self._past: Pass | None = None  # the forward pass whose backward is in progress
        self._awaiting_backward = PassesAwaitingBackward()
        self.in_force: Route | None = None  # what passes compute; None = the base model

    @property
    def disabled(self) -> bool:
        """Whether a disable_adapter block is open."""
        return self._disables > 0

    @property
    def active(self) -> bool:
        """Whether any row may select an adapter; for compiled models, whether there are any."""
        if torch.compiler.is_compiling():
            return self.slots.capacity > 0
        past = self._past_of_backward()
        return (self.in_force if past is None else past.route) is not None

    @property
    def chosen(self) -> Route | None:
        """The users' route, even while a continuous batching manager computes a batch."""
        return None if self.disabled else self.route

    def set(self, route: Route | None) -> None:
        """Put a route in force until the next one, or until the surrounding block ends."""
        with _TAKE:
            self.refuse_other_thread()
            self.put(route)

    def put(self, route: Route | None) -> None:
        """Put a route in force, inside a block of this thread's."""
        with _TAKE:
            heir = self._heir
            inherits = heir is not None and heir[0] is route
            self.route = heir[1] if heir is not None and inherits else route
            if inherits or not self._outer:  # after the route was put: see `reachable`
                self._heir = None
            self._forget_route()

    @contextmanager
    def block(self) -> Iterator[None]:
        """A `with` block: afterwards the route of before is in force again, come what may.

        Until it ends, no other thread can open one or change the route.
        """
        with self._owned():
            before, outer = self.route, self._outer
            # From before another route is put until after it was left: see `reachable`.
            self._outer = (*outer, before)
            try:
                yield
            finally:
                self.put(before)
                self._outer = outer

    def is_sticky(self, handle: int) -> bool:
        """Whether the route outside of all blocks selects a handle, and does so by name."""
        sticky = self._sticky()
        return sticky is not None and handle in (sticky[1].handles or ())

    def replace_sticky(self, old: int, new: int) -> None:
        """Give the route outside of all blocks, if it is by name, another handle for a name.

        It changes at the next forward pass, so that a pass in progress has one adapter in all
        layers. Blocks keep what they began with.
        """
        with _TAKE:
            sticky = self._sticky()
            if sticky is not None:
                self._heir = sticky[0], sticky[1].with_replaced(old, new)

    def _sticky(self) -> tuple[Route, Route] | None:
        """The route by name outside of all blocks, and what it is from the next pass on."""
        route = self._outer[0] if self._outer else self.route
        if route is None or not route.named:
            return None
        heir = self._heir
        return heir if heir is not None and heir[0] is route else (route, route)

    def reachable(self, leaving: bool = False) -> frozenset[int] | None:
        """The handles that forward passes may still ask for; None if only a device knows.

        Args:
            leaving: the route in force is about to be replaced, and does not count.
        """
        # In this order: a route that is put in force meanwhile was in one of the others before.
        outer, leaving = self._outer, leaving and self._runner is None
        heir = () if leaving and not outer else self._heir or ()
        last = None if leaving else self.route
        awaiting = (past.route for past in self._awaiting_backward)
        return _handles([*outer, *heir, *awaiting, self._served, last])

    def in_use(self) -> frozenset[int] | None:
        """The handles that a pass in progress, or its backward, has begun to use."""
        routes = [past.route for past in self._awaiting_backward]
        return _handles([*routes, self._served, None if self._runner is None else self.route])

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside the block every row gets the base model, whatever the route."""
        with self._owned():
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
        self._check_batch(batch_of(args, kwargs))
        before, self._generating = self._generating, True
        try:
            yield
        finally:
            self._generating = before

    def serve(self, route: Route | None) -> None:
        """Begin a batch of a continuous batching manager, which leaves the users' route alone."""
        with _TAKE:
            self._serving, self._served = True, route
            self._forget_route()

    def stop_serving(self) -> None:
        """The manager's batch is done."""
        with _TAKE:
            self._serving, self._served = False, None
            self._forget_route()

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: learn the batch, and refuse one that does not fit."""
        if not torch.compiler.is_compiling():
            self._begin()
        self._forget_forward()
        batch = batch_of(args, kwargs)
        self._check_batch(batch)
        if "cu_seq_lens_q" in kwargs:
            self._refuse_packed()
        if batch is not None:
            self._samples, self._tokens = batch

    def _begin(self) -> None:
        with _TAKE:
            self._refuse_other_runner()
            self._runner = threading.get_ident()
            if not _in_backward():
                self._past = None  # of a backward that failed
            if self._heir is not None and self._heir[0] is self.route:
                self.put(self.route)

    def end_forward(self, model: nn.Module, args: Any, output: object) -> None:
        """Forward hook of the model: forget the batch."""
        if not torch.compiler.is_compiling():
            if self._runner != threading.get_ident():
                return  # this pass was refused, because another thread's is in progress
            if torch.is_grad_enabled():
                self._follow_into_backward(output)
            self._runner = None
        self._forget_forward()

    def plan(self, x: Tensor, pool: Pool, weight: Tensor | None) -> ops.AnyPlan | None:
        """The plan for a layer's input x [..., in_features]; None = nothing to add.

        Args:
            weight: of a base layer that can be fused with its adapters.
        """
        now = self._now()
        assert now.route is not None
        rows = prod(x.shape[:-1])
        samples = now.samples_of(x)  # for each layer: it refuses shapes
        trained = now.route.routing.weight.requires_grad
        method = ops.method(self.settings, x, rows, pool, None if trained else weight)
        # A plan with gradients is each layer's own: checkpointing runs layers again one by one.
        if self._samples is None or trained:
            return self._made(now, x, rows, samples, method)
        layers, case = (rows, x.device, method), None
        if method.form == "cpu":  # never while compiling, which would guard the version
            case = now.route, rows, samples, now.generating, self.slots.suspensions
        known = self._plans.find(layers, case)
        if known is None:
            made = self._made(now, x, rows, samples, method)
            known = self._plans.add(layers, case, made)
        return known.plan

    def _made(
        self, now: Pass, x: Tensor, rows: int, samples: int | None, method: ops.Method
    ) -> ops.AnyPlan | None:
        assert now.route is not None
        routing = self._routing_on(now.route, x.device, method)
        spread = now.route.spread(routing, rows, samples, now.generating)
        return ops.plan(spread, self.slots, method)

    def _now(self) -> Pass:
        """The pass that the layers running at this moment belong to."""
        if torch.compiler.is_compiling():
            return Pass(self._compiled_view.route, self._samples, self._tokens, self._generating)
        past = self._past_of_backward()
        return past or Pass(self.in_force, self._samples, self._tokens, self._generating)

    def _past_of_backward(self) -> Pass | None:
        """The forward pass whose layers checkpointing runs again at this moment."""
        return self._past if self._past is not None and _in_backward() else None

    def _routing_on(self, route: Route, device: torch.device, method: ops.Method) -> Routing:
        """The route's own rows on a device. The host checks the handles that it can read."""
        given = route.routing
        if torch.compiler.is_compiling():
            # A trace holds no values, so that there is nothing to note on the user's routing.
            return unchecked_routing(given.index, given.weight, LastPass()).to(device)
        if route is not self.in_force:
            return given.to(device)
        routing = self._on.get(device)
        if host_may_read(given.index) and self._checked_at != self.slots.suspensions:
            self.slots.resolve(given.index)
            self._checked_at = self.slots.suspensions
        capturing = ops.capturing(device)
        if routing is None:
            if capturing:
                raise RoutingError(
                    "run the model once under this route before capturing it in a CUDA graph; "
                    "nothing can be copied to the GPU during the capture"
                )
            # A copy, because later routes overwrite what a graph reads, and this one may return.
            routing = self._on[device] = given.to(device, copy=not method.on_host)
        if capturing and all(routing is not captured.routing for captured in self._captured):
            if given.weight.requires_grad:
                raise RoutingError(
                    "`weights` must not need gradients while a CUDA graph is captured, got a "
                    "tensor that does; detach() it"
                )
            self._captured.append(CapturedRouting(routing, route.per_token, route.uniform))
        return routing

    def _follow_into_backward(self, output: object) -> None:
        """Let the backward find its pass: by then the block may have ended and another begun."""
        past = self._now()
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._awaiting_backward.add(tensor, past, self._enter_backward)

    def _enter_backward(self, past: Pass, grad: Tensor) -> None:
        self._past = past
        torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self._past = None

    def _forget_forward(self) -> None:
        self._samples = None
        self._plans.clear()

    def _check_batch(self, batch: Batch | None) -> None:
        route = self._now().route
        if batch is not None and route is not None:
            route.check(batch[0], self._generating)

    def _refuse_packed(self) -> None:
        route = self._now().route
        if route is not None and not (route.uniform or route.per_token):
            raise RoutingError(
                "`rows` must have one entry per sequence, got one per sample of a packed batch "
                "(`cu_seq_lens_q`), which has many sequences in a sample; use "
                "route_tokens(rows, lengths=...)"
            )

    def _forget_route(self) -> None:
        self._on.clear()
        self._checked_at = -1
        self._refresh()

    # Locked, because a manager's thread may begin a batch right after `_serving` was read.
    def _refresh(self) -> None:
        with _TAKE:
            route = self._served if self._serving else self.chosen
            self.in_force = route if route is not None and route.selects else None
            self._plans.clear()
            for captured in self._captured:
                captured.follow(self.in_force)
            if self.anchor is not None:
                # Not anchor.A_rows: the look-up by nn.Module takes 1 of set_adapter's 8 us.
                rows: Any = self.anchor._buffers["A_rows"]
                self._compiled_view.follow(self.in_force, rows.device)

    def _refuse_other_runner(self) -> None:
        if self._runner not in (None, threading.get_ident()):
            raise RoutingBusyError(
                "another thread is running a forward pass of this model; put the requests of both "
                "into one batch, or let one wait for the other"
            )

    def refuse_other_thread(self) -> None:
        """Raise if another thread has the right to the route."""
        if not self._serving:  # the forward of a manager has a route of its own
            self._refuse_other_runner()
        if self._owner not in (None, threading.get_ident()):
            raise RoutingBusyError(
                "another thread is inside a `with` block of this model; put the requests of both "
                "into one batch, with one entry of `rows` for each sample"
            )

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """No other thread may open a block, or change the route, until this one ends."""
        with _TAKE:
            self.refuse_other_thread()
            self._owner = threading.get_ident()
            self._depth += 1
        try:
            yield
        finally:
            with _TAKE:
                self._depth -= 1
                if not self._depth:
                    self._owner = None


def _handles(routes: list[Route | None]) -> frozenset[int] | None:
    found: frozenset[int] = frozenset()
    for route in routes:
        if route is not None:
            if route.handles is None:
                return None
            found |= route.handles
    return found


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
