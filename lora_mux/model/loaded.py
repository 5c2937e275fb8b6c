"""The adapters of an attached model, as users load and keep them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from ..adapters import Adapters, MemoryReport, Prepared
from ..checkpoints import (
    BaseModel,
    StoredAdapter,
    is_diffusers_folder,
    local_folder,
    read_diffusers_file,
    read_peft_folder,
)
from ..core import LoraWeights, Pool, Slots, check_names
from ..errors import ArgumentTypeError, CheckpointError, PoolCapacityError, TargetError, warn
from ..layers import (
    MuxLinear,
    as_targets,
    common_dtype,
    cut_and_check_shapes,
    device_of,
    dtype_of,
    has_its_sizes,
    swap_in,
    swap_out,
    weights_from_pairs,
)
from ..progress import progress_bar
from ..routes import Place, Router

logger = logging.getLogger(__name__)


class LoadedAdapters:
    """Everything about a Mux that does not ask which rows use an adapter."""

    _model: nn.Module | None
    _slots: Slots
    _layers: dict[str, MuxLinear]
    _adapters: Adapters
    _router: Router
    _linears: list[nn.Module]  # all that a detach changes back
    _joining: dict[str, tuple[nn.Module, Place]]  # layers that join when an adapter touches them
    _heads: frozenset[str]  # paths of those that attach's targets did not mean
    _joined: dict[str, tuple[nn.Module, nn.Module]]  # those that have: where they are, and they

    @property
    def targets(self) -> list[str]:
        """The paths of the layers that carry adapters."""
        return list(self._layers)

    @property
    def adapters(self) -> Mapping[str, int]:
        """The loaded adapters: name -> handle, in the order of loading."""
        return self._slots.handles

    def load(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        component: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> int:
        """Load a checkpoint of PEFT or diffusers.

        With `attach(memory=...)` the config and the header are checked now. The values are read
        when the adapter is first used, but those of DoRA at once, with the base's weights: a row
        with a weight w gets that share of what such an adapter changes, see docs/from_peft.md.

        Args:
            name: any new str other than `"__base__"`.
            folder: a folder with adapter_config.json and adapter_model.safetensors, or with
                diffusers' pytorch_lora_weights.safetensors, of which this model's part is read.
                Or user/name, a repository of the Hugging Face hub, if huggingface_hub is installed.
            revision: a branch, a tag or a commit of the repository.
            subfolder: where the checkpoint is in the folder or in the repository.
            component: of a file of diffusers for several models, the part for this one
                ("text_encoder_2"), if more than one would fit.
            key_mapping: for modules that had other names when the adapter was saved: patterns of
                keys without the prefix "base_model.model." -> replacements, of which the first
                that matches counts. Names that transformers has changed need none.
            replace: let a name that is loaded already mean the new adapter from now on. Routes
                that set_adapter and set_route made from names follow at the next forward pass of
                the model; `with` blocks that are open keep the old adapter until they end.

        Returns:
            The adapter's handle, for index tensors.

        Raises:
            TargetError: a layer cannot carry adapters, or was replaced after `attach`.
            CheckpointError: the folder is missing, broken or unsafe, or holds more than LoRA and
                saved modules of the base's shapes.
            AdapterError: the name is taken, a module of the checkpoint is not a target here, or
                DoRA needs a weight that cannot be read.
            ArgumentTypeError: key_mapping is no mapping of patterns.
            PoolCapacityError: there is no room for the adapter, alone or beside those in use.
            RoutingError: it replaces an adapter in the sticky rows, beside one that saved other
                modules at the same place.
        """
        model = self._check_attached()
        self._slots.check_new(name, replace)
        base = BaseModel([*self._layers, *self._joining], model, key_mapping)

        def prepared() -> Prepared:
            return self._prepared(local_folder(folder, revision, subfolder), base, component)

        return self._publish({name: prepared}, replace)[name]

    def _prepared(self, folder: Path, base: BaseModel, component: str | None = None) -> Prepared:
        if is_diffusers_folder(folder):
            stored = read_diffusers_file(folder, base, component)
        elif component is None:
            stored = read_peft_folder(folder, base)
        else:
            raise CheckpointError(
                f"`component` must be None for a PEFT checkpoint, got {component!r:.100}"
            )
        self._include(stored.shapes(), stored.source)
        if stored.saved is not None:
            self._include(stored.saved.shapes(), stored.source)
        for remark in stored.outline.remarks:
            warn(f"{stored.source} {remark}")
        return self._prepare(stored)

    def _prepare(self, stored: StoredAdapter) -> Prepared:
        prepared = self._adapters.prepare(stored)
        if stored.dropout:
            self._adapters.training.dropouts[prepared.handle] = stored.dropout
        return prepared

    def _publish(
        self, adapters: Mapping[str, Callable[[], Prepared]], replace: bool = False
    ) -> dict[str, int]:
        """Prepare adapters, then give them their names, all or none; returns name -> handle."""
        prepared: dict[str, Prepared] = {}
        try:
            for name in progress_bar(adapters, "loading adapters"):
                prepared[name] = adapters[name]()
            handles = self._adapters.publish(prepared, replace)
        except BaseException:
            self._adapters.abandon(prepared.values())
            raise
        logger.debug("loaded %s", ", ".join(adapters))
        return handles

    def load_many(self, folders: Mapping[str, str | PathLike[str]]) -> dict[str, int]:
        """Load many checkpoints, all or none of them, with a progress bar on a terminal.

        Nobody sees one of them before all are there.

        Args:
            folders: name -> folder, as in `load`.

        Returns:
            Name -> handle.

        Raises:
            LoraMuxError: a folder cannot be loaded; see `load`. Then none is.
        """
        model = self._check_attached()
        if not isinstance(folders, Mapping):
            raise ArgumentTypeError(
                f"`folders` must map names to folders, got {type(folders).__name__}"
            )
        for name in folders:
            self._slots.check_new(name)
        base = BaseModel([*self._layers, *self._joining], model)
        prepare = {
            name: lambda folder=folder: self._prepared(local_folder(folder), base)
            for name, folder in folders.items()
        }
        return self._publish(prepare)

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
                dtype; `MuxLinear.add_adapter` has the shapes for embeddings and convolutions. The
                adapter changes nothing in targets that are left out.
            alpha: scaling = alpha / r, with the rank r of each layer. Give alpha or scaling, not
                both.
            scaling: the factor itself.

        Warns:
            UserWarning: factors require grad, and will get none; `train` has those that do.

        Returns:
            The adapter's handle, for index tensors.

        Raises:
            AdapterError: the name is taken, a path is not a target, or shapes or values do not fit.
            PoolCapacityError: there is no room for the adapter.
        """
        self._check_attached()
        self._slots.check_new(name)
        parts = weights_from_pairs(weights, alpha, scaling, "weights")
        if any(getattr(f, "requires_grad", False) for pair in weights.values() for f in pair):
            warn(
                f"`weights` of {name!r} are copied, so that theirs get no gradients; to train the "
                f"adapter, call train({name!r}), and give its parameters() to an optimizer"
            )
        return self._add({name: parts}, "weights")[name]

    def _add(
        self,
        adapters: Mapping[str, Mapping[str, LoraWeights]],
        source: str,
        saved: Mapping[str, StoredAdapter] = MappingProxyType({}),
    ) -> dict[str, int]:
        """Load adapters from their factors, and the modules that they saved, all or none."""
        for parts in adapters.values():
            self._include(parts, source)
        prepare = {
            name: partial(self._adapters.prepare_weights, parts, source, saved.get(name))
            for name, parts in adapters.items()
        }
        return self._publish(prepare)

    def _include(self, weights: Mapping[str, LoraWeights], source: str) -> None:
        """Let layers join that this adapter touches, if it fits."""
        joining = [path for path in self._joining if path in weights]
        if weights.keys() - self._layers.keys() - {*joining}:
            return  # it will be refused
        for path in joining:
            with self._router.changes:
                layer, place = self._joining.get(path, (None, None))
                if layer is None or place is None:  # another thread was first
                    continue
                if self._slots.captured:
                    raise PoolCapacityError(
                        f"{path!r} must carry adapters, which a captured CUDA graph of the model "
                        "does not know; load such an adapter before capturing, or attach with "
                        "targets that name the layer"
                    )
                model = self._check_attached()
                if model.get_submodule(path) is not layer:
                    raise _replaced(path)
                target = as_targets(model, {path: layer})[path]
                dtype = dtype_of(layer, common_dtype(model))
                empty = Pool(*target.sizes, dtype, device_of(layer))
                cut_and_check_shapes(empty, target.kind, weights[path], f"{source}[{path!r}]")
                swap_out(layer)  # what an interrupt has left of another time
                self._linears.append(layer)
                self._adapters.include(path, swap_in(target, place, self._router, dtype))
                self._joined[path] = model.get_submodule(path.rpartition(".")[0]), layer
                del self._joining[path]

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer, so that loading adapters later moves no buffer.

        A pool that a captured CUDA graph reads cannot grow, so reserve before you capture.

        Args:
            adapters: how many adapters there will be. With `attach(memory=...)`, how many will be
                loaded, on the device or not. One that saved modules as a whole counts as two.
            rank: the largest rank among them. A bias counts as one more rank, and so does DoRA. A
                saved linear layer has the rank of its shorter side.

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

    def _check_in_place(self) -> None:
        """Refuse a pass of a model whose embeddings were replaced after adapters came to them."""
        for path, (parent, layer) in self._joined.items():
            there = parent._modules.get(path.rpartition(".")[2])
            if there is not layer or not has_its_sizes(layer):
                raise _replaced(path)

    def _check_attached(self) -> nn.Module:
        self._router.check_attached()
        assert self._model is not None
        return self._model


def _replaced(path: str) -> TargetError:
    return TargetError(
        f"{path!r} must be the layer that was attached, got another one or another size, as after "
        "resize_token_embeddings(); detach(), change the model, then attach it and load again"
    )
