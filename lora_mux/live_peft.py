"""A live PeftModel: its adapters as they are in memory, read as strictly as a checkpoint."""

import importlib
from dataclasses import dataclass, replace
from typing import Any

from .checkpoint import weights_from
from .errors import ArgumentTypeError, CheckpointError
from .peft_config import parse_config
from .pool import LoraWeights
from .targets import Target, check_linear

# The tensors tell which modules are meant; other people's patterns need not be understood.
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class LivePeft:
    """The adapters of a PeftModel, and those that are active."""

    adapters: dict[str, dict[str, LoraWeights]]  # name -> path in the base model -> factors
    active: list[str]
    targets: dict[str, Target]  # the base layers that they touch, by path


def read_live(peft_model: Any) -> LivePeft:
    """Read all adapters of a PeftModel; changes nothing.

    Raises:
        ArgumentTypeError: not a PeftModel.
        CheckpointError: an adapter that is more than plain LoRA on linear layers, or is merged.
        TargetError: a layer that can not carry adapters here.
    """
    if not (hasattr(peft_model, "peft_config") and hasattr(peft_model, "get_base_model")):
        raise ArgumentTypeError(
            f"`peft_model` must be a peft.PeftModel, got {type(peft_model).__name__}"
        )
    base = peft_model.get_base_model()
    layers: dict[str, Any] = {p: m for p, m in base.named_modules() if hasattr(m, "base_layer")}
    if any(getattr(layer, "merged", False) for layer in layers.values()):
        raise CheckpointError(
            "`peft_model` must have its base weights as they were, got merged adapters; "
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
    return LivePeft(adapters, [] if disabled else list(peft_model.active_adapters), targets)


def _read_adapter(peft_model: Any, name: str, layers: dict[str, Any]) -> dict[str, LoraWeights]:
    peft = importlib.import_module("peft")  # which whoever has a PeftModel has
    source = f"adapter {name!r} of `peft_model`"
    fields = peft_model.peft_config[name].to_dict()
    config = parse_config({k: v for k, v in fields.items() if k not in TARGETING}, source)
    # Without embedding layers: "auto" may ask the hub.
    tensors = peft.get_peft_model_state_dict(
        peft_model, adapter_name=name, save_embedding_layers=False
    )
    weights = weights_from(source, config, tensors)
    # The scaling of the moment, which set_scale may have changed.
    return {
        path: replace(part, scaling=float(layers[path].scaling[name]))
        for path, part in weights.items()
    }
