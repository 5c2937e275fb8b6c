"""PEFT's adapters in memory, read as strictly as a checkpoint.

They are in a PeftModel, or in a model that transformers' `add_adapter` or diffusers'
`load_lora_weights` has put them into. Everything is read from PEFT's layers: each of them has its
own active adapters, its own switch and its own scales.
"""

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import parse_config
from ..core import LoraWeights, check_number, on_diagonal
from ..errors import ArgumentTypeError, CheckpointError, TargetError, warn
from ..layers import (
    CONVOLUTIONS,
    Target,
    check_target,
    common_dtype,
    device_of,
    dtype_of,
    with_gain,
)
from .beside_factors import (
    check_called,
    check_values,
    check_wrappers,
    held_by,
    own_module,
    plain_module,
    saved_by,
    source_of,
)
from .stored_adapter import StoredAdapter

# The layers show which modules the config means, so that its patterns need not be understood.
TARGETING = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "modules_to_save",
)
# What holds a factor: one that computes anything else is of another method.
FACTORS = (nn.Linear, *CONVOLUTIONS, nn.Parameter)
SAME = 1e-6  # relative; a scale of 0.3 at layers with other ranks differs in its last bits


@dataclass(frozen=True)
class PeftModelAdapters:
    """The adapters of a model with PEFT's layers in it."""

    base: nn.Module
    layers: dict[str, Any]  # PEFT's layers and wrappers, by path in the base model
    adapters: dict[str, dict[str, LoraWeights]]  # name -> path in the base model -> factors
    saved: dict[str, StoredAdapter]  # name -> the modules that it saved, where they differ
    active: dict[str, float]  # name -> weight, of those that are in force
    targets: dict[str, Target]  # the base layers that they touch, by path


def read_peft_model(peft_model: Any) -> PeftModelAdapters:
    """Read all adapters of a PeftModel, or of a model with PEFT's layers; changes nothing.

    Raises:
        ArgumentTypeError: the model has no adapters of PEFT's.
        CheckpointError: an adapter is more than LoRA or DoRA, or is merged, or has
            values that are not finite, or none; or it is in force in a part of its layers only, or
            by DoRA on what other adapters have changed.
        AdapterError: DoRA on a layer whose weight cannot be read here.
        TargetError: a layer cannot carry adapters here.
    """
    base = _base(peft_model)
    configs = peft_model.peft_config
    for name, config in configs.items():
        _check_plain(name, config, len(configs) > 1)
    tuner = importlib.import_module("peft.tuners.tuners_utils")
    layers: dict[str, Any] = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, tuner.BaseTunerLayer) and not hasattr(module, "token_indices")
    }
    others = importlib.import_module("peft.utils.other")
    wrappers: dict[str, Any] = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, others.AuxiliaryTrainingWrapper)
    }
    check_wrappers(wrappers, layers)
    tokens = [w.token_adapter for w in wrappers.values() if hasattr(w, "token_adapter")]
    if any(layer.merged for layer in (*layers.values(), *tokens)):
        raise CheckpointError(
            "`peft_model` must have its original base weights, got merged adapters; "
            "call unmerge_adapter() first"
        )
    held = {path: _held(path, layer) for path, layer in layers.items()}
    for path, names in held.items():
        _refuse_running_sum(path, layers[path], names)
    targets = {
        path: _target(path, layers[path].base_layer) for path, names in held.items() if names
    }
    dtype = common_dtype(base)
    adapters = {
        name: {p: _part(p, layers[p], name, dtype) for p, names in held.items() if name in names}
        for name in configs
    }
    if not adapters or not all(adapters.values()):
        raise CheckpointError(
            "`peft_model` must hold at least one adapted layer for each adapter, got "
            f"{len(adapters)} adapters in {len(layers)} layers; delete_adapter() those without"
        )
    saved, active = {}, {}
    for name, parts in adapters.items():
        wrapping = {path: w for path, w in wrappers.items() if name in held_by(w)}
        modules = saved_by(name, wrapping)
        if modules is not None:
            saved[name] = modules
            own = {path: plain_module(path, wrapping) for path in modules.outline.keys}
            targets |= {path: _target(path, module) for path, module in own.items()}
            check_called(base, own)
        weight = _weight(name, {path: layers[path] for path in parts}, wrapping, parts)
        if weight is not None:
            active[name] = weight
    return PeftModelAdapters(base, layers | wrappers, adapters, saved, active, targets)


@contextmanager
def without_peft(live: PeftModelAdapters) -> Iterator[None]:
    """A block in which PEFT's layers are out of the base model; if it fails, they come back."""
    for path, layer in live.layers.items():
        live.base.set_submodule(path, own_module(layer))
    try:
        yield
    except BaseException:
        for path, layer in live.layers.items():
            live.base.set_submodule(path, layer)
        raise


def retire_peft(peft_model: Any, base: Any) -> None:
    """After the take-over: nothing of PEFT's acts on the model without a word any more."""
    if hasattr(base, "peft_config"):
        del base.peft_config
    if hasattr(base, "_hf_peft_config_loaded"):  # transformers and diffusers set it
        base._hf_peft_config_loaded = False
    own = vars(nn.Module()).keys()
    outer = peft_model
    while outer is not base:  # the PeftModel, and the LoraModel in it
        inner = _inside(outer)
        for name in vars(outer).keys() - own:
            del vars(outer)[name]
        outer.__class__ = TakenOver
        outer = inner


class TakenOver(nn.Module):
    """A PeftModel whose adapters were taken over: it calls the model, and refuses the rest."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attached model returns."""
        return _inside(self)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The model's own attributes, generate() among them.

        Raises:
            TargetError: it is one of PEFT's, which would change nothing.
        """
        peft = importlib.import_module("peft")
        if name.startswith("__"):  # what Python's protocols look for is not passed on
            return super().__getattr__(name)
        if name != "generate" and any(hasattr(k, name) for k in (peft.PeftModel, peft.LoraModel)):
            raise TargetError(
                f"`{name}` must be asked of the Mux, got a PeftModel whose adapters attach_peft "
                "has taken over; use `mux.model` and the methods of the Mux"
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(_inside(self), name)


def _inside(outer: nn.Module) -> Any:
    """The LoraModel in a PeftModel, or the base model in a LoraModel."""
    return outer._modules.get("base_model", outer._modules.get("model"))


def _base(peft_model: Any) -> Any:
    if isinstance(peft_model, TakenOver):
        raise TargetError(
            "`peft_model` must have PEFT's adapters in it, got one whose adapters attach_peft has "
            "taken over already; use `mux.model` and the Mux"
        )
    if not isinstance(peft_model, nn.Module) or not hasattr(peft_model, "peft_config"):
        raise ArgumentTypeError(
            "`peft_model` must be a peft.PeftModel, or a model with PEFT's adapters in it, got "
            f"{type(peft_model).__name__} without any"
        )
    if type(peft_model).__name__ == "PeftMixedModel":
        raise CheckpointError(
            "`peft_model` must be a PeftModel, got a PeftMixedModel, which may mix LoRA with other "
            "methods; save its LoRA adapters, and load them into a PeftModel or by mux.load()"
        )
    peft = importlib.import_module("peft")
    base: Any = peft_model
    while isinstance(base, peft.PeftModel | peft.LoraModel):
        base = _inside(base)
    return base


def _check_plain(name: str, config: Any, beside_others: bool) -> None:
    """Refuse an adapter that is more than LoRA, whatever the others are."""
    fields = {k: v for k, v in config.to_dict().items() if k not in TARGETING}
    try:
        parse_config(fields, source_of(name))
    except CheckpointError as error:
        if not beside_others:
            raise
        way_out = f"delete_adapter({name!r}) first, to take over the others"
        raise CheckpointError(f"{error}; {way_out}") from None


def _held(path: str, layer: Any) -> set[str]:
    """The names of the adapters that one of PEFT's layers holds.

    Raises:
        CheckpointError: it is no layer that computes LoRA on a linear layer.
    """
    names: set[str] = layer._get_available_adapters()
    if not type(layer).__module__.startswith("peft."):
        raise CheckpointError(
            f"`peft_model`: layer {path!r} must be one of PEFT's own classes, got "
            f"{type(layer).__name__}, which may compute anything"
        )
    pairs = [_modules(layer, name) for name in names]
    if any(
        type(factor) not in FACTORS and not _is_in_blocks(factor)
        for pair in pairs
        for factor in pair
    ):
        raise CheckpointError(
            f"`peft_model`: layer {path!r} must hold LoRA on a linear layer, an embedding or a "
            f"convolution, got PEFT's {type(layer).__name__} over "
            f"{type(layer.base_layer).__name__}; leave such layers out of the adapter's "
            "target_modules"
        )
    return names


def _modules(layer: Any, name: str) -> tuple[Any, Any]:
    """What holds an adapter's A and B: modules, or the parameters of an embedding."""
    embedded = getattr(layer, "lora_embedding_A", {}), getattr(layer, "lora_embedding_B", {})
    A, B = embedded if name in embedded[0] else (layer.lora_A, layer.lora_B)
    return A[name] if name in A else None, B[name] if name in B else None


def _is_in_blocks(factor: Any) -> bool:
    """Whether a factor is BD-LoRA's, with blocks on a diagonal and zeros beside them."""
    kind = type(factor)
    return kind.__name__ == "BlockDiagonalLinear" and kind.__module__.startswith("peft.")


def _matrix(factor: Any) -> Tensor:
    """The weight of a factor, whole."""
    weight: Tensor = factor.weight
    return on_diagonal(weight.detach(), factor.nblocks) if _is_in_blocks(factor) else weight


def _target(path: str, linear: nn.Module) -> Target:
    if device_of(linear).type == "meta":
        raise TargetError(
            f"`peft_model`: layer {path!r} must have weights, got one on the meta device; "
            "materialise the model first"
        )
    return check_target(linear, f"peft_model: {path}")


def _magnitude(layer: Any, name: str) -> Tensor | None:
    """DoRA's, of an adapter that has one in a layer."""
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
    held: Tensor | None = magnitudes[name].weight if name in magnitudes else None
    return held


def _refuse_running_sum(path: str, layer: Any, held: set[str]) -> None:
    """Refuse DoRA that is in force on top of other adapters: it rescales what they add as well."""
    active = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in held]
    for name in active[1:]:
        if _magnitude(layer, name) is not None:
            raise CheckpointError(
                f"`peft_model`: DoRA of adapter {name!r} must be the first one in force at layer "
                f"{path!r}, got {active}: PEFT rescales what those before it add, too, which is no "
                "sum of adapters; call set_adapter() with another order, or with one adapter"
            )


def _part(path: str, layer: Any, name: str, default: torch.dtype) -> LoraWeights:
    """What an adapter does to a layer, scaled as it was trained. DoRA's scale counts as it is now.

    Args:
        default: in which a layer computes that hides its dtype.
    """
    A, B = _modules(layer, name)
    factors: dict[str, Any]
    if isinstance(A, nn.Parameter):
        factors = {"lora_embedding_A": A, "lora_embedding_B": B, "lora_B.bias": None}
    else:
        bias = getattr(B, "bias", None)
        factors = {"lora_A.weight": _matrix(A), "lora_B.weight": _matrix(B), "lora_B.bias": bias}
    factors["lora_magnitude_vector"] = _magnitude(layer, name)
    for key, tensor in factors.items():
        if tensor is not None:
            check_values(source_of(name), f"{path}.{key}", tensor)
    A, B, bias, magnitude = factors.values()
    trained, now = _scalings(path, layer, name)
    if magnitude is None:
        return LoraWeights(A, B, trained, bias)
    linear, given = layer.base_layer, LoraWeights(A, B, now, bias)
    return with_gain(linear, given, magnitude, dtype_of(linear, default), f"peft_model: {path}")


def _scalings(path: str, layer: Any, name: str) -> tuple[float, float]:
    """The scaling that an adapter was trained with, alpha / r, and the one that it has now."""
    rank = layer.r[name]
    trained = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
    now = float(layer.scaling[name])
    what = f"peft_model: {path}.scaling[{name!r}]"
    check_number(now, what, CheckpointError)
    return check_number(trained, what, CheckpointError), now


def _weight(
    name: str,
    layers: Mapping[str, Any],
    wrappers: Mapping[str, Any],
    parts: dict[str, LoraWeights],
) -> float | None:
    """The weight that an adapter has in force; None if it is not.

    Scales that differ from layer to layer are no weight. They go into the scalings of the parts.
    """
    times = {
        path: 0 if layer.disable_adapters else layer.active_adapters.count(name)
        for path, layer in (*layers.items(), *wrappers.items())
    }
    if len(set(times.values())) > 1:
        there = next(path for path, count in times.items() if count == max(times.values()))
        other = next(path for path, count in times.items() if count != times[there])
        raise CheckpointError(
            f"`peft_model` must have the same adapters in force in all layers, got {name!r}, which "
            f"is active in {there!r} and not in {other!r}; call set_adapter() or "
            "enable_adapter_layers() first"
        )
    # The norms of DoRA hold the scale, which is no factor of what it adds.
    plain = {path: layer for path, layer in layers.items() if _magnitude(layer, name) is None}
    scalings = {path: _scalings(path, layer, name) for path, layer in plain.items()}
    scales = [now / trained for trained, now in scalings.values() if trained]
    uniform = all(math.isclose(scale, scales[0], rel_tol=SAME) for scale in scales)
    if not uniform or any(now for trained, now in scalings.values() if not trained):
        warn(
            f"{source_of(name)} has scales that differ from layer to layer; they stay part of it, "
            "and a weight of 1 means all of them"
        )
        for path, (_, now) in scalings.items():
            parts[path] = LoraWeights(parts[path].A, parts[path].B, now, parts[path].bias)
        scales = []
    scale = scales[0] if scales and not math.isclose(scales[0], 1, rel_tol=SAME) else 1.0
    count = next(iter(times.values()), 0)
    return count * scale if count else None
