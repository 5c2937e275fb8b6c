"""Parameters of the base that PEFT saves beside an adapter: copies of them, or trained ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..configs import PeftConfig
from ..errors import CheckpointError
from ..layers import with_rows
from .base_model import BaseModel
from .opened_folder import WEIGHTS_FILE, OpenedFile, OpenedFolder, open_folder
from .safetensors_file import check_finite, read_tensor
from .stored_adapter import TensorPlace

TOKENS = ".token_adapter.trainable_tokens_delta"  # a few rows of a weight
COMPARED_AT_ONCE = 1 << 24  # elements of a copy, which go to the device of the base


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
