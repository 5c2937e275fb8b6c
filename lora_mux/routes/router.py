"""The router: the route of one model, which all its layers read.

One small object per model, so that switching adapters costs the same for ten targets and for a
thousand. It follows rows: at the model's top it learns the batch of the forward in progress, and
a layer's input is matched against that batch by equality, never by divisibility.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..core import Found, Pool, Routing, Slots, readable, unchecked
from ..errors import RoutingBusyError, RoutingError
from .graphs import Captured, Shown
from .passes import Awaited, Pass
from .plans import Layers, Plans, samples_of
from .route import Batch, Route, batch_of, tensors_of

# Guards the look at Router._owner and every change of what is in force; held for microseconds, so
# one serves all.
_TAKE = threading.RLock()


class Router:
    """The route in force, the forward in progress, and who may change them."""

    def __init__(self, slots: Slots, settings: ops.Settings) -> None:
        self.slots = slots
        self.settings = settings
        self.anchor: Pool | None = None  # of the first target: says where the model lives
        self.route: Route | None = None  # None = the base model
        self._disables = 0  # depth of disable_adapter blocks
        self._serving = False  # a continuous batching manager computes a batch
        self._served: Route | None = None  # which is routed so, whatever `route` is
        self._generating = False
        self._owner: int | None = None  # the thread inside a `with` block
        self._outer: tuple[Route | None, ...] = ()  # what its blocks go back to
        self._depth = 0  # of its blocks
        self._runner: int | None = None  # the thread whose forward is in progress
        self._heir: tuple[Route, Route] | None = None  # a route, and the one that is to follow it
        # Of the forward in progress. Two numbers, for torch.compile guards a tuple by its values.
        self._samples: int | None = None
        self._tokens = 0  # of each sample
        self._plans = Plans()
        self._on: dict[torch.device, Routing] = {}  # the route in force, on each device
        self._alive_at = -1  # slots.version when the host last looked at the route's handles
        self._captured: list[Captured] = []
        self._shown = Shown()
        self._past: Pass | None = None  # the forward pass whose backward is in progress
        self._awaited = Awaited()  # those whose backward may still come
        self.in_force: Route | None = None  # `route`; None where nothing is to be added

    @property
    def disabled(self) -> bool:
        return self._disables > 0

    @property
    def active(self) -> bool:
        """Whether a row may select an adapter; compiled, whether there are any."""
        if torch.compiler.is_compiling():
            return self.slots.capacity > 0
        past = self._past_of_backward()
        return (self.in_force if past is None else past.route) is not None

    @property
    def chosen(self) -> Route | None:
        """What was asked for, even while a continuous batching manager computes a batch."""
        return None if self.disabled else self.route

    def set(self, route: Route | None) -> None:
        """Put a route in force until the next one, or until the surrounding block ends."""
        with _TAKE:
            self.refuse_other_thread()
            self._put(route)

    @contextmanager
    def routed(self, enter: Callable[[Callable[[Route], None]], Route]) -> Iterator[Routing]:
        """A route in force inside the block; the one before it afterwards, come what may.

        Args:
            enter: makes the route, calls its argument to put it in force, and returns it.
        """
        with self._block():
            before, outer = self.route, self._outer
            # Before the other is put in force, and until it was left: see `held`.
            self._outer = (*outer, before)
            try:
                yield enter(self._put).routing
            finally:
                with _TAKE:
                    self._put(before)
                self._outer = outer

    def follows(self, handle: int) -> bool:
        """Whether an adapter is in force by name, outside of blocks."""
        sticky = self._sticky()
        return sticky is not None and handle in (sticky[1].handles or ())

    def follow(self, old: int, new: int) -> None:
        """Let the sticky route by name have another adapter from the next forward pass on.

        The next and not this one, so that a forward in progress has one of them in all layers.
        Blocks keep what they began with.
        """
        with _TAKE:
            sticky = self._sticky()
            if sticky is not None:
                self._heir = sticky[0], sticky[1].renamed(old, new)

    def _sticky(self) -> tuple[Route, Route] | None:
        """The route by name outside of all blocks, and as it is to be from the next pass on."""
        route = self._outer[0] if self._outer else self.route
        if route is None or not route.named:
            return None
        heir = self._heir
        return heir if heir is not None and heir[0] is route else (route, route)

    def held(self, leaving: bool = False) -> frozenset[int] | None:
        """The adapters that forward passes may still ask for; None where only a device knows.

        Args:
            leaving: the route in force is about to be replaced, and does not count.
        """
        # In this order: what is put in force meanwhile was in one of the others before.
        outer, leaving = self._outer, leaving and self._runner is None
        heir = () if leaving and not outer else self._heir or ()
        last = None if leaving else self.route
        routes = [*outer, *heir, *(past.route for past in self._awaited), self._served, last]
        return _handles(routes)

    def read(self) -> frozenset[int] | None:
        """The adapters that a forward pass in progress, or its backward, has begun to use."""
        routes = [past.route for past in self._awaited]
        return _handles([*routes, self._served, None if self._runner is None else self.route])

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
        self._check_batch(batch_of(args, kwargs))
        before, self._generating = self._generating, True
        try:
            yield
        finally:
            self._generating = before

    @contextmanager
    def serving(self, enter: Callable[[Callable[[Route | None], None]], object]) -> Iterator[None]:
        """A batch of a continuous batching manager, whose thread leaves the users' route alone.

        Args:
            enter: calls its argument with the route of the batch, to put it in force.
        """
        enter(self._serve)
        try:
            yield
        finally:
            with _TAKE:
                self._serving, self._served = False, None
                self._forget_route()

    def _serve(self, route: Route | None) -> None:
        with _TAKE:
            self._serving, self._served = True, route
            self._forget_route()

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: learn the batch, refuse one that is not as routed."""
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
                self._put(self.route)

    def end_forward(self, model: nn.Module, args: Any, output: object) -> None:
        """Forward hook of the model: what was learnt of the batch ends with it."""
        if not torch.compiler.is_compiling():
            if self._runner != threading.get_ident():
                return  # it was refused: another thread's is in progress
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
        samples = samples_of(now, x)  # for each layer: it refuses shapes
        trained = now.route.routing.weight.requires_grad
        method = ops.method(self.settings, x, rows, pool, None if trained else weight)
        # A plan with gradients is each layer's own: checkpointing runs layers again one by one.
        if self._samples is None or trained:
            return self._made(now, x, rows, samples, method)
        layers, case = Layers(rows, x.device, method), None
        if method.form == "cpu":  # never while compiling, which would guard the version
            case = now.route, rows, samples, now.generating, self.slots.version
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
        """What the layers that run at this moment are to be computed with."""
        if torch.compiler.is_compiling():
            return Pass(self._shown.route, self._samples, self._tokens, self._generating)
        past = self._past_of_backward()
        return past or Pass(self.in_force, self._samples, self._tokens, self._generating)

    def _past_of_backward(self) -> Pass | None:
        """The forward pass whose layers checkpointing runs again at this moment."""
        return self._past if self._past is not None and _in_backward() else None

    def _routing_on(self, route: Route, device: torch.device, method: ops.Method) -> Routing:
        """The route's own rows on a device; handles that the host knows are checked there."""
        given = route.routing
        if torch.compiler.is_compiling():
            # What a trace finds are no values: they are not for the user's routing.
            return unchecked(given.index, given.weight, Found()).to(device)
        if route is not self.in_force:
            return given.to(device)
        routing = self._on.get(device)
        if readable(given.index) and self._alive_at != self.slots.version:
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
            routing = self._on[device] = given.to(device, copy=not method.on_host)
        if capturing and all(routing is not captured.routing for captured in self._captured):
            if given.weight.requires_grad:
                raise RoutingError("a route whose weights need gradients can not be captured")
            self._captured.append(Captured(routing, route.per_token, route.uniform))
        return routing

    def _follow_into_backward(self, output: object) -> None:
        """Let the backward of a pass know it: by then its block may have ended, another begun."""
        past = self._now()
        for tensor in tensors_of(output):
            if tensor.grad_fn is not None:
                self._awaited.follow(tensor, past, self._enter_backward)

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
                "a packed batch (`cu_seq_lens_q`) has several sequences in one sample, so that "
                "`rows` can not be one entry per sample; use route_tokens(rows, lengths=...)"
            )

    def _put(self, route: Route | None) -> None:
        with _TAKE:
            heir = self._heir
            inherits = heir is not None and heir[0] is route
            self.route = heir[1] if heir is not None and inherits else route
            if inherits or not self._outer:  # after the route was put: see `held`
                self._heir = None
            self._forget_route()

    def _forget_route(self) -> None:
        self._on.clear()
        self._alive_at = -1
        self._refresh()

    # Locked: between a look at `_serving` and what follows, a manager's thread may begin a batch.
    def _refresh(self) -> None:
        with _TAKE:
            route = self._served if self._serving else self.chosen
            self.in_force = route if route is not None and route.selects else None
            self._plans.clear()
            for captured in self._captured:
                captured.follow(self.in_force)
            if self.anchor is not None:
                self._shown.follow(self.in_force, self.anchor.A_rows.device)

    def _refuse_other_runner(self) -> None:
        if self._runner not in (None, threading.get_ident()):
            raise RoutingBusyError(
                "another thread runs a forward pass of this model; put the requests of both into "
                "one batch, or let one wait for the other"
            )

    def refuse_other_thread(self) -> None:
        """Raise if the route is not this thread's to change."""
        if not self._serving:  # else the forward in progress has a route of its own
            self._refuse_other_runner()
        if self._owner not in (None, threading.get_ident()):
            raise RoutingBusyError(
                "another thread is inside a `with` block of this model; put the requests of both "
                "into one batch, with one entry of `rows` for each sample"
            )

    @contextmanager
    def _block(self) -> Iterator[None]:
        """A `with` block: no other thread may open one, or change the route, until it ends."""
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
