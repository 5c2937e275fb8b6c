"""Mux: all targets of an attached model share one set of adapters and one routing."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .. import ops
from ..adapters import Adapters, BoundedAdapters
from ..core import Routing, Selection, Slots, weighted_adapters
from ..errors import ArgumentTypeError, RoutingBusyError, TargetError
from ..layers import Target, common_dtype, dtype_of, swap_in, swap_out
from ..routes import Expand, Route, Router, Rows, UniformRoutes, make_route
from .generation import follow_generation, forget_generation
from .given_rows import Call, GivenRows
from .layout import find_layout
from .top import (
    BeginPass,
    EndPass,
    allow_broadcasts,
    keep_from_broadcasts,
    mux_of,
    remove_hooks,
    unwrapped,
)

logger = logging.getLogger(__name__)

# Of models that were detached: a handle of then must not mean another adapter after a new attach.
_GENERATIONS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


class Mux(GivenRows):
    """The adapters of an attached model, and which rows use which of them.

    `lora_mux.attach` and `lora_mux.attach_peft` make it.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        settings: ops.Settings,
        memory: int | None = None,
        joining: Mapping[str, nn.Module] = MappingProxyType({}),
        heads: Iterable[str] = (),
    ) -> None:
        self._model: nn.Module | None = model
        self._linears = [target.linear for target in targets.values()]
        self._slots = Slots(_GENERATIONS.get(model, ()))
        self._uniform_routes = UniformRoutes(self._slots)
        self._router = Router(self._slots, settings)
        dtype = common_dtype(model)
        self._router.layout, places = find_layout(model, [*targets, *joining])
        self._joined, self._heads = {}, frozenset(heads)
        self._joining = {path: (layer, places[path]) for path, layer in joining.items()}
        try:
            self._layers = {
                path: swap_in(target, places[path], self._router, dtype_of(target.linear, dtype))
                for path, target in targets.items()
            }
            self._adapters = (
                Adapters(self._layers, self._slots, self._router)
                if memory is None
                else BoundedAdapters(self._layers, self._slots, self._router, memory)
            )
            keep_from_broadcasts(model, [*targets, *joining])
            model.register_forward_pre_hook(BeginPass(self), with_kwargs=True)
            model.register_forward_hook(EndPass(self), always_call=True)
            follow_generation(model, self)
        except BaseException:  # an interrupt; `memory` is less than is needed, or than there is
            self._take_out(model)
            raise
        logger.info("attached %d targets", len(self._layers))

    def __getstate__(self) -> dict[str, Any]:
        self._adapters.settle()  # before the pools are read for a copy or a pickle
        return vars(self).copy()

    @classmethod
    def of(cls, model: nn.Module) -> "Mux":
        """The Mux of an attached model, as `attach` returned it.

        A copy of an attached model (copy.deepcopy, pickle, torch.save) is attached as well, with
        the same adapters and the same sticky rows, and by a Mux of its own, which is found here.

        Raises:
            ArgumentTypeError: it is no nn.Module.
            TargetError: the model is not attached.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
        mux = mux_of(unwrapped(model))
        if not isinstance(mux, cls):
            raise TargetError(
                f"`model` must be attached, got a plain {type(model).__name__}; call attach(model)"
            )
        return mux

    @property
    def model(self) -> nn.Module:
        """The attached model: the one that was given to attach, or that was inside its wrapper."""
        return self._check_attached()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that a pass would use that began here; empty for the base."""
        route = self._router.rows().route
        if route is None:
            return []
        return self._slots.names_of(route.routing.index.flatten().tolist())

    def route(
        self,
        rows: Rows,
        weights: Tensor | None = None,
        *,
        expand: Expand = None,
        towers: Mapping[str, Rows] | None = None,
    ) -> AbstractContextManager[Routing]:
        """Give each sample of a batch its own adapters, inside a `with` block.

        The block belongs to the thread, the asyncio task or the generator that opens it; others do
        not see it. With transformers' continuous batching, the requests that are added inside the
        block take the entries in order.

        Args:
            rows: one entry per sample: None or `"__base__"` (the base model), a name, a sequence of
                names (their sum), or a mapping name -> weight. Or an int tensor [samples, J] of
                handles, where -1 selects none; or [samples, tokens, J], as `route_tokens` takes it.
            weights: floating, of the index tensor's shape; only with one.
            expand: how the batch may repeat its samples outside of generate(), which needs no
                hint: "interleave" (a, a, b, b), or "tile" (a, b, a, b: classifier-free guidance),
                or both in order with how often: {"interleave": 2, "tile": 2} (a, a, b, b, a, a, b,
                b: two images for each prompt, with guidance).
            towers: rows of sub-models that have a batch of their own, as a vision tower: name ->
                one entry for each of its images, of the same kind as `rows`. Without it they are
                derived where that is certain, and a batch is refused where an adapter of it
                touches another tower.

        Returns:
            A context manager that yields the Routing.

        Raises:
            UnknownAdapterError: a name or a handle is not loaded.
            RoutingError: rows or weights do not fit. A batch with another number of samples raises
                it at the forward pass. Blocks that end in another order than they began raise it,
                and none of them is in force any more.
            RoutingBusyError: when the block begins: CUDA graphs of the model read the rows of
                another thread's block, which does not end. At a generate(): its thread or task
                has no rows, while others' blocks are open, and nobody chose sticky ones.
            PoolCapacityError: when the block begins: the adapters do not fit beside those that are
                pinned or in use. The other errors of `prefetch` come then, too.
        """
        return self._block(lambda: self._made(rows, weights, expand, towers))

    def route_tokens(
        self,
        rows: Rows,
        weights: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> AbstractContextManager[Routing]:
        """Give each token of a batch its own adapters, inside a `with` block.

        Args:
            rows: as in `route`, with one entry per token of the flattened batch, in order. An index
                tensor may also be [samples, tokens, J].
            weights: floating, of the index tensor's shape; only with one.
            lengths: for packed batches: how many consecutive tokens each entry stands for.

        Returns:
            As `route`, which also lists the errors.
        """
        return self._block(
            lambda: make_route(rows, weights, self._slots, per_token=True, lengths=lengths)
        )

    def call(
        self,
        rows: Rows,
        weights: Tensor | None = None,
        *,
        expand: Expand = None,
        towers: Mapping[str, Rows] | None = None,
    ) -> Call:
        """Give the samples of one call their adapters: `mux.call(rows)(function, *args)`.

        All passes inside the call have these rows, whatever blocks are open. It is for callables
        that do not take `adapter_names=`, as the pipelines of diffusers. forward() and generate()
        of the attached model take that keyword.

        Args:
            rows: as in `route`.
            weights: as in `route`.
            expand: as in `route`.
            towers: as in `route`.

        Returns:
            A callable that runs a function with its arguments, and returns what that returns.

        Raises:
            UnknownAdapterError: a name or a handle is not loaded.
            RoutingError: rows or weights do not fit.
            ArgumentTypeError: at the call: the function is a coroutine or a generator, which would
                run after the call.
        """
        make = self._maker(lambda: self._made(rows, weights, expand, towers))
        return Call(lambda: self._under(make, "call"))

    def set_route(
        self,
        rows: Rows | None,
        weights: Tensor | None = None,
        *,
        expand: Expand = None,
        towers: Mapping[str, Rows] | None = None,
    ) -> None:
        """Give each sample of every batch its own adapters, until the next route is set.

        It takes the arguments of `route`, and raises its errors. `rows=None` goes back to the base
        model.
        """
        self._check_attached()
        if rows is None:
            self.set_adapter(None)
        else:
            self._set(lambda: self._made(rows, weights, expand, towers))

    def set_adapter(
        self, adapter: Selection, weights: float | Sequence[float] | None = None
    ) -> None:
        """Give all rows of every batch the same adapters, until the next route is set.

        Once the adapters are on the device, this takes the same time for any number of layers and
        adapters.

        Args:
            adapter: None (the base model), a name, a sequence of names (their sum), or a mapping
                name -> weight.
            weights: one number for each name, or one for all of them.

        Raises:
            UnknownAdapterError: a name is not loaded.
            RoutingError: a weight is not finite, or the numbers of names and weights differ.
        """
        self._check_attached()
        chosen = weighted_adapters(adapter, weights)
        self._set(lambda: self._uniform_routes.find(chosen))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Give every row the base model inside a `with` block.

        It is a block like those of `route`: the innermost one counts.
        """
        self._check_attached()
        return self._scope(lambda scope: self._router.open(scope, None), "disabled block")

    def detach(self) -> None:
        """Give the plain model back: the same modules, without a trace of the adapters or the Mux.

        After an interrupt the model answers as the base; another call goes on.

        Raises:
            RoutingBusyError: a block is open or a pass is in progress, in any thread or task; or
                requests of transformers' continuous batching have adapters.
        """
        model = self._model
        if model is None:
            model = self._check_attached()  # which raises
        self._router.refuse_in_use()
        if self._adapters.has_promises:
            raise RoutingBusyError(
                "the model cannot be detached while requests of continuous batching have adapters; "
                "let them end, or cancel them and stop their manager"
            )
        _GENERATIONS[model] = self._slots.next_generations
        self._router.set(None)  # what is still to be taken out adds nothing from here on
        self._router.is_detached = True
        for handle in [*self._adapters.training.handles]:
            self._adapters.training.end(handle)
        self._take_out(model)
        self._model = None

    def _take_out(self, model: nn.Module) -> None:
        """Take whatever is there of this Mux out of its model."""
        for linear in self._linears:
            swap_out(linear)
        allow_broadcasts(model)
        forget_generation(model, self)
        remove_hooks(model, self)  # last: `Mux.of` finds the Mux by them

    def __repr__(self) -> str:
        state = "" if self._model is not None else ", detached"
        return f"Mux(targets={len(self._layers)}, adapters={list(self.adapters)}{state})"

    def _block(self, make: Callable[[], Route]) -> AbstractContextManager[Routing]:
        return self._routed(self._maker(make))

    @contextmanager
    def _routed(self, make: Callable[[], Route]) -> Iterator[Routing]:
        with self._under(make, "block") as route:
            yield route.routing

    def _made(
        self,
        rows: Rows,
        weights: Tensor | None,
        expand: Expand,
        towers: Mapping[str, Rows] | None,
    ) -> Route:
        layout = self._router.layout
        if towers is not None and not isinstance(towers, Mapping):
            raise ArgumentTypeError(
                f"`towers` must map names of towers to rows, got {type(towers).__name__}"
            )
        own = None if towers is None else {layout.path_of(n): r for n, r in towers.items()}
        return make_route(rows, weights, self._slots, expand=expand, towers=own)

    def _set(self, make: Callable[[], Route | None]) -> None:
        self._adapters.resident(make, self._router.set, leaving=True)
