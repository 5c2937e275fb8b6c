"""The router: whose rows the forward passes of one model have.

There is one small object per model, so that switching adapters costs the same for ten targets and
for a thousand. When a pass begins at the model's top, its route is resolved once, by precedence:

    rows given with the call > the call that encloses it > the innermost block > the sticky rows

The pass keeps what it began with. What anybody sets meanwhile counts from the next pass on.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..core import Pool, Slots, StreamOrder, holding, synchronized
from ..errors import DetachedError, RoutingBusyError, UnknownAdapterError
from .compiled import NUMBERS, ROUTERS, Cell, Cells, CompiledView, before_tracing
from .graphs import CapturedRoutings
from .passes import Pass, Passes, RowsHere, Shape, handles_of
from .plans import Plans
from .route import Route
from .scopes import Scope, Scopes, Sticky
from .towers import NO_LAYOUT, Place, as_seen_from


class Router:
    """The sticky rows, the scopes around them, and the passes in progress."""

    def __init__(self, slots: Slots, settings: ops.Settings) -> None:
        self.slots = slots
        self.settings = settings
        self.anchor: Pool | None = None  # the first target's, which shows where the model is
        self.layout = NO_LAYOUT
        self.sticky = Sticky()
        self.is_detached = False
        self._begin_life()

    def _begin_life(self) -> None:
        """All that a copy of the model has of its own."""
        # Held for microseconds: while a pass finds its rows and begins, and while those change, so
        # that nobody frees the adapters of a pass that is about to begin.
        self._lock = threading.RLock()
        self.changes = threading.RLock()  # held while adapters come, go or move
        self.scopes = Scopes()
        self.order = StreamOrder()
        self.passes = Passes(self.order)
        self.captured = CapturedRoutings()
        self._cells = Cells()
        self.view = CompiledView(self._cells, self.sticky, self._lock)
        number = next(NUMBERS)
        ROUTERS[number] = self
        self._before_tracing = before_tracing(number)
        self._plans = Plans(number, self.slots, self.scopes, self.captured)

    def after_fork(self) -> None:
        """In the new process only the thread that forked runs, and nobody gives the locks back."""
        for lock in (self._lock, self.changes):
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does
        self.scopes.end_those_left_behind()
        self.passes.forget_other_threads()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("slots", "settings", "anchor", "layout", "sticky", "is_detached")
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin_life()

    @synchronized
    def set(self, route: Route | None) -> None:
        """Choose the sticky rows: every pass that begins from now on, and has no others."""
        self.passes.forget_interrupted()
        self._left(self.sticky.route)
        self.sticky.route, self.sticky.is_chosen = route, True
        self._follow_sticky()

    @synchronized
    def replace_sticky(self, old: int, new: int) -> None:
        """Give the sticky route, if it is by name, another handle for a name."""
        if self.is_sticky(old):
            assert self.sticky.route is not None
            self._left(self.sticky.route)
            self.sticky.route = self.sticky.route.with_replaced(old, new, self.slots)
            self._follow_sticky()

    @synchronized
    def mend_sticky(self) -> None:
        """Let the sticky route follow names and views as it should, after an interrupt."""
        route = self.sticky.route
        for handle in (route and route.named and route.handles) or ():
            if (successor := self.slots.successor(handle)) != handle:
                self.replace_sticky(handle, successor)
        self._follow_sticky()

    def is_sticky(self, handle: int) -> bool:
        """Whether the sticky route selects a handle, and does so by name."""
        route = self.sticky.route
        return route is not None and route.named and handle in (route.handles or ())

    def _follow_sticky(self) -> None:
        route = self.sticky.route
        self._routed(route)
        if self._cells.are_read or torch.compiler.is_compiling():
            self._cells.follow_sticky(route, self._device())
        if self.captured:
            self.captured.follow_sticky(route)

    def follow_device(self, pool: Pool) -> None:
        """A target's pool is on its device, for the first time or another one: so are the rows."""
        self.anchor = self.anchor or pool
        if self.anchor is pool:
            self._follow_sticky()

    @synchronized
    def begin_to_show(self) -> None:
        """There is a graph that reads the views of all threads."""
        self._cells.begin_to_show(self.sticky.route, self._device())

    def _device(self) -> torch.device:
        # Not anchor.A_rows: the look-up by nn.Module takes a microsecond.
        rows: Any = None if self.anchor is None else self.anchor._buffers["A_rows"]
        return torch.device("cpu") if rows is None else rows.device

    def open(self, scope: Scope, route: Route | None) -> None:
        """From now on, passes inside a new scope have these rows; None = the base model.

        Raises:
            RoutingBusyError: CUDA graphs read the rows of another block, which does not end.
        """
        self.check_attached()
        self._routed(route)
        self.scopes.open(scope, route)
        if self.captured:
            self.captured.enter(scope, self.scopes.here())
        self.view.cell.follow(route, self._device(), True)

    def close(self, scope: Scope) -> None:
        """End a scope, in whatever state it is, also one whose end was interrupted.

        Raises:
            RoutingError: blocks end in another order than they began.
        """
        if scope.is_over:
            return
        self._left(scope.whole or scope.route)  # before others may evict its adapters
        try:
            self.scopes.close(scope)
        finally:
            self._leave(scope)
        scope.is_over = True

    def check_attached(self) -> None:
        """Refuse to go on after Mux.detach()."""
        if self.is_detached:
            raise DetachedError("this Mux was detached from its model; attach() makes a new one")

    def _leave(self, scope: Scope) -> None:
        """Show the rows around a scope again to whatever reads tensors of its thread."""
        # Otherwise layers that are called by themselves would go on with the rows of this one.
        self.passes.forget_interrupted()
        outer = self.scopes.innermost()
        below = self.sticky.route if outer is None else outer.route
        self.view.cell.follow(below, self._device(), outer is not None)
        if self.captured:
            self.captured.leave(scope, outer, self.sticky.route)

    def _routed(self, route: Route | None) -> None:
        """Before graphs are replayed that read a route's adapters, the current stream waits."""
        if route is not None and self.order.devices:
            self.order.routed(route.slots)

    def _left(self, route: Route | None) -> None:
        """Graphs that have read a route's adapters were replayed on the current stream."""
        if route is not None and self.order.devices:
            self.order.left(route.slots)

    @synchronized
    def keep(self, rows: Sequence[int], beams: int) -> None:
        """Let the call of generate() here go on with these of its samples."""
        scope = self.scopes.current()
        if scope is not None and scope.is_call:
            self._left(scope.route)  # those that are not kept may go before the call ends
            scope.keep(rows, beams)
            self.view.cell.follow(scope.route, self._device(), True)

    @synchronized
    def reachable(self, leaving: bool = False) -> frozenset[int] | None:
        """The handles that passes may still ask for; None if only a device knows.

        Args:
            leaving: the sticky rows are about to be replaced, and do not count.
        """
        sticky = None if leaving else self.sticky.route
        return handles_of([*self.scopes.routes(), *self.passes.in_use(), sticky])

    def in_use(self) -> frozenset[int] | None:
        """The handles that a pass in progress, or its backward, has begun to use."""
        return handles_of(self.passes.in_use())

    @synchronized
    def rows(self) -> RowsHere:
        """What a pass would have that began here and now.

        Raises:
            RoutingError: that cannot be known; see `Scopes.current`.
        """
        scope = self.scopes.current()
        if scope is None:
            return RowsHere(self.sticky.route)
        disabled = scope.kind == "disabled block"
        return RowsHere(scope.route, disabled, scope.beams, scope.inputs)

    @synchronized
    def rows_of_generate(self) -> Route | None:
        """The route that generate() begins with here and now, and keeps to its end.

        Raises:
            RoutingError, RoutingBusyError: that cannot be known.
        """
        scope = self.scopes.current() or self.scopes.of_starter()
        if scope is not None:
            return scope.route
        if not self.sticky.is_chosen:
            self.scopes.refuse_beside_blocks()
        return self.sticky.route

    def wait_for_graphs(self) -> None:
        """Wait until a block of this context may change what CUDA graphs read."""
        if self.captured:
            self.captured.wait(self.scopes.here())

    def route_of_compiled_pass(self, device: torch.device) -> Route | None:
        """The route of the pass that runs a graph of torch.compile here and now, on a device."""
        now = self.passes.current()
        if now is None:
            now = self.passes.none()
            now.route = self.rows().route
        if now.route is not None:
            self.passes.site(now, device)  # whose stream waits for the adapters
        return now.route

    def refuse_in_use(self) -> None:
        """Refuse a change of the model while anybody is using its rows."""
        self.passes.forget_interrupted()
        alive = [scope for scope in self.scopes.all_open() if not scope.is_left_behind]
        busy = [f"the {scope} is open" for scope in alive]
        if self.passes.in_progress:
            busy.append("a forward pass is in progress")
        if busy:
            raise RoutingBusyError(
                f"the model cannot be detached while {busy[0]}; let it end first"
            )

    @property
    def disabled(self) -> bool:
        """Whether a disable_adapter block is what counts here."""
        if torch.compiler.is_compiling():
            return False
        began = self.passes.current()
        return self.rows().disabled if began is None else began.disabled

    def begin(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        caller: FrameType,
        given: Callable[[Callable[[Route], None]], None] | None = None,
    ) -> None:
        """A pass begins at the model's top: find its rows, and refuse a batch that does not fit.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward.
            caller: a frame that is on the stack until the pass is over.
            given: makes the rows that were given with this call, and calls its argument with them
                while their adapters stay.
        """
        # Begun before anything is refused, because the end comes then, too.
        began = self.passes.begin(caller)
        self.view.cell.in_pass = True
        if given is None:
            self._find_rows(began)
        else:
            given(lambda route: self._find_rows(began, RowsHere(route)))
        if self.layout.towers:
            began.inputs = self.layout.bound(args, kwargs)
        samples, tokens = self.layout.batch(args, kwargs) or (None, 0)
        began.shape = Shape(samples, tokens, began.shape.beams)
        began.shape.check(began.route, kwargs)
        cell = self.view.cell  # the model's own forward may be compiled
        cell.shape = began.shape
        cell.plans.clear()  # of a pass that was interrupted
        if cell.source is not began.route:
            cell.show(began.route, self._device())

    def begin_traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """As `begin`, while torch.compile traces the model."""
        self._before_tracing()
        traced = self.view.cell
        traced.shape.samples, traced.shape.tokens = self.layout.batch(args, kwargs) or (None, 0)
        traced.shape.check(traced.route, kwargs)

    def _find_rows(self, found: Pass, given: RowsHere | None = None) -> None:
        """Give a pass its rows. From then on nobody frees their adapters."""
        try:
            self._take_rows(found, given)
        except UnknownAdapterError:
            # Another thread may be about to choose other sticky rows.
            holding(self.changes, lambda: self._take_rows(found, given))

    @synchronized
    def _take_rows(self, found: Pass, given: RowsHere | None) -> None:
        past = self.passes.of_backward()
        if past is not None:
            found.route, found.disabled, beams = past.route, past.disabled, past.shape.beams
            found.inputs = past.inputs
        else:
            found.route, found.disabled, beams, found.inputs = given or self.rows()
        found.shape = Shape(beams=beams)
        if past is not None:
            found.resolved, found.towers = past.resolved, past.towers
        elif found.route is not None:
            found.resolved = found.route.resolve(self.slots)
            for path, route in found.route.towers.items():
                own = Pass(found.owner, route=route, resolved=route.resolve(self.slots))
                found.towers[path] = own

    def check_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a batch of generate() that does not fit the rows, before it is repeated."""
        route, batch = self.rows().route, self.layout.batch(args, kwargs)
        if route is not None and batch is not None:
            route.check(batch[0], None)

    def end(self, output: object) -> None:
        """The pass that began last in this context is over."""
        cell = self.view.cell
        cell.plans.clear()
        cell.shape = Shape()
        if cell.source is not cell.between_passes:
            cell.show(cell.between_passes, self._device())
        ended = self.passes.end()
        cell.in_pass = self.passes.current() is not None
        if ended is not None and torch.is_grad_enabled():
            self.passes.follow_into_backward(ended, output)

    def end_traced(self) -> None:
        """As `end`, while torch.compile traces the model."""
        self.view.cell.plans.clear()
        self.view.cell.shape.samples = None

    def now(self) -> Pass | Cell | None:
        """The pass that a layer which runs at this moment belongs to; None = the base model."""
        if torch.compiler.is_compiling():
            self._before_tracing()
            return self.view.cell if self.slots.capacity else None
        found = self.passes.running()
        if found is None:  # the layer is called by itself
            found = self.passes.none()
            self._find_rows(found)
        route = found.route
        return None if route is None or not route.selects else found

    def plan(
        self, now: Pass | Cell, x: Tensor, pool: Pool, weight: Tensor | None, place: Place
    ) -> ops.AnyPlan | None:
        """The plan for a layer's input x [..., in_features]; None = nothing to add.

        Args:
            now: the pass.
            x: the input.
            pool: the layer's.
            weight: of a base layer that can be fused with its adapters.
            place: where the layer is.
        """
        seen = as_seen_from(place, now, x, pool, self.layout)
        if seen is None:
            return None
        # A graph of torch.compile learns where it runs when it runs.
        site = self.passes.site(now, x.device) if isinstance(now, Pass) else (x.device, 0)
        return self._plans.plan(seen, x, pool, weight, self.settings, site)


def _after_fork() -> None:
    for ref in ROUTERS.valuerefs():
        router = ref()
        if isinstance(router, Router):
            router.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
