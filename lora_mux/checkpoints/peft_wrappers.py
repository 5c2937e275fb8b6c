"""What PEFT wraps around modules of a live model that an adapter saves: whole ones, and tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TargetError
from ..layers import bypassed, input_embedding, with_rows
from .safetensors_file import check_finite
from .stored_adapter import StoredAdapter, saved_modules

WRAPPERS = ("ModulesToSaveWrapper", "TrainableTokensWrapper")


def source_of(name: str) -> str:
    """What error messages call an adapter of a live model."""
    return f"adapter {name!r} of `peft_model`"


def check_values(source: str, key: str, tensor: Tensor) -> None:
    """Refuse a tensor of an adapter that is not floating, not finite, or has no values."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{source}: key {key!r} must be floating, got {tensor.dtype}")
    if tensor.is_meta:
        raise CheckpointError(
            f"{source}: key {key!r} must hold values, got a tensor on the meta device; load the "
            "adapter without low_cpu_mem_usage, or materialise it first"
        )
    check_finite(source, key, tensor)


def check_wrappers(wrappers: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Refuse what PEFT wraps around modules for other ends than saving them."""
    for path, wrapper in wrappers.items():
        inside = [other for other in layers if f"{other}.".startswith(f"{path}.")]
        kind = type(wrapper)
        if kind.__name__ not in WRAPPERS or not kind.__module__.startswith("peft."):
            raise CheckpointError(
                f"`peft_model`: {path!r} must be a layer, or one of modules_to_save or "
                f"trainable_token_indices, got PEFT's {kind.__name__}; delete_adapter() the one "
                "that made it"
            )
        if inside:
            raise CheckpointError(
                f"`peft_model`: {path!r} must not be saved as a whole by one adapter and hold LoRA "
                f"of another, got LoRA in {inside[0]!r}; save the adapters, and mux.load() them"
            )


def plain_module(path: str, wrappers: Mapping[str, Any]) -> nn.Module:
    """A module of the base model that lies in one of PEFT's wrappers, or is in its place."""
    outer = next(outer for outer in wrappers if f"{path}.".startswith(f"{outer}."))
    inner = path.removeprefix(outer).removeprefix(".")
    own: nn.Module = wrappers[outer].original_module.get_submodule(inner)
    return own


def held_by(wrapper: Any) -> Any:
    """What one of PEFT's wrappers holds, by adapter: modules, or rows of a weight."""
    if hasattr(wrapper, "token_adapter"):
        return wrapper.token_adapter.trainable_tokens_delta
    return wrapper.modules_to_save


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and statistics such as those of batch norms."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _saved_tensors(name: str, path: str, wrapper: Any) -> dict[str, Tensor]:
    """What a wrapped module has in its place, with an adapter."""
    if not hasattr(wrapper, "token_adapter"):
        return _tensors(wrapper.modules_to_save[name])
    own = _tensors(wrapper.original_module)
    rows = wrapper.token_adapter.token_indices[name]
    trained = wrapper.token_adapter.trainable_tokens_delta[name].detach()
    check_values(source_of(name), f"{path}.trainable_tokens_delta", trained)
    return {**own, "weight": with_rows(own["weight"], rows, trained)}


def saved_by(name: str, wrappers: Mapping[str, Any]) -> StoredAdapter | None:
    """The modules that an adapter saved, where they differ from the base's."""
    differing: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    for outer, wrapper in wrappers.items():
        own = _tensors(wrapper.original_module)
        held = _saved_tensors(name, outer, wrapper)
        for key in held.keys() | own.keys():
            path, _, part = f"{outer}.{key}".rpartition(".")
            what = f"{source_of(name)}: the saved {path + '.' + part!r}"
            if key not in own or key not in held or own[key].shape != held[key].shape:
                raise CheckpointError(
                    f"{what} must have the shape of the base's, got another, or another module"
                )
            kinds = {type(own[key]), type(held[key])} - {nn.Parameter, Tensor}
            if kinds or own[key].is_meta or held[key].is_meta:
                raise CheckpointError(
                    f"{what} must be a plain tensor, as the base's, got one that is quantised, "
                    "split or without values"
                )
            if torch.equal(own[key].detach(), held[key].detach().to(own[key])):
                continue
            check_values(source_of(name), f"{path}.{part}", held[key])
            module = plain_module(path, wrappers)
            differing.setdefault(path, (module, {}))[1][part] = held[key]
    return saved_modules(source_of(name), differing) if differing else None


def own_module(module: Any) -> nn.Module:
    """The base model's module: itself, or what is in one of PEFT's layers or wrappers."""
    own: nn.Module | None = module._modules.get("base_layer")
    return getattr(module, "original_module", module) if own is None else own


def check_called(base: nn.Module, saved: Mapping[str, nn.Module]) -> None:
    """Refuse saved modules whose weight is read without a call, so that adapters would be hidden.

    So are those of attention, and embeddings beside the tokens', which may be mere parameters.

    Args:
        base: the base model, with PEFT's wrappers in it.
        saved: path -> the base model's own module.
    """
    hidden = bypassed(dict(base.named_modules()))
    found = [input_embedding(module) for module in base.modules()]
    tables = {own_module(table) for table in found if table is not None}
    for path, module in saved.items():
        is_parameter = isinstance(module, nn.Embedding) and tables and module not in tables
        if path in hidden or is_parameter:
            raise TargetError(
                f"`peft_model`: the saved {path!r} must be a layer that is called, got one whose "
                "weight the model may read by itself; merge the adapter into a model of its own"
            )
