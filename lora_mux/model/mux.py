"""Mux: every target of an attached model shares one set of adapters and one routing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters import Adapters, BoundedAdapters, Memory
from ..checkpoints import CONFIG, DIFFUSERS, local_folder, read_checkpoint, read_diffusers
from ..core import LoraWeights, Routing, Selection, Slots, counts, from_names, numbers, selection
from ..errors import ArgumentTypeError, DetachedError, RoutingError
from ..layers import Target, dtype_of, scaling_from, swap_in, swap_out
from ..progress import shown
from ..routes import Expand, Route, Router, Rows, make_route
from .generation import follow_generation

KEPT_ROUTES = 256

logger = logging.getLogger(__name__)


class Mux:
    """The adapters of an attached model and their routing; made by `lora_mux.attach`."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        settings: ops.Settings,
        memory: int | None = None,
    ) -> None:
        self._model: nn.Module | None = model
        self._slots = Slots()
        self._uniform: dict[tuple[tuple[str, float], ...], Route] = {}  # of set_adapter
        self._edition = 0  # slots.edition when they were made
        self._router = Router(self._slots, settings)
        plain = (dtype_of(module, torch.int8) for module in model.modules())
        default = next((d for d in plain if d.is_floating_point), torch.get_default_dtype())
        self._layers = {
            path: swap_in(target, self._router, dtype_of(target.linear, default))
            for path, target in targets.items()
        }
        try:
            self._adapters = (
                Adapters(self._layers, self._slots, self._router)
                if memory is None
                else BoundedAdapters(self._layers, self._slots, self._router, memory)
            )
        except BaseException:  # not enough memory, by what was asked for or by what there is
            self._swap_out()
            raise
        self._hooks = (
            model.register_forward_pre_hook(self._router.begin_forward, with_kwargs=True),
            model.register_forward_hook(self._router.end_forward, always_call=True),
        )
        self._wrapped = follow_generation(model, self._router, self._adapters.enter)
        logger.info("attached %d targets", len(self._layers))

    @property
    def model(self) -> nn.Module:
        """The attached model: the very object that was given to attach."""
        return self._check_attached()

    @property
    def targets(self) -> list[str]:
        """The paths of the layers that carry adapters."""
        return list(self._layers)

    @property
    def adapters(self) -> Mapping[str, int]:
        """The loaded adapters: name -> handle, in the order of loading."""
        return self._slots.handles

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that the route in force selects; empty for the base model."""
        route = self._router.chosen
        if route is None:
            return []
        return self._slots.names_of(route.routing.index.flatten().tolist())

    def load(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        revision: str | None = None,
        replace: bool = False,
    ) -> int:
        """Load a checkpoint of PEFT or diffusers under a name; returns its handle.

        With attach(memory=...) config and header are checked now, and the values are read when the
        adapter is brought in for the first time.

        Args:
            name: any new str other than `"__base__"`.
            folder: holds adapter_config.json and adapter_model.safetensors, or diffusers'
                pytorch_lora_weights.safetensors, of which this model's part is read. Or user/name,
                a repository of the Hugging Face hub, where huggingface_hub is installed.
            revision: of the repository: a branch, a tag or a commit.
            replace: the name may be one that is loaded, and means the new adapter from now on:
                set_adapter and set_route by name follow at the next forward pass of the model,
                `with` blocks that are open keep the old one until they end.

        Raises:
            CheckpointError: the folder is broken, unsafe, or more than plain LoRA.
            AdapterError: the name is taken, or a module of the checkpoint is no target here.
            PoolCapacityError: there is no room: for the adapter alone, or beside the one in use.
        """
        self._check_attached()
        self._slots.check_new(name, replace)
        root = local_folder(folder, revision)
        if (root / DIFFUSERS).is_file() and not (root / CONFIG).is_file():
            weights = read_diffusers(root, self.targets)
            return self._adapters.add(name, weights, str(folder), replace)
        checkpoint = read_checkpoint(root)
        handle = self._adapters.load(name, checkpoint.stored, replace)
        checkpoint.warn_unless_complete(self.targets)
        logger.debug("loaded %r from %s", name, folder)
        return handle

    def load_many(self, folders: Mapping[str, str | PathLike[str]]) -> dict[str, int]:
        """Load many PEFT checkpoints, all or none, with a bar on a terminal.

        Args:
            folders: name -> folder, as in `load`.

        Returns:
            name -> handle.

        Raises:
            LoraMuxError: as `load`; then nothing is loaded.
        """
        self._check_attached()
        if not isinstance(folders, Mapping):
            raise ArgumentTypeError(
                f"`folders` must map names to folders, got {type(folders).__name__}"
            )
        for name in folders:
            self._slots.check_new(name)
        handles: dict[str, int] = {}
        try:
            for name in shown(folders, "loading adapters"):
                handles[name] = self.load(name, folders[name])
        except BaseException:
            for name in handles:
                self.remove(name)
            raise
        logger.info("loaded %d adapters", len(handles))
        return handles

    def add_adapter(
        self,
        name: str,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        *,
        alpha: float | None = None,
        scaling: float | None = None,
    ) -> int:
        """Copy an adapter from tensors; returns its handle.

        Args:
            name: any new str other than `"__base__"`.
            weights: path of a target -> (A [r, in_features], B [out_features, r]). Targets that
                are left out keep the base's answer for this adapter.
            alpha: scaling = alpha / r, with each layer's own r. Give alpha or scaling, not both.
            scaling: the factor itself.

        Raises:
            AdapterError: a taken name, a path that is no target, shapes or values that do not fit.
            ArgumentTypeError: something of the wrong type.
        """
        self._check_attached()
        self._slots.check_new(name)
        if not isinstance(weights, Mapping):
            raise ArgumentTypeError(
                f"`weights` must map target paths to (A, B), got {type(weights).__name__}"
            )
        parts = {}
        for path, pair in weights.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ArgumentTypeError(
                    f"`weights[{path!r}]` must be a pair (A, B), got {type(pair).__name__}"
                )
            A, B = pair
            parts[path] = LoraWeights(A, B, scaling_from(alpha, scaling, A))
        return self._adapters.add(name, parts, "weights")

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank.

        What a captured CUDA graph reads can not grow: reserve before capturing. A bias counts as
        one more rank. With attach(memory=...) the adapters are all that will be loaded, on the
        device or not.
        """
        self._check_attached()
        self._adapters.reserve(adapters, rank)

    def prefetch(self, names: Sequence[str]) -> None:
        """Bring adapters to the device now, so that the next route by these names need not wait.

        Raises:
            UnknownAdapterError: a name that is not loaded.
            PoolCapacityError: they do not fit beside what is pinned or in use.
            CheckpointError: a file that is not finite, or not the one that was loaded any more.
        """
        self._check_attached()
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ArgumentTypeError(
                f"`names` must be a sequence of names, got {type(names).__name__}"
            )
        self._adapters.prefetch(names)

    def pin(self, name: str) -> None:
        """Bring an adapter to the device, and keep it there until `unpin`. Raises as `prefetch`."""
        self._check_attached()
        self._adapters.pin(name, True)

    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        self._check_attached()
        self._adapters.pin(name, False)

    def memory(self) -> Memory:
        """What the adapters take: capacity, used and free, of all targets and of each.

        Examples:
            >>> import torch, lora_mux
            >>> mux = lora_mux.attach(torch.nn.Sequential(torch.nn.Linear(16, 16)), memory="4KiB")
            >>> _ = mux.add_adapter("a", {"0": (torch.ones(2, 16), torch.ones(16, 2))}, alpha=2)
            >>> mux.prefetch(["a"])
            >>> mux.memory().adapters["a"]
            Holding(rank_rows=2, bytes=258, resident=True, pinned=False)
        """
        self._check_attached()
        return self._adapters.memory()

    def remove(self, name: str) -> None:
        """Free an adapter in all layers. Its handle raises from now on, and never means another."""
        self._check_attached()
        self._adapters.remove(name)

    def route(
        self, rows: Rows, weights: Tensor | None = None, *, expand: Expand = None
    ) -> AbstractContextManager[Routing]:
        """A `with` block in which each sample of a batch has its own adapters.

        For transformers' continuous batching, each request that is added in the block, in order.

        Args:
            rows: one entry per sample: None or `"__base__"` (the base model), a name, a sequence of
                names (summed), or a mapping name -> weight. Or an int tensor [samples, J] of
                handles, -1 = none.
            weights: floating [samples, J], only with an index tensor.
            expand: how the batch may repeat its samples outside generate(), which knows by
                itself: "interleave" (a, a, b, b) or "tile" (a, b, a, b: classifier-free guidance).

        Raises:
            UnknownAdapterError: a name or handle that is not loaded.
            RoutingError: rows or weights that do not fit; at the forward pass, also a batch that
                has another number of samples.
            RoutingBusyError: another thread is in a `with` block or a forward pass of this model.
            PoolCapacityError, CheckpointError, AdapterError: as `prefetch`, when the block begins.
        """
        return self._routed(lambda: self._route(rows, weights, expand))

    def route_tokens(
        self,
        rows: Rows,
        weights: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> AbstractContextManager[Routing]:
        """As `route`, with one entry per token of the flattened batch, in order.

        Args:
            lengths: for packed batches, how many tokens in a row each entry is for.
        """

        def make() -> Route:
            route = self._route(rows, weights, per_token=True)
            if lengths is None:
                return route
            times = torch.tensor(counts(lengths, route.routing.rows, "lengths"))
            return replace(route, routing=route.routing.repeat_interleave(times))

        return self._routed(make)

    def set_route(
        self, rows: Rows | None, weights: Tensor | None = None, *, expand: Expand = None
    ) -> None:
        """As `route`, but it stays until the next one; None goes back to the base model."""
        self._check_attached()
        if rows is None:
            self.set_adapter(None)
        else:
            self._set(lambda: self._route(rows, weights, expand))

    def set_adapter(
        self, adapter: Selection, weights: float | Sequence[float] | None = None
    ) -> None:
        """The adapters of every row of every batch from now on; None = the base model.

        Costs the same for any number of layers and adapters, once it is resident: one entry is
        written.

        Args:
            adapter: None, a name, a sequence of names, or a mapping name -> weight.
            weights: one number for each name, or one for all.
        """
        self._check_attached()
        chosen = selection(adapter, "adapter")
        if weights is not None:
            if isinstance(adapter, Mapping):
                raise RoutingError("`weights` must be None when `adapter` maps names to weights")
            chosen = dict(zip(chosen, numbers(weights, len(chosen), "weights"), strict=True))
        self._set(lambda: self._uniform_route(chosen) if chosen else None)

    def _uniform_route(self, chosen: dict[str, float]) -> Route:
        """The route for all rows; kept, for who switches often comes back to the same few."""
        if self._edition != self._slots.edition:  # a name may mean another adapter
            self._uniform.clear()
            self._edition = self._slots.edition
        key = tuple(chosen.items())
        if key not in self._uniform:
            if len(self._uniform) == KEPT_ROUTES:
                self._uniform.clear()
            routing = from_names([chosen], self._slots.lookup)
            self._uniform[key] = Route(routing, uniform=True, named=True)
        return self._uniform[key]

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A `with` block in which every row gets the base model; wins over every route."""
        self._check_attached()
        return self._router.disable()

    def detach(self) -> None:
        """Give the plain model back: the very same modules, without a trace of the adapters."""
        model = self._check_attached()
        self._router.set(None)  # refuses while another thread is inside a block
        for hook in self._hooks:
            hook.remove()
        for name in self._wrapped:
            delattr(model, name)
        self._swap_out()
        self._model = None

    def _swap_out(self) -> None:
        for layer in self._layers.values():
            swap_out(layer)

    def __repr__(self) -> str:
        state = "" if self._model is not None else ", detached"
        return f"Mux(targets={len(self._layers)}, adapters={list(self.adapters)}{state})"

    def _route(
        self, rows: Rows, weights: Tensor | None, expand: Expand = None, per_token: bool = False
    ) -> Route:
        self._check_attached()
        return make_route(rows, weights, self._slots, expand=expand, per_token=per_token)

    def _routed(self, make: Callable[[], Route]) -> AbstractContextManager[Routing]:
        """A block of a route that is made now, and again if a name means another one by then."""
        edition, first = self._slots.edition, make()

        def now() -> Route:
            return make() if first.named and self._slots.edition != edition else first

        return self._router.routed(lambda put: self._adapters.enter(now, put))

    def _set(self, make: Callable[[], Route | None]) -> None:
        self._router.refuse_other_thread()
        self._adapters.enter(make, self._router.set, leaving=True)

    def _check_attached(self) -> nn.Module:
        if self._model is None:
            raise DetachedError("this Mux was detached from its model; attach() makes a new one")
        return self._model
