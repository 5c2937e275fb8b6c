"""Forward passes: what the layers of one read, and which of them may still need their backward."""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..core import (
    Pool,
    Routing,
    Site,
    Stream,
    StreamOrder,
    computed_once,
    has_streams,
    site_on,
)
from ..errors import RoutingError
from .route import Resolved, Route

# (samples, tokens of each)
Batch: TypeAlias = tuple[int, int]

# The arguments of a model that show its batch, most reliable first. Without any of them the first
# tensor counts.
BATCH_ARGUMENTS = (
    *("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"),
    *("hidden_states", "sample", "pixel_values", "input_features", "input_values"),
)
# The layers of a pass that share a plan: by their rows, where they run, and their method.
Layers: TypeAlias = tuple[int, Site, ops.Method]


class Planned(NamedTuple):
    """A plan, the layers that it is for, and all that it depends on where that can be told."""

    layers: Layers
    case: object
    plan: ops.AnyPlan | None  # None = nothing to add


NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


class RowsHere(NamedTuple):
    """What a pass has that begins here and now."""

    route: Route | None  # None = the base model
    disabled: bool = False  # by disable_adapter
    beams: int | None = None  # inside generate(): how often it repeats each sample, in order
    inputs: Mapping[str, Any] = NO_INPUTS  # inside generate(): its arguments


# No tuple: torch.compile guards all values of a tuple, and of this one those that it reads.
@dataclass
class Shape:
    """The batch of a pass."""

    samples: int | None = None  # None = the pass did not begin at the model's top
    tokens: int = 0  # of each sample
    beams: int | None = None  # inside generate(): how often it repeats each sample, in order

    def begins(self, x: Tensor) -> bool:
        """Whether a layer's input x begins with the samples, or flattened with their tokens."""
        first = x.shape[0] if x.ndim >= 2 else 1
        return first == self.samples or (
            x.ndim == 2 and self.samples is not None and first == self.samples * self.tokens
        )

    def samples_of(self, x: Tensor, route: Route) -> int | None:
        """How many samples a layer's input x holds; None if the route need not know.

        Raises:
            RoutingError: x does not begin with the batch, so that its rows cannot be told apart.
        """
        first = x.shape[0] if x.ndim >= 2 else 1
        if self.samples is None:
            return first
        if self.begins(x):
            return self.samples
        if route.uniform or route.per_token:
            return None
        raise RoutingError(
            f"a layer's input must begin with the batch of {self.samples} samples (or, flattened, "
            f"with its {self.samples} x {self.tokens} tokens) unless all `rows` are equal, "
            f"got {list(x.shape)}; run the samples of each adapter as a batch of their own, or "
            "leave the layer out of `targets`"
        )

    def check(self, route: Route | None, kwargs: Mapping[str, Any]) -> None:
        """Refuse a route that does not fit the batch.

        Args:
            route: of the pass; None = the base model.
            kwargs: of the model's forward.
        """
        if route is None:
            return
        if self.samples is not None:
            route.check(self.samples, self.beams)
        if "cu_seq_lens_q" in kwargs and not (route.uniform or route.per_token):
            raise RoutingError(
                "`rows` must have one entry per sequence, got one per sample of a packed batch "
                "(`cu_seq_lens_q`), which has many sequences in a sample; use "
                "route_tokens(rows, lengths=...)"
            )


@dataclass(eq=False)
class Pass:
    """A forward pass of a model: its route, resolved when it began, and nothing else counts."""

    owner: object  # tells the passes of one model from those of another
    caller: FrameType | None = None  # which is on the stack until the pass is over; then None
    outer: "Pass | None" = None  # the pass, of any model, that this one runs in
    thread: object = None  # tells those of one thread from those of another
    route: Route | None = None  # None = the base model
    disabled: bool = False  # by disable_adapter
    shape: Shape = field(default_factory=Shape)
    resolved: Resolved | None = None  # None if the host may not read the route's index
    plans: list[Planned] = field(default_factory=list)
    # Of layers that the pass has met: by all that their choice of a plan depends on.
    known: dict[object, ops.AnyPlan | None] = field(default_factory=dict)
    placed: dict[Site, Routing] = field(default_factory=dict)  # the route's own rows
    streams: dict[Site, Stream | None] = field(default_factory=dict)  # on which layers have run
    # Of layers whose batch is another one; see towers.py.
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the model's arguments, by name
    towers: "dict[str, Pass]" = field(default_factory=dict)  # those that have rows of their own
    apart: "dict[object, Pass]" = field(default_factory=dict)  # made from these, by layers' inputs

    def touches(self, pool: Pool) -> bool:
        """Whether any row may select an adapter that is in a layer's pool."""
        if self.resolved is None:
            return bool(pool.spans)
        # In this order it looks up the few that are used, not all that are loaded.
        return not pool.spans.keys().isdisjoint(self.resolved.used)

    @computed_once
    def alike(self) -> "Pass":
        """The pass, whose rows are all equal, for a layer with any batch."""
        assert self.route is not None
        first = Route(self.route.routing.expand_rows(1), uniform=True)
        return Pass(self.owner, route=first, resolved=self.resolved and self.resolved.picked([0]))

    def finish(self) -> None:
        """Let go of what only layers that run need."""
        self.plans.clear()  # they may hold much
        self.known.clear()
        self.placed.clear()
        self.streams.clear()
        self.inputs, self.caller = {}, None
        vars(self).pop("alike", None)
        for inner in (*self.towers.values(), *self.apart.values()):
            if inner is not self:
                inner.finish()


# One variable for all models, because a context never lets go of one.
_PASS: ContextVar[Pass | None] = ContextVar("lora_mux_pass", default=None)


class Passes:
    """The passes of one model that are in progress, or whose backward may still come."""

    def __init__(self, order: StreamOrder) -> None:
        self._order = order
        self._owner = object()
        # By id. No WeakSet, which other threads could not look through while it changes.
        self._in_progress: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()
        self._hooks: dict[int, weakref.ref[functools.partial[None]]] = {}
        self._in_backward: dict[int, Pass] = {}  # by autograd's number of the backward
        self._thread = _Thread()
        self.before: Callable[[], None] = (
            _nothing  # called before a pass begins that is in no other
        )

    def none(self) -> Pass:
        """What a layer reads that is called by itself."""
        self.before()
        return Pass(self._owner)

    def handed_in(self, device: torch.device) -> None:
        """A layer takes a routing of its own, whose adapters no pass waits for."""
        if self.current() is None:
            self.before()
        self._order.read_unseen(device)

    def begin(self, caller: FrameType) -> Pass:
        """From now on the layers that run in this context belong to a new pass.

        Args:
            caller: a frame that is on the stack until the pass is over.
        """
        self.forget_interrupted()
        if self.current() is None:
            self.before()
        began = Pass(self._owner, caller, _PASS.get(), self._thread.token)
        self._in_progress[id(began)] = began
        _PASS.set(began)
        return began

    def forget_interrupted(self) -> None:
        """Forget passes and backwards that an interrupt has ended, of which nothing tells us."""
        while (began := self.current()) is not None:
            # One of another thread is in a copied context; only that thread knows whether it runs.
            if began.thread is not self._thread.token or is_running(began.caller):
                break
            self.end()
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            self._in_backward.pop(self._thread.backward, None)

    def end(self) -> Pass | None:
        """The pass of this context is over; None if there is none."""
        ended = self.current()
        if ended is not None:
            self._note_reads(ended)  # before anybody may put its adapters out
            self._in_progress.pop(id(ended), None)
            _PASS.set(ended.outer)
            ended.finish()
        return ended

    def site(self, now: Pass, device: torch.device) -> Site:
        """Where a layer of a pass runs. The first one there lets its stream wait for the adapters.

        Not the pass's begin: whoever calls the layers may have chosen another stream since.
        """
        here = site_on(device)
        if has_streams(device) and here not in now.streams:
            assert now.route is not None
            stream = now.streams[here] = self._order.wait(device, now.route.slots)
            # Of a layer that is called by itself, and of a backward, nothing tells the end.
            if stream is not None and now.caller is None:
                self._order.read(device, stream, now.route.slots, is_over=False)
        return here

    def _note_reads(self, ended: Pass) -> None:
        for (device, _), stream in ended.streams.items():
            if stream is not None and ended.route is not None:
                is_over = not torch.is_grad_enabled()  # else a backward may come
                self._order.read(device, stream, ended.route.slots, is_over=is_over)

    def current(self) -> Pass | None:
        """The pass in progress in this context."""
        found = _PASS.get()
        # A copy of a context may still hold a pass that is over.
        while found is not None and (found.owner is not self._owner or found.caller is None):
            found = found.outer
        return found

    @property
    def in_progress(self) -> bool:
        """Whether a pass is in progress in any context."""
        return bool(self._in_progress_now())

    def _in_progress_now(self) -> list[Pass]:
        alive = (ref() for ref in self._in_progress.valuerefs())
        return [began for began in alive if began is not None]

    def forget_other_threads(self) -> None:
        """In a process that was forked, where they do not run."""
        for began in self._in_progress_now():
            if began.thread is not self._thread.token:
                self._in_progress.pop(id(began), None)

    def use_any(self, handles: Collection[int]) -> bool:
        """Whether a pass that is in progress may use one of these adapters."""
        used = handles_of(began.route for began in self._in_progress_now())
        return used is None or not used.isdisjoint(handles)

    def in_use(self) -> list[Route | None]:
        """The routes of passes that are in progress, or may still be run backward."""
        alive = (hook() for hook in list(self._hooks.values()))
        awaiting = [hook.args[0].route for hook in alive if hook is not None]
        return awaiting + [began.route for began in self._in_progress_now()]

    def follow_into_backward(self, past: Pass, output: object) -> None:
        """Let the backward of a pass's output find the pass.

        By then its block may have ended, and another begun.
        """
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                hook = functools.partial(self._enter_backward, past)
                self._hooks[id(hook)] = weakref.ref(hook, self._forget_hook(id(hook)))
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _forget_hook(self, key: int) -> Callable[[object], object]:
        hooks = self._hooks  # not self, which would outlive the model
        return lambda _: hooks.pop(key, None)

    def _enter_backward(self, past: Pass, grad: Tensor) -> None:
        number = torch._C._current_graph_task_id()
        self._in_backward[number] = past
        self._thread.backward = number
        in_backward = self._in_backward

        def leave() -> None:
            in_backward.pop(number, None)

        torch.autograd.Variable._execution_engine.queue_callback(leave)

    def running(self) -> Pass | None:
        """The pass that a layer which runs here belongs to: of each layer, so it must be quick."""
        past = self.of_backward() if self._in_backward else None
        return past or self.current()

    def of_backward(self) -> Pass | None:
        """The pass whose layers checkpointing runs again at this moment."""
        number = torch._C._current_graph_task_id()
        if number == -1:
            return None
        # A backward inside a backward, as of reentrant checkpoints, has a number of its own.
        return self._in_backward.get(number) or self._in_backward.get(self._thread.backward)


def _nothing() -> None:
    pass


class _Thread(threading.local):
    def __init__(self) -> None:
        self.backward = -1
        self.token = object()  # no number, which a later thread may get


def tensors_in(output: object) -> Iterator[Tensor]:
    """The tensors of a model's output, also those inside tuples, lists, mappings, dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        yield from tensors_in(vars(output))


def is_running(frame: FrameType | None) -> bool:
    """Whether a frame is on this thread's stack."""
    here: FrameType | None = sys._getframe(1)
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None


def handles_of(routes: Iterable[Route | None]) -> frozenset[int] | None:
    """The handles that any of the routes selects; None if only a device knows."""
    found: frozenset[int] = frozenset()
    for route in routes:
        if route is not None:
            if route.handles is None:
                return None
            found |= route.handles
    return found


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
    """(samples, tokens of each) of a model's inputs; None if no tensor tells."""
    candidates = [kwargs.get(name) for name in BATCH_ARGUMENTS] + [*args, *kwargs.values()]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.ndim:
            # Ids are [samples, tokens]; embeddings and hidden states [samples, tokens, features].
            has_tokens = tensor.ndim == (3 if tensor.is_floating_point() else 2)
            return tensor.shape[0], tensor.shape[1] if has_tokens else 1
    return None
