"""What graphs of torch.compile read of the rows in force.

A graph has the rows as inputs: new tensors for each route, which always have the same shape. They
come from a view that follows the scopes of its thread. Nothing of ours runs between two asyncio
tasks of a thread, so that an operator inside the graph looks whose rows they should be.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from ..core import NONE, LastPass, Routing, holding, unchecked_routing
from ..errors import RoutingBusyError
from .passes import Planned, Shape
from .route import Expand, Manner, Route
from .scopes import Sticky

LEAST_PLACES = 4  # adapters in a row for which a compiled model has room from the beginning
CPU = torch.device("cpu")


class Owner(Protocol):
    """A router, as the operator sees it."""

    view: "CompiledView"

    def begin_to_show(self) -> None:
        """There is a graph that reads the views."""

    def route_of_compiled_pass(self, device: torch.device) -> Route | None:
        """The route of the pass that runs a graph of torch.compile here and now, on a device."""


ROUTERS: "weakref.WeakValueDictionary[int, Owner]" = weakref.WeakValueDictionary()
NUMBERS = itertools.count()


def before_tracing(router: int) -> Callable[[], bool]:
    """What is to be called while torch.compile traces a model: from then on its views are made."""

    def tell() -> bool:
        owner = ROUTERS.get(router)
        if owner is not None:
            with _disable_current_modes():  # of torch.export, whose tensors have no values
                owner.begin_to_show()
        return True

    # As torch.compiler.assume_constant_result does, which would import a compiler for everybody. It
    # runs while a graph is traced, and leaves nothing in the graph.
    tell._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return tell


LIBRARY: Any = torch.library.Library("lora_mux", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "rows_now(Tensor index, Tensor weight, int router, str kind, str repeats, bool as_given)"
    " -> (Tensor, Tensor)"
)


def rows_now(view: Routing, manner: Manner, expand: Expand, router: int) -> Routing:
    """In a graph: the rows that this pass should have, of the shape of those it was given."""
    # An exported program keeps the rows that it was made with. The flag: is_exporting() is True in
    # whatever torch.compile of 2.7 to 2.12 traces. Torch 2.6 has neither, and exports without
    # dynamo.
    without_dynamo = not torch.compiler.is_dynamo_compiling()
    if getattr(torch.compiler, "_is_exporting_flag", without_dynamo):
        return view
    # With gradients the rows are inputs of the graph, and of its backward.
    as_given = torch.is_grad_enabled()
    repeats = _said(expand) if manner.steps else ""
    index, weight = torch.ops.lora_mux.rows_now(
        view.index, view.weight.detach(), router, manner.kind, repeats, as_given
    )
    return unchecked_routing(index, view.weight if as_given else weight, LastPass())


@torch.library.impl(LIBRARY, "rows_now", "CompositeExplicitAutograd")
def _rows_now(
    index: Tensor, weight: Tensor, router: int, kind: str, repeats: str, as_given: bool
) -> tuple[Tensor, Tensor]:
    owner = ROUTERS.get(router)
    # A graph of CUDA's reads its inputs in place at each replay. A backward has those of its pass.
    replayed = ops.capturing(index.device) or torch._C._current_graph_task_id() != -1
    if owner is None or replayed:
        return index.clone(), weight.clone()
    route = owner.route_of_compiled_pass(index.device)
    if as_given:
        fits = owner.view.cell.source is route
    else:
        fits = _fits(route, index, kind, repeats)
    if not fits:
        raise RoutingBusyError(
            "the rows of this compiled pass are not those that its thread prepared last: another "
            "task has changed them, or another thread; open the `with` block right around the "
            "call, without an await in between"
        )
    if as_given:
        _read(owner.view.cell.route)
        return index.clone(), weight.clone()
    if route is None:
        return torch.full_like(index, NONE), torch.zeros_like(weight)
    rows, places = index.shape
    made = _read(padded(route, rows, places, index.device))
    return made.index.to(index.dtype, copy=True), made.weight.detach().to(weight.dtype, copy=True)


def _read(shown: Route) -> Routing:
    if shown.made is not None:
        shown.made.read(shown.routing.index, shown.routing.weight)
    return shown.routing


@torch.library.register_fake("lora_mux::rows_now", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    index: Tensor, weight: Tensor, router: int, kind: str, repeats: str, as_given: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(index), torch.empty_like(weight)


def _fits(route: Route | None, index: Tensor, kind: str, repeats: str) -> bool:
    """Whether a graph that was made for rows of this kind computes the route rightly."""
    if route is None:
        return True
    if route.routing.index.shape[1] > index.shape[1]:
        return False
    if route.uniform:
        return True
    if route.routing.rows != index.shape[0] or route.per_token != (kind == "tokens"):
        return False
    return kind != "first" and repeats in ("", _said(route.expand))


def _said(expand: Expand) -> str:
    """A way of repeating samples as an argument of the operator; generate() interleaves them."""
    if isinstance(expand, Mapping):
        return "".join(f"{way}{times}" for way, times in expand.items())
    return expand or "interleave"


class Cells(dict[int, "weakref.ref[Cell]"]):
    """The views of all threads."""

    are_read = False  # there is a graph that reads them

    def begin_to_show(self, sticky: Route | None, device: torch.device) -> None:
        """From now on there is one."""
        for cell in self._alive():
            if not self.are_read and not cell.in_scope:  # nobody has told it of the sticky rows
                cell.between_passes = sticky
                if not cell.in_pass and cell.source is not sticky:
                    cell.source, cell.is_behind = sticky, True
            cell.is_read = True
            if cell.is_behind:
                cell.make(device)
        self.are_read = True

    def follow_sticky(self, route: Route | None, device: torch.device) -> None:
        """The sticky rows have changed. Before there is such a graph, nobody has to tell."""
        for cell in self._alive():
            if not cell.in_scope:
                cell.follow(route, device, False)

    def _alive(self) -> "list[Cell]":
        return [cell for ref in list(self.values()) if (cell := ref()) is not None]


class CompiledView(threading.local):
    """The rows in force in one thread, as compiled models read them."""

    def __init__(self, cells: "Cells", sticky: Sticky, lock: threading.RLock) -> None:
        self.cell = Cell()  # once for each thread
        number = id(self.cell)

        def enter() -> None:
            self.cell.is_read = cells.are_read
            self.cell.follow(sticky.route, CPU, False)
            # No WeakSet, of which a look at all would take a quarter of set_adapter's time.
            cells[number] = weakref.ref(self.cell, lambda _: cells.pop(number, None))

        holding(lock, enter)  # another thread may be changing the sticky rows


class Cell:
    """The view of one thread.

    For batches with the same number of samples, all routes have the same shape here, including the
    base model and the routes of set_adapter, so that one graph serves them all. torch.compile
    guards shapes and not values: a new tensor for each route costs no new graph.
    """

    def __init__(self) -> None:
        self._rows = 1  # of the last route that had one for each sample
        self._places = LEAST_PLACES  # of the widest route so far
        self.is_read = False  # until then nobody needs to make it, and to bring it to a device
        self.is_behind = False
        self.source: Route | None = None
        self.between_passes: Route | None = None
        self.in_scope = False  # the rows are those of a block or a call, not the sticky ones
        self._base_shape = self._rows, self._places, CPU
        self._base = self.route = _base(*self._base_shape)
        self.in_pass = False  # one that runs here, and is not traced
        # Of the pass that is being traced.
        self.shape = Shape()
        self.plans: list[Planned] = []

    def follow(self, route: Route | None, device: torch.device, in_scope: bool) -> None:
        """Let compiled models read this route, on this device; None = the base model."""
        self.between_passes, self.in_scope = route, in_scope
        self.show(route, device)

    def show(self, route: Route | None, device: torch.device) -> None:
        """The same for one pass only."""
        self.source = route
        if torch.compiler.is_compiling():
            # torch.export is tracing: sizes may be symbols, which must not outlive the trace.
            self.route, self.is_behind = route or self._base, False
            return
        self.is_behind = True
        if self.is_read:
            self.make(device)

    def make(self, device: torch.device) -> None:
        """Make what graphs read, on a device."""
        self.is_behind = False
        route = self.source
        if route is not None:
            self._places = max(self._places, route.routing.index.shape[1])
            if not (route.uniform or route.per_token):
                self._rows = route.routing.rows
        shape = self._rows, self._places, CPU if device.type == "meta" else device
        if route is not None:
            self.route = padded(route, *shape)
            return
        if self._base_shape != shape:  # each block ends with the base model
            self._base_shape, self._base = shape, _base(*shape)
        self.route = self._base


# Graphs guard inference tensors as well, so these are normal ones even inside inference_mode.
# Not around `follow`, which set_adapter calls: entering the mode takes a third of its time.
def padded(route: Route, rows: int, places: int, device: torch.device) -> Route:
    """A route as a compiled model reads it, made once for each shape and device."""
    shape = rows, places, device
    if route.padded is None or route.padded[0] != shape:
        route.padded = shape, _pad(route, rows, places, device)
    return route.padded[1]


@torch.inference_mode(False)
def _pad(route: Route, rows: int, places: int, device: torch.device) -> Route:
    index, weight = route.routing.index, route.routing.weight
    if route.uniform:
        index, weight = index.expand(rows, -1), weight.expand(rows, -1)
    missing = (0, places - index.shape[1])
    padded = unchecked_routing(
        nn.functional.pad(index.long(), missing, value=NONE),
        nn.functional.pad(weight, missing),
        route.routing.last_pass,
    )
    placed = padded.to(device)
    return replace(route, routing=placed, padded=None, resolved=None, placed={})


@torch.inference_mode(False)
def _base(rows: int, places: int, device: torch.device) -> Route:
    return Route(Routing(torch.full((rows, places), NONE, device=device)), uniform=True)
