"""What PEFT saves beside factors: whole modules, trained biases, and rows of trained tokens.

In a file those are copies of the base's parameters, changed or not. In a live model they are in
wrappers around its modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..configs import PeftConfig
from ..errors import CheckpointError, TargetError
from ..layers import bypassed, input_embedding, with_rows
from .base_model import BaseModel
from .opened_folder import WEIGHTS_FILE, OpenedFile, OpenedFolder, open_folder
from .safetensors_file import check_finite, read_tensor
from .stored_adapter import StoredAdapter, TensorPlace, saved_modules

TOKENS = ".token_adapter.trainable_tokens_delta"  # a few rows of a weight
COMPARED_AT_ONCE = 1 << 24  # elements of a copy, which go to the device of the base
WRAPPERS = ("ModulesToSaveWrapper", "TrainableTokensWrapper")


def check_copies(
    folder: OpenedFolder,
    looked_at: OpenedFile,
    copies: Mapping[str, TensorPlace],
    base: BaseModel,
    config: PeftConfig,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Refuse copies of the base's parameters that are not equal to them, unless they may differ.

    Those of saved modules may, and biases of targets, if the config says so.

    Returns:
        Target -> how much its bias is more than the base's, where it differs. And the path of a
        saved module -> the values of its parameters that differ.
    """
    shifts: dict[str, Tensor] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    if not copies:
        return shifts, saved
    shifting = config.bias != "none"
    with open_folder(folder.absolute) as opened:
        file = opened.open(WEIGHTS_FILE)
        if file.state != looked_at.state:
            raise CheckpointError(f"{file.path} must stay as it is while it is read, load it again")
        for name, place in copies.items():
            path = name.removesuffix(TOKENS)
            own = base.value(name if path == name else f"{path}.weight")
            if own is None:
                raise CheckpointError(
                    f"{file.path}: the copy of {name!r} must be equal to the base's, got a base "
                    "that is quantised, split or offloaded, with which nothing compares; load the "
                    "base with this layer as it is, or save the adapter without the copy "
                    "(save_embedding_layers=False)"
                )
            if path != name:
                weight = _with_tokens(file, name, place, own, config.tokens(path))
                sharing = {*base.with_its_tokens(path)} & {*base.targets, path}
                if any(f"{other}{TOKENS}" in copies for other in sharing - {path}):
                    sharing = {path}  # each has tokens of its own
                if not _equal(weight, own):
                    saved |= {module: {"weight": weight} for module in sharing}
                continue
            copy = read_tensor(file, place) if own.shape == place.shape else None
            if copy is not None and _equal(copy, own):
                continue
            if _is_saved(name, base, config):
                module, _, part = name.rpartition(".")
                saved.setdefault(module, {})[part] = _saved_copy(file.path, name, copy, own, place)
                continue
            path = name.removesuffix(".bias")
            if not (shifting and name.endswith(".bias") and path in base.targets) or copy is None:
                raise CheckpointError(
                    f"{file.path}: the copy of {name!r} must be equal to the base's, which all "
                    f"adapters share, got another of shape {list(place.shape)}; load the base "
                    "model that the adapter was trained on"
                )
            check_finite(file.path, name, copy)
            shifts[path] = copy.float() - own.float().cpu()
    return shifts, saved


def _with_tokens(
    file: OpenedFile,
    name: str,
    place: TensorPlace,
    own: Tensor,
    rows: Sequence[int],
) -> Tensor:
    """A weight in which trained tokens have their rows."""
    if not rows or place.shape != (len(rows), *own.shape[1:]) or max(rows) >= len(own):
        raise CheckpointError(
            f"{file.path}: {name!r} must be the {len(rows)} rows that the config's "
            f"`trainable_token_indices` name, of the base's {list(own.shape)}, got "
            f"{list(place.shape)}; load the base with the vocabulary that the adapter was trained "
            "with (resize_token_embeddings)"
        )
    trained = read_tensor(file, place)
    check_finite(file.path, name, trained)
    return with_rows(own.cpu(), rows, trained)


def _is_saved(name: str, base: BaseModel, config: PeftConfig) -> bool:
    """Whether a parameter lies in a module that the config saves, or is tied to one that does."""
    names = base.tied(name) if config.ensure_weight_tying else (name,)
    return any(config.saves(other.rpartition(".")[0]) for other in names)


def _saved_copy(
    source: str, name: str, copy: Tensor | None, own: Tensor, place: TensorPlace
) -> Tensor:
    if copy is None:
        raise CheckpointError(
            f"{source}: the saved {name!r} must have the shape of the base's, {list(own.shape)}, "
            f"got {list(place.shape)}; load the base as it was trained: for another number of "
            "labels with num_labels=, for a larger vocabulary after resize_token_embeddings()"
        )
    check_finite(source, name, copy)
    return copy


def _equal(copy: Tensor, own: Tensor) -> bool:
    there, here = copy.flatten(), own.flatten()
    parts = (slice(i, i + COMPARED_AT_ONCE) for i in range(0, len(here), COMPARED_AT_ONCE))
    return all(_same(there[part].to(own.device), here[part]) for part in parts)


def _same(copy: Tensor, own: Tensor) -> bool:
    """Whether values are equal, or those of one dtype are what the others are rounded to."""
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


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
