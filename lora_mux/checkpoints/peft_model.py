"""PEFT's adapters in memory, read as strictly as a checkpoint.

They are in a PeftModel, or in a model that transformers' `add_adapter` or diffusers'
`load_lora_weights` has put them into.
"""

import importlib
from dataclasses import dataclass, replace
from typing import Any

from ..core import LoraWeights, check_number
from ..errors import ArgumentTypeError, CheckpointError
from ..layers import Target, check_linear
from .peft_config import parse_config
from .peft_folder import peft_weights

# The tensors show which modules the config targets, so that its patterns need not be understood.
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class PeftModelAdapters:
    """The adapters of a model with PEFT's layers in it."""

    adapters: dict[str, dict[str, LoraWeights]]  # name -> path in the base model -> factors
    active: list[str]  # the names of those that are in force
    targets: dict[str, Target]  # the base layers that they touch, by path


def read_peft_model(peft_model: Any) -> PeftModelAdapters:
    """Read all adapters of a PeftModel, or of a model with PEFT's layers; changes nothing.

    Raises:
        ArgumentTypeError: the model has no adapters of PEFT's.
        CheckpointError: an adapter is more than plain LoRA on linear layers, or is merged, or has a
            scaling that is not finite in fp32.
        TargetError: a layer cannot carry adapters here.
    """
    if not hasattr(peft_model, "peft_config"):
        raise ArgumentTypeError(
            "`peft_model` must be a peft.PeftModel, or a model with PEFT's adapters in it, got "
            f"{type(peft_model).__name__} without any"
        )
    base = _base(peft_model)
    layers: dict[str, Any] = {p: m for p, m in base.named_modules() if hasattr(m, "base_layer")}
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise CheckpointError(
            "`peft_model` must have its original base weights, got merged adapters; "
            "call unmerge_adapter() first"
        )
    adapters = {name: _read_adapter(peft_model, name, layers) for name in peft_model.peft_config}
    disabled = any(getattr(layer, "disable_adapters", False) for layer in layers.values())
    touched = {path for weights in adapters.values() for path in weights}
    targets = {
        path: check_linear(layer.base_layer, f"peft_model: {path}")
        for path, layer in layers.items()
        if path in touched
    }
    active: list[str] = next((layer.active_adapters for layer in layers.values()), [])
    return PeftModelAdapters(adapters, [] if disabled else list(active), targets)


def unload_peft(peft_model: Any) -> Any:
    """Take PEFT's layers out of the base model, and return it."""
    if _base(peft_model) is not peft_model:
        return peft_model.unload()
    layers = {p: m for p, m in peft_model.named_modules() if hasattr(m, "base_layer")}
    for path, layer in layers.items():
        peft_model.set_submodule(path, layer.base_layer)
    del peft_model.peft_config
    if hasattr(peft_model, "_hf_peft_config_loaded"):  # transformers and diffusers set it
        peft_model._hf_peft_config_loaded = False
    return peft_model


def _base(peft_model: Any) -> Any:
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model


def _read_adapter(peft_model: Any, name: str, layers: dict[str, Any]) -> dict[str, LoraWeights]:
    peft = importlib.import_module("peft")  # installed wherever there is a PeftModel
    source = f"adapter {name!r} of `peft_model`"
    fields = peft_model.peft_config[name].to_dict()
    config = parse_config({k: v for k, v in fields.items() if k not in TARGETING}, source)
    # Without embedding layers, because "auto" may ask the hub.
    tensors = peft.get_peft_model_state_dict(
        peft_model, adapter_name=name, save_embedding_layers=False
    )
    weights = peft_weights(source, config, tensors)

    def scaling(path: str) -> float:
        """The scaling as it is now: set_scale may have changed it."""
        found = float(layers[path].scaling[name])
        return check_number(found, f"peft_model: {path}.scaling[{name!r}]", CheckpointError)

    return {path: replace(part, scaling=scaling(path)) for path, part in weights.items()}
