"""attach(model): every target of a model shares one set of adapters and one routing."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike

import torch
from torch import Tensor, nn

from . import ops
from .checkpoint import CONFIG, DIFFUSERS, read_checkpoint
from .diffusers_file import read_diffusers
from .errors import AdapterError, ArgumentTypeError, DetachedError, RoutingError, TargetError
from .generation import follow_generation
from .hub import local_folder
from .intake import check_reservation, check_room, checked, scaling_from
from .linear import MuxLinear, follow_materialised, swap_in, swap_out
from .live_peft import read_live, unload
from .pool import LoraWeights
from .route import Expand, Route, Rows, make_route
from .router import Router
from .routing import Routing, Selection, counts, from_names, numbers, selection
from .slots import Slots, slot_of
from .targets import Target, dtype_of, find_targets

KEPT_ROUTES = 256

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
) -> "Mux":
    """Let the rows of a model's batches choose their own adapters; in place.

    The targets become MuxLinears by a change of class: parameters, module names, state_dict keys
    and hooks stay what they were, and detach() gives the plain model back. Attach last, after
    quantising or moving the model.

    Args:
        model: any nn.Module.
        targets: "all-linear" (every linear layer except the output head, as in PEFT), a list of
            path suffixes (["q_proj", "v_proj"]), or a regular expression for whole paths.
        backend: "auto" (Triton on CUDA and ROCm, batched products on the CPU, the reference
            elsewhere), "triton" or "reference".
        batch_invariant: with Triton, what the adapters add to a row has the same bits whatever
            batch the row comes in; costs speed for many rows.
        fused: base and adapters in one launch, as in `MuxLinear`.

    Raises:
        TargetError: nothing matches, a match can not carry adapters, or the model has a Mux.
        BackendError: a backend that does not exist or cannot run.

    Example:
        >>> import torch, lora_mux
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> mux = lora_mux.attach(model)
        >>> handle = mux.add_adapter("sql", {"1": (torch.ones(2, 8), torch.ones(4, 2))}, alpha=2)
        >>> x = torch.ones(2, 8)
        >>> base = model(x)
        >>> with mux.route(["sql", None]):
        ...     mixed = model(x)
        >>> torch.equal(mixed[0], base[0]), torch.equal(mixed[1], base[1])
        (False, True)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    settings = ops.Settings(backend, batch_invariant, fused)
    if any(isinstance(module, MuxLinear) for module in model.modules()):
        raise TargetError(
            "`model` must be plain, got one that is attached already; detach it first"
        )
    return Mux(model, find_targets(model, targets), settings)


def attach_peft(
    peft_model: nn.Module,
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
) -> "Mux":
    """Take over what PEFT has in memory: a PeftModel, or adapters put into a plain model.

    The latter is what transformers' `model.load_adapter` makes of a model, and diffusers'
    `pipe.load_lora_weights` of `pipe.transformer` or `pipe.unet`, from any file that they read.
    PEFT's layers are taken out of the base model, which merges nothing, the base model is attached
    where its adapters touch it, and those that were active are in force. Use `mux.model` from now
    on, and no longer the PeftModel.

    Args:
        peft_model: a model whose adapters are LoRA on linear layers.
        backend: as in `attach`.
        batch_invariant: as in `attach`.
        fused: as in `attach`.

    Raises:
        ArgumentTypeError: a model without adapters of PEFT's.
        CheckpointError: an adapter that is more than plain LoRA, or that is merged.
        TargetError: a layer that can not carry adapters.
    """
    settings = ops.Settings(backend, batch_invariant, fused)
    live = read_live(peft_model)
    mux = Mux(unload(peft_model), live.targets, settings)
    for name, weights in live.adapters.items():
        mux._add(name, weights, "peft_model")
    mux.set_adapter(live.active)
    return mux


class Mux:
    """The adapters of an attached model and their routing; made by `lora_mux.attach`."""

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], settings: ops.Settings
    ) -> None:
        self._model: nn.Module | None = model
        self._slots = Slots()
        self._uniform: dict[tuple[tuple[str, float], ...], Route] = {}  # of set_adapter
        self._router = Router(self._slots, settings)
        plain = (dtype_of(module, torch.int8) for module in model.modules())
        default = next((d for d in plain if d.is_floating_point), torch.get_default_dtype())
        self._layers = {
            path: swap_in(target, self._router, dtype_of(target.linear, default))
            for path, target in targets.items()
        }
        self._hooks = (
            model.register_forward_pre_hook(self._router.begin_forward, with_kwargs=True),
            model.register_forward_hook(self._router.end_forward, always_call=True),
        )
        self._wrapped = follow_generation(model, self._router)
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

    def load(self, name: str, folder: str | PathLike[str], *, revision: str | None = None) -> int:
        """Load a checkpoint of PEFT or diffusers under a name; returns its handle.

        Args:
            name: any new str other than "__base__".
            folder: holds adapter_config.json and adapter_model.safetensors, or diffusers'
                pytorch_lora_weights.safetensors, of which this model's part is read. Or user/name,
                a repository of the Hugging Face hub, where huggingface_hub is installed.
            revision: of the repository: a branch, a tag or a commit.

        Raises:
            CheckpointError: the folder is broken, unsafe, or more than plain LoRA.
            AdapterError: the name is taken, or a module of the checkpoint is no target here.
        """
        self._check_attached()
        self._slots.check_new(name)
        root = local_folder(folder, revision)
        if (root / DIFFUSERS).is_file() and not (root / CONFIG).is_file():
            return self._add(name, read_diffusers(root, self.targets), str(folder))
        checkpoint = read_checkpoint(root)
        handle = self._add(name, checkpoint.weights, str(folder))
        checkpoint.warn_unless_complete(self.targets)
        return handle

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
            name: any new str other than "__base__".
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
        return self._add(name, parts, "weights")

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank.

        What a captured CUDA graph reads can not grow: reserve before capturing. A bias counts as
        one more rank.
        """
        self._check_attached()
        check_reservation(self._slots, adapters, rank)
        self._slots.capacity = max(self._slots.capacity, adapters)
        for layer in self._layers.values():
            follow_materialised(layer)
            layer.mux_pool.reserve(adapters * rank, self._slots.capacity, rank)

    def remove(self, name: str) -> None:
        """Free an adapter in all layers. Its handle raises from now on, and never means another."""
        self._check_attached()
        slot = self._slots.remove(name)
        self._uniform.clear()  # the name may come back for another adapter
        for layer in self._layers.values():
            layer.mux_pool.erase(slot)

    def route(
        self, rows: Rows, weights: Tensor | None = None, *, expand: Expand = None
    ) -> AbstractContextManager[Routing]:
        """A `with` block in which each sample of a batch has its own adapters.

        For transformers' continuous batching, each request that is added in the block, in order.

        Args:
            rows: one entry per sample: None or "__base__" (the base model), a name, a sequence of
                names (summed), or a mapping name -> weight. Or an int tensor [samples, J] of
                handles, -1 = none.
            weights: floating [samples, J], only with an index tensor.
            expand: how the batch may repeat its samples outside generate(), which knows by
                itself: "interleave" (a, a, b, b) or "tile" (a, b, a, b: classifier-free guidance).

        Raises:
            UnknownAdapterError: a name or handle that is not loaded.
            RoutingError: rows or weights that do not fit; at the forward pass, also a batch that
                has another number of samples.
            RoutingBusyError: another thread is inside a `with` block of this model.
        """
        return self._router.routed(self._route(rows, weights, expand))

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
        route = self._route(rows, weights, per_token=True)
        if lengths is not None:
            times = torch.tensor(counts(lengths, route.routing.rows, "lengths"))
            route = Route(route.routing.repeat_interleave(times), per_token=True)
        return self._router.routed(route)

    def set_route(
        self, rows: Rows | None, weights: Tensor | None = None, *, expand: Expand = None
    ) -> None:
        """As `route`, but it stays until the next one; None goes back to the base model."""
        self._check_attached()
        if rows is None:
            self.set_adapter(None)
        else:
            self._router.set(self._route(rows, weights, expand))

    def set_adapter(
        self, adapter: Selection, weights: float | Sequence[float] | None = None
    ) -> None:
        """The adapters of every row of every batch from now on; None = the base model.

        Costs the same for any number of layers and adapters: one entry is written.

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
        self._router.set(self._uniform_route(chosen) if chosen else None)

    def _uniform_route(self, chosen: dict[str, float]) -> Route:
        """The route for all rows; kept, for who switches often comes back to the same few."""
        key = tuple(chosen.items())
        if key not in self._uniform:
            if len(self._uniform) == KEPT_ROUTES:
                self._uniform.clear()
            routing = from_names([chosen], self._slots.lookup)
            self._uniform[key] = Route(routing, uniform=True)
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
        for layer in self._layers.values():
            swap_out(layer)
        self._model = None

    def __repr__(self) -> str:
        state = "" if self._model is not None else ", detached"
        return f"Mux(targets={len(self._layers)}, adapters={list(self.adapters)}{state})"

    def _route(
        self, rows: Rows, weights: Tensor | None, expand: Expand = None, per_token: bool = False
    ) -> Route:
        self._check_attached()
        return make_route(rows, weights, self._slots, expand=expand, per_token=per_token)

    def _add(self, name: str, weights: Mapping[str, LoraWeights], source: str) -> int:
        """Check everything, then write everything; a failure on the way leaves nothing behind."""
        if not weights:
            raise AdapterError(f"`{source}` must hold at least one target, got none")
        unknown = [path for path in weights if path not in self._layers]
        if unknown:
            raise AdapterError(
                f"`{source}`: {unknown[0]!r} must be a target of the attached model, which it is "
                f"not ({len(unknown)} of {len(weights)} are not); attach with targets that cover it"
            )
        for layer in self._layers.values():
            follow_materialised(layer)
        fitting = {
            path: checked(layer.mux_pool, layer.mux_part, weights[path], f"{source}[{path!r}]")
            for path, layer in self._layers.items()
            if path in weights
        }
        for path, part in fitting.items():
            check_room(self._slots, self._layers[path].mux_pool, part, f"{source}[{path!r}]")
        handle = self._slots.add(name)
        slot = slot_of(handle)
        try:
            for path, layer in self._layers.items():
                layer.mux_pool.write(slot, fitting.get(path), self._slots.capacity)
        except BaseException:
            self.remove(name)
            raise
        return handle

    def _check_attached(self) -> nn.Module:
        if self._model is None:
            raise DetachedError("this Mux was detached from its model; attach() makes a new one")
        return self._model
