"""The plans of forward passes, which layers that are alike share."""

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..core import LastPass, Pool, Routing, Site, Slots, slot_of, unchecked_routing
from ..errors import RoutingError, TrainingError
from .compiled import Cell, rows_now
from .graphs import CapturedRoutings
from .passes import Layers, Pass, Planned
from .scopes import Scopes


class SharedPlans:
    """The plans of passes, and the last of the CPU's form.

    The next pass is often the same case, as in generate().
    """

    def __init__(self) -> None:
        self._last: Planned | None = None

    def find(self, of_pass: list[Planned], layers: Layers, case: object) -> Planned | None:
        """What was planned for these layers in this pass, or for the same case in an earlier one.

        Args:
            of_pass: the pass's own. A list, because the sizes of a compiled batch may be symbols,
                which no dict can look up.
            layers: which layers.
            case: all that the plan depends on; None = that cannot be told.
        """
        for planned in of_pass:
            if planned.layers == layers:
                return planned
        # In this order: torch.compile guards what is read, and knows no case.
        if case is None:
            return None
        last = self._last  # read once: other threads write it
        if last is None or last.case != case:
            return None
        of_pass.append(last)
        return last

    def add(
        self, of_pass: list[Planned], layers: Layers, case: object, plan: ops.AnyPlan | None
    ) -> Planned:
        """Keep a plan for the pass, and for a case that is not None."""
        planned = Planned(layers, case, plan)
        of_pass.append(planned)
        if case is not None:
            self._last = planned
        return planned


class Plans:
    """Makes the plans of one model."""

    def __init__(
        self, number: int, slots: Slots, scopes: Scopes, captured: CapturedRoutings
    ) -> None:
        self._number = number  # of the router
        self._slots = slots
        self._scopes = scopes
        self._captured = captured
        self._shared = SharedPlans()

    def plan(
        self,
        now: Pass | Cell,
        x: Tensor,
        pool: Pool,
        weight: Tensor | None,
        settings: ops.Settings,
        site: Site,
    ) -> ops.AnyPlan | None:
        """The plan for a layer's input x [..., in_features]; None = nothing to add.

        Args:
            now: the pass, with the rows of this input.
            x: the input.
            pool: the layer's.
            weight: of a base layer that can be fused with its adapters.
            settings: how adapters are computed.
            site: where the layer runs. A plan is read on the stream on which it was made.
        """
        like = None
        if isinstance(now, Pass):
            like = site, ops.like(x, pool, weight)
            if like in now.known:
                return now.known[like]
        route, shape = now.route, now.shape
        assert route is not None
        rows = prod(x.shape[:-1])
        samples = shape.samples_of(x, route)  # for each layer: it refuses shapes
        gate = route.routing.weight.requires_grad
        trained = self._slots.trains
        method = ops.method(settings, x, rows, pool, None if gate or trained else weight, trained)
        # A plan with gradients is each layer's own: checkpointing runs layers again one by one.
        if shape.samples is None or gate:
            return self._made(now, x, rows, samples, method, site)
        layers, case = (rows, site, method), None
        if method.form == "cpu":  # never while compiling, which would guard the version
            kept = self._slots.suspensions, trained and self._slots.trained
            case = route.value, rows, samples, shape.beams, kept
        known = self._shared.find(now.plans, layers, case)
        if known is None:
            made = self._made(now, x, rows, samples, method, site)
            known = self._shared.add(now.plans, layers, case, made)
        if isinstance(now, Pass):
            now.known[like] = known.plan
        return known.plan

    def _made(
        self,
        now: Pass | Cell,
        x: Tensor,
        rows: int,
        samples: int | None,
        method: ops.Method,
        site: Site,
    ) -> ops.AnyPlan | None:
        route, beams = now.route, now.shape.beams
        assert route is not None
        if now.shape.samples is None and samples == route.routing.rows:
            beams = None  # generate() runs encoders by themselves, before it repeats samples
        manner = route.manner(rows, samples, beams)
        if isinstance(now, Cell):
            given = route.routing
            # A trace holds no values, so that there is nothing to note on the user's routing.
            view = unchecked_routing(given.index, given.weight, LastPass()).to(x.device)
            routing = rows_now(view, manner, route.expand, self._number)
            return ops.plan(manner.spread(routing), self._slots, method)
        if method.on_host and now.resolved is not None:
            given, index = route.routing, now.resolved.slots
            resolved = unchecked_routing(index, given.weight, given.last_pass).to(x.device)
            return ops.plan(manner.spread(resolved), self._slots, method, resolved=True)
        used = None if now.resolved is None else now.resolved.used
        if method.trained and ops.capturing(site[0]):
            self._refuse_training(used)
        placed = manner.spread(self._at(now, site, method))
        return ops.plan(placed, self._slots, method, used=used)

    def _refuse_training(self, used: Collection[int] | None) -> None:
        """Refuse to capture a pass that trains: it copies from the host, where a graph has none.

        Args:
            used: the slots that it selects; None = only the device knows.
        """
        slots = self._slots.trained_among(used)
        if slots:
            names = self._slots.names_of(h for h in self._slots.tenants if slot_of(h) in slots)
            raise TrainingError(
                "a CUDA graph must be captured of a pass that trains nothing, got one whose rows "
                f"may name {', '.join(map(repr, names))} "
                + (
                    "with gradients; capture it under torch.no_grad()"
                    if torch.is_grad_enabled()
                    else "with dropout; call eval() on what train() returned before capturing"
                )
            )

    def _at(self, now: Pass, site: Site, method: ops.Method) -> Routing:
        """The pass's own rows where its layers run."""
        route, routing = now.route, now.placed.get(site)
        assert route is not None
        capturing = ops.capturing(site[0])
        if routing is None:
            placed, source = route.placed, site
            if capturing:  # a replay waits for what was placed by another stream
                source = next((there for there in list(placed) if there[0] == site[0]), site)
            if capturing and source not in placed:
                raise RoutingError(
                    "run the model once under this route before capturing it in a CUDA graph; "
                    "nothing can be copied to the GPU during the capture"
                )
            # A copy, because later routes overwrite what a graph reads, and this one may return.
            routing = now.placed[site] = route.at(source, copy=not method.on_host)
        for there, held in list(route.placed.items()) if capturing else ():
            if held is not routing:
                continue
            if route.routing.weight.requires_grad:
                raise RoutingError(
                    "`weights` must not need gradients while a CUDA graph is captured, got a "
                    "tensor that does; detach() it"
                )
            del route.placed[there]  # from now on it is the graph's
            self._captured.add(routing, route, self._scopes.current())
        return routing
