"""Mux: all targets of an attached model share one set of adapters and one routing."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike

from torch import Tensor, nn

from .. import ops
from ..adapters import Adapters, BoundedAdapters, MemoryReport
from ..checkpoints import is_diffusers_folder, local_folder, read_diffusers_file, read_peft_folder
from ..core import Routing, Selection, Slots, check_names, weighted_adapters
from ..errors import ArgumentTypeError, DetachedError
from ..layers import Target, common_dtype, dtype_of, swap_in, swap_out, weights_from_pairs
from ..progress import progress_bar
from ..routes import Expand, Route, Router, Rows, UniformRoutes, make_route
from .generation import follow_generation

logger = logging.getLogger(__name__)


class Mux:
    """The adapters of an attached model, and which rows use which of them.

    `lora_mux.attach` and `lora_mux.attach_peft` make it.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        settings: ops.Settings,
        memory: int | None = None,
    ) -> None:
        self._model: nn.Module | None = model
        self._slots = Slots()
        self._uniform_routes = UniformRoutes(self._slots)
        self._router = Router(self._slots, settings)
        dtype = common_dtype(model)
        self._layers = {
            path: swap_in(target, self._router, dtype_of(target.linear, dtype))
            for path, target in targets.items()
        }
        try:
            self._adapters = (
                Adapters(self._layers, self._slots, self._router)
                if memory is None
                else BoundedAdapters(self._layers, self._slots, self._router, memory)
            )
        except BaseException:  # `memory` is less than is needed, or more than there is
            self._swap_out()
            raise
        self._hooks = (
            model.register_forward_pre_hook(self._router.begin_forward, with_kwargs=True),
            model.register_forward_hook(self._router.end_forward, always_call=True),
        )
        self._wrapped = follow_generation(model, self._router, self._adapters)
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
        """The names of the adapters that the route in force selects; empty for the base model."""
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
        """Load a checkpoint of PEFT or diffusers.

        With `attach(memory=...)` the config and the header are checked now. The values are read
        when the adapter is first used.

        Args:
            name: any new str other than `"__base__"`.
            folder: a folder with adapter_config.json and adapter_model.safetensors, or with
                diffusers' pytorch_lora_weights.safetensors, of which this model's part is read.
                Or user/name, a repository of the Hugging Face hub, if huggingface_hub is installed.
            revision: a branch, a tag or a commit of the repository.
            replace: let a name that is loaded already mean the new adapter from now on. Routes
                that set_adapter and set_route made from names follow at the next forward pass of
                the model; `with` blocks that are open keep the old adapter until they end.

        Returns:
            The adapter's handle, for index tensors.

        Raises:
            CheckpointError: the folder is missing, broken or unsafe, or holds more than plain LoRA.
            AdapterError: the name is taken, or a module of the checkpoint is not a target here.
            PoolCapacityError: there is no room for the adapter, alone or beside those in use.
        """
        self._check_attached()
        self._slots.check_new(name, replace)
        root = local_folder(folder, revision)
        if is_diffusers_folder(root):
            weights = read_diffusers_file(root, self.targets)
            return self._adapters.add(name, weights, str(folder), replace)
        checkpoint = read_peft_folder(root)
        handle = self._adapters.load(name, checkpoint.stored, replace)
        checkpoint.warn_unless_complete(self.targets)
        logger.debug("loaded %r from %s", name, folder)
        return handle

    def load_many(self, folders: Mapping[str, str | PathLike[str]]) -> dict[str, int]:
        """Load many checkpoints, all or none of them, with a progress bar on a terminal.

        Args:
            folders: name -> folder, as in `load`.

        Returns:
            Name -> handle.

        Raises:
            LoraMuxError: a folder cannot be loaded; see `load`. Then none is.
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
            for name in progress_bar(folders, "loading adapters"):
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
        """Copy an adapter from tensors.

        Args:
            name: any new str other than `"__base__"`.
            weights: path of a target -> (A [r, in_features], B [out_features, r]), of any floating
                dtype. The adapter changes nothing in targets that are left out.
            alpha: scaling = alpha / r, with the rank r of each layer. Give alpha or scaling, not
                both.
            scaling: the factor itself.

        Returns:
            The adapter's handle, for index tensors.

        Raises:
            AdapterError: the name is taken, a path is not a target, or shapes or values do not fit.
            PoolCapacityError: there is no room for the adapter.
        """
        self._check_attached()
        self._slots.check_new(name)
        parts = weights_from_pairs(weights, alpha, scaling, "weights")
        return self._adapters.add(name, parts, "weights")

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer, so that loading adapters later moves no buffer.

        A pool that a captured CUDA graph reads cannot grow, so reserve before you capture.

        Args:
            adapters: how many adapters there will be. With `attach(memory=...)`, how many will be
                loaded, on the device or not.
            rank: the largest rank among them. A bias counts as one more rank.

        Raises:
            AdapterError: an argument is less than 1.
            PoolCapacityError: a CUDA graph reads the pools already.
        """
        self._check_attached()
        self._adapters.reserve(adapters, rank)

    def prefetch(self, names: Sequence[str]) -> None:
        """Bring adapters to the device now, so that the next route need not wait for them.

        Without `attach(memory=...)` every adapter is on the device already.

        Args:
            names: of loaded adapters.

        Raises:
            UnknownAdapterError: a name is not loaded.
            PoolCapacityError: the adapters do not fit beside those that are pinned or in use.
            CheckpointError: a file holds NaN or infinity, or is not the one that was loaded.
            AdapterError: values do not fit the pool's dtype.
        """
        self._check_attached()
        self._adapters.prefetch(check_names(names, "names"))

    def pin(self, name: str) -> None:
        """Bring an adapter to the device, and keep it there until `unpin`; raises as `prefetch`."""
        self._check_attached()
        self._adapters.pin(name)

    def unpin(self, name: str) -> None:
        """Let a pinned adapter make room for others again."""
        self._check_attached()
        self._adapters.unpin(name)

    def memory(self) -> MemoryReport:
        """How much memory the adapters take, in bytes and in rank rows.

        Examples:
            >>> import torch, lora_mux
            >>> mux = lora_mux.attach(torch.nn.Sequential(torch.nn.Linear(16, 16)), memory="4KiB")
            >>> _ = mux.add_adapter("a", {"0": (torch.ones(2, 16), torch.ones(16, 2))}, alpha=2)
            >>> mux.prefetch(["a"])
            >>> mux.memory().adapters["a"]
            AdapterMemory(rank_rows=2, bytes=258, resident=True, pinned=False)
        """
        self._check_attached()
        return self._adapters.memory()

    def remove(self, name: str) -> None:
        """Free an adapter in all layers. A forward pass in progress can finish with it.

        Its handle raises an error from now on, and never means another adapter.

        Raises:
            UnknownAdapterError: the name is not loaded.
        """
        self._check_attached()
        self._adapters.remove(name)

    def route(
        self, rows: Rows, weights: Tensor | None = None, *, expand: Expand = None
    ) -> AbstractContextManager[Routing]:
        """Give each sample of a batch its own adapters, inside a `with` block.

        With transformers' continuous batching, the requests that are added inside the block take
        the entries in order.

        Args:
            rows: one entry per sample: None or `"__base__"` (the base model), a name, a sequence of
                names (their sum), or a mapping name -> weight. Or an int tensor [samples, J] of
                handles, where -1 selects none.
            weights: floating [samples, J], only with an index tensor.
            expand: how the batch may repeat its samples outside of generate(), which needs no
                hint: "interleave" (a, a, b, b), or "tile" (a, b, a, b: classifier-free guidance).

        Returns:
            A context manager that yields the Routing.

        Raises:
            UnknownAdapterError: a name or a handle is not loaded.
            RoutingError: rows or weights do not fit. A batch with another number of samples raises
                it at the forward pass.
            RoutingBusyError: when the block begins: another thread is in a `with` block or a
                forward pass of this model.
            PoolCapacityError: when the block begins: the adapters do not fit beside those that are
                pinned or in use. The other errors of `prefetch` come then, too.
        """
        return self._block(lambda: make_route(rows, weights, self._slots, expand=expand))

    def route_tokens(
        self,
        rows: Rows,
        weights: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> AbstractContextManager[Routing]:
        """Give each token of a batch its own adapters, inside a `with` block.

        Args:
            rows: as in `route`, with one entry per token of the flattened batch, in order.
            weights: floating [tokens, J], only with an index tensor.
            lengths: for packed batches: how many consecutive tokens each entry stands for.

        Returns:
            As `route`, which also lists the errors.
        """
        return self._block(
            lambda: make_route(rows, weights, self._slots, per_token=True, lengths=lengths)
        )

    def set_route(
        self, rows: Rows | None, weights: Tensor | None = None, *, expand: Expand = None
    ) -> None:
        """Give each sample of every batch its own adapters, until the next route is set.

        It takes the arguments of `route`, and raises its errors. `rows=None` goes back to the base
        model.
        """
        self._check_attached()
        if rows is None:
            self.set_adapter(None)
        else:
            self._set(lambda: make_route(rows, weights, self._slots, expand=expand))

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
        """Give every row the base model inside a `with` block, whatever the route.

        Raises:
            RoutingBusyError: another thread is in a `with` block or a forward pass of this model.
        """
        self._check_attached()
        return self._router.disable()

    def detach(self) -> None:
        """Give the plain model back: the same modules, without a trace of the adapters or the Mux.

        Raises:
            RoutingBusyError: another thread is in a `with` block or a forward pass of this model.
        """
        model = self._check_attached()
        self._router.set(None)  # which raises while another thread is inside a block
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

    def _block(self, make: Callable[[], Route]) -> AbstractContextManager[Routing]:
        """A block under a route that is made now, and again if a name changes before it begins."""
        self._check_attached()
        name_changes, first = self._slots.name_changes, make()

        def current() -> Route:
            changed = self._slots.name_changes != name_changes
            return make() if first.named and changed else first

        return self._under(current)

    @contextmanager
    def _under(self, make: Callable[[], Route]) -> Iterator[Routing]:
        with self._router.block():
            with self._adapters.resident(make) as route:
                self._router.put(route)
            yield route.routing

    def _set(self, make: Callable[[], Route | None]) -> None:
        self._router.refuse_other_thread()
        with self._adapters.resident(make, leaving=True) as route:
            self._router.set(route)

    def _check_attached(self) -> nn.Module:
        if self._model is None:
            raise DetachedError("this Mux was detached from its model; attach() makes a new one")
        return self._model
