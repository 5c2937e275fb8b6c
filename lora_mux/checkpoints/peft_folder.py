"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file name the adapted modules; the config gives the rank and the scaling of each. A
folder comes from strangers: no pickle is ever read, every key must be understood, and shapes are
compared with the config before a value is read.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import LoraWeights
from ..errors import CheckpointError
from .base_model import BaseModel
from .opened_folder import CONFIG_FILE, WEIGHTS_FILE, OpenedFile, OpenedFolder, open_folder
from .peft_config import HONOURED, MAX_CONFIG_BYTES, PeftConfig, parse_config, parse_fields
from .safetensors_file import (
    FileOutline,
    Fingerprint,
    adapter_in_file,
    check_finite,
    file_outline,
    parse_header,
    read_header,
    read_tensor,
    shared_outline,
)
from .stored_adapter import StoredAdapter, TensorPlace, copy_to_host

PICKLE_FILE = "adapter_model.bin"

SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
# Of a dump of a live model, whose keys have the adapter's name in them: almost always this.
NAMED = re.compile(r"(\.lora_(?:embedding_)?[AB])\.default\b")
# The endings of keys that PEFT writes for other things than LoRA on a layer.
OTHER_SUFFIXES = {
    ".lora_magnitude_vector": "DoRA rescales the base's own output",
    ".trainable_tokens_delta": "trainable tokens replace rows of the embedding",
    ".base_layer.weight": "it is no weight of this model, which all adapters share",
    ".base_layer.bias": "it is no bias of this model, which all adapters share",
}
# Nobody trains a rank above the longer side of a layer. A small layer gets the rank of the others.
MAX_RANK_OF_SMALL_LAYERS = 8192
BIASES = ("none", "lora_only", "all")
MAX_PATHS_IN_WARNING = 3
COMPARED_AT_ONCE = 1 << 24  # elements of a copy, which go to the device of the base


class Keys(NamedTuple):
    """What the keys of a file mean."""

    modules: dict[str, dict[str, str]]  # path -> {"A": key, "B": key, "bias": key}
    copies: dict[str, str]  # parameter of the base model -> the key of a copy


def read_peft_folder(folder: str | PathLike[str], base: BaseModel | None = None) -> StoredAdapter:
    """Read the config and the header of a PEFT checkpoint folder.

    PEFT saves copies of the base's embeddings and head beside an adapter that touches them. Those
    are compared with the base model. Biases that were trained along are what they differ by from
    the base's: constants that the adapter adds, as those of lora_bias.

    Args:
        base: the model that it is for; None = one without targets or weights.

    Raises:
        CheckpointError: names the file, and the field or key that is missing, broken, unsafe, or
            more than plain LoRA on linear layers. Reading the values later raises it if they are
            not finite, or if the file has changed.
    """
    model = base or BaseModel()
    with open_folder(fspath(folder)) as opened:
        _refuse_pickle(opened)
        config_file, file = opened.open(CONFIG_FILE), opened.open(WEIGHTS_FILE)
        size = min(config_file.state.bytes, MAX_CONFIG_BYTES + 1)
        content, header = config_file.read(0, size), read_header(file)
    fields = parse_fields(content, config_file.path)
    config = parse_config(fields, config_file.path, BIASES)

    def make(fingerprint: Fingerprint) -> FileOutline:
        places = parse_header(file.path, header, file.state.bytes).places
        return peft_outline(file.path, config, fingerprint, places, model)

    outline = shared_outline(file, header, (_digest(fields), model.meaning), make)
    stored = adapter_in_file(opened, file, WEIGHTS_FILE, outline)
    shifts = _check_copies(opened, file, outline.copies, model, config.bias != "none")
    return _shifted(stored, shifts, model) if shifts else stored


def peft_outline(
    source: str,
    config: PeftConfig,
    fingerprint: Fingerprint,
    places: Mapping[str, TensorPlace],
    base: BaseModel,
) -> FileOutline:
    """The outline of the adapter that has these tensors, whose keys are PEFT's."""
    keys = _keys(source, places, base)
    strengths = config.strengths(keys.modules)
    for path, parts in keys.modules.items():
        shapes = {part: list(places[key].shape) for part, key in parts.items()}
        _check_shapes(source, path, parts, strengths[path].rank, shapes)
        _check_bias(source, path, "bias" in parts, config.lora_bias)
    scaling = {path: strength.scaling for path, strength in strengths.items()}
    remarks = _remarks(config, keys.modules.keys(), base.targets)
    return file_outline(fingerprint, keys.modules, scaling, places, keys.copies, remarks)


def _check_copies(
    folder: OpenedFolder,
    looked_at: OpenedFile,
    copies: Mapping[str, TensorPlace],
    base: BaseModel,
    shifting: bool,
) -> dict[str, Tensor]:
    """Refuse copies of the base's parameters that are not equal to them.

    Args:
        shifting: biases of targets may differ.

    Returns:
        Target -> how much its bias is more than the base's, where it differs.
    """
    shifts: dict[str, Tensor] = {}
    if not copies:
        return shifts
    with open_folder(folder.absolute) as opened:
        file = opened.open(WEIGHTS_FILE)
        if file.state != looked_at.state:
            raise CheckpointError(f"{file.path} must stay as it is while it is read, load it again")
        for name, place in copies.items():
            own = base.value(name)
            if own is None:
                raise CheckpointError(
                    f"{file.path}: the copy of {name!r} must be equal to the base's, got a base "
                    "that is quantised, split or offloaded, with which nothing compares; save the "
                    "adapter with save_embedding_layers=False"
                )
            copy = read_tensor(file, place) if own.shape == place.shape else None
            if copy is not None and _equal(copy, own):
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
    return shifts


def _shifted(stored: StoredAdapter, shifts: Mapping[str, Tensor], base: BaseModel) -> StoredAdapter:
    """An adapter with what it adds to the base's biases, on the host."""
    weights = stored.weights(stored.read(False))
    for path, shift in shifts.items():
        part = weights.get(path)
        if part is None:  # nothing but the bias is trained here
            A, B = torch.zeros(1, base.in_features(path)), torch.zeros(len(shift), 1)
            part = LoraWeights(A, B, 1.0)
        elif not part.scaling:  # it adds nothing else, and no constant times zero is the shift
            part = LoraWeights(part.A, torch.zeros_like(part.B), 1.0)
        constant = shift / part.scaling + (0 if part.bias is None else part.bias.float())
        weights[path] = replace(part, bias=constant)
    held = copy_to_host(stored.source, weights, False)
    return replace(held, outline=replace(held.outline, remarks=stored.outline.remarks))


def _equal(copy: Tensor, own: Tensor) -> bool:
    there, here = copy.flatten(), own.flatten()
    parts = (slice(i, i + COMPARED_AT_ONCE) for i in range(0, len(here), COMPARED_AT_ONCE))
    return all(_same(there[part].to(own.device), here[part]) for part in parts)


def _same(copy: Tensor, own: Tensor) -> bool:
    """Whether values are equal, or those of one dtype are what the others are rounded to."""
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


def _digest(fields: Mapping[str, Any]) -> bytes:
    """What a checked config means, in 32 bytes. PEFT writes modules, sets, in any order."""
    modules = {"target_modules", "exclude_modules"}
    # An initialisation may be anything that is no string, and then means nothing.
    names = (HONOURED - {"init_lora_weights"}) & fields.keys()
    known = {name: fields[name] for name in sorted(names)}
    sets = {n: sorted(v) for n, v in known.items() if n in modules and isinstance(v, list)}
    return hashlib.sha256(json.dumps(known | sets).encode()).digest()


def _remarks(config: PeftConfig, held: Set[str], targets: Iterable[str]) -> Iterator[str]:
    """In what the file differs from what its config targets."""
    targeted = config.targeted({*targets, *held})
    wanted = targeted.intersection(targets)
    if config.target_modules is None or isinstance(config.target_modules, str):
        wanted &= held  # a pattern may also match layers that were never adapted
    missing = sorted(wanted - held)
    extra = sorted(held - targeted)
    for paths, what in (
        (missing, "lacks modules that its config targets"),
        (extra, "holds modules that its config does not target"),
    ):
        if paths:
            more = ", ..." if len(paths) > MAX_PATHS_IN_WARNING else ""
            some = (f"{path:.100}" for path in paths[:MAX_PATHS_IN_WARNING])
            yield f"{what}: {', '.join(some)}{more}"


def _refuse_pickle(folder: OpenedFolder) -> None:
    """Say why a folder that holds a pickle instead of safetensors is refused."""
    if folder.holds(PICKLE_FILE) and not folder.holds(WEIGHTS_FILE):
        raise CheckpointError(
            f"{folder.path} must hold {WEIGHTS_FILE}, got a folder without it, only {PICKLE_FILE}, "
            "a pickle, which can run code when it is read; load it with PEFT, and save it as "
            "safetensors with save_pretrained()"
        )


def _keys(source: str, keys: Iterable[str], base: BaseModel) -> Keys:
    """Every key is understood, and every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    for key in sorted(keys):
        name = NAMED.sub(r"\1", base.renamed(key))
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            own = base.parameter(name.replace(".base_layer.", "."))
            if own is None or own in copies:
                raise _unknown_key(source, key)
            copies[own] = key
            continue
        parts = modules.setdefault(base.path(name.removesuffix(suffix)), {})
        part = SUFFIXES[suffix]
        if part in parts:
            raise CheckpointError(
                f"{source}: key {key!r} must be the only one for its tensor, got {parts[part]!r} "
                "as well"
            )
        parts[part] = key
    for path, parts in modules.items():
        for part in "AB":
            if part not in parts:
                raise CheckpointError(
                    f"{source}: module {path!r} must have both lora_A.weight and lora_B.weight, "
                    f"but lora_{part}.weight is missing"
                )
    if not modules:
        raise CheckpointError(f"{source} must hold at least one adapted module, got none")
    return Keys(modules, copies)


def _unknown_key(source: str, key: str) -> CheckpointError:
    reason = next((why for ending, why in OTHER_SUFFIXES.items() if key.endswith(ending)), None)
    hint = f": {reason}" if reason else ""
    return CheckpointError(f"{source}: key {key!r} must end in {', '.join(SUFFIXES)}{hint}")


def _check_shapes(
    source: str,
    path: str,
    parts: dict[str, str],
    rank: int,
    shapes: dict[str, list[int]],
) -> None:
    A, B = shapes["A"], shapes["B"]
    for part, fits, dimensions in (
        ("A", 2 <= len(A) <= 5, "2-dimensional, or as the kernel of a convolution"),
        ("B", len(B) == len(A) and all(n == 1 for n in B[2:]), "as lora_A, with a kernel of 1"),
        ("bias", len(shapes.get("bias", [0])) == 1, "1-dimensional"),
    ):
        if not fits:
            raise CheckpointError(
                f"{source}: key {parts[part]!r} must be {dimensions}, got shape {shapes[part]}"
            )
    # B of a convolution in groups has the part of h that a group uses.
    of_group = B[1] if len(B) == 2 or not B[1] or rank % B[1] else rank
    if A[0] != rank or of_group != rank:
        raise CheckpointError(
            f"{source}: module {path!r} must have the config's rank {rank}, got lora_A "
            f"{A} and lora_B {B}"
        )
    most = max(MAX_RANK_OF_SMALL_LAYERS, A[1], B[0])
    if rank > most:
        raise CheckpointError(
            f"{source}: module {path!r} must have a rank of at most {most}, got {rank}: more "
            "than such a layer can use"
        )


def _check_bias(source: str, path: str, has: bool, should: bool) -> None:
    if has != should:
        raise CheckpointError(
            f"{source}: module {path!r} must {'' if should else 'not '}have lora_B.bias, because "
            f"its config says lora_bias={should}"
        )
