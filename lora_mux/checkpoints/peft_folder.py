"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file name the adapted modules; the config gives the rank and the scaling of each. A
folder comes from strangers: no pickle is ever read, every key must be understood, and shapes are
compared with the config before a value is read.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import HONOURED, MAX_CONFIG_BYTES, PeftConfig, parse_config, parse_fields
from ..core import LoraWeights, on_diagonal
from ..errors import CheckpointError
from .base_model import PREFIX, BaseModel
from .beside_factors import TOKENS, check_copies
from .opened_folder import CONFIG_FILE, WEIGHTS_FILE, OpenedFolder, open_folder
from .safetensors_file import (
    FileOutline,
    Fingerprint,
    adapter_in_file,
    file_outline,
    parse_header,
    read_header,
    shared_outline,
)
from .stored_adapter import StoredAdapter, TensorPlace, saved_modules

PICKLE_FILE = "adapter_model.bin"

# A magnitude stands where the gain comes that BaseModel.with_gains computes from it.
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "gain",
    ".lora_magnitude_vector.weight": "gain",  # of a live model
}
# Of a dump of a live model, whose keys have the adapter's name in them: almost always this.
NAMED = re.compile(
    r"(\.lora_(?:embedding_)?[AB]|\.lora_magnitude_vector|\.trainable_tokens_delta)\.default\b"
)
# What methods of training keep beside the factors, which compute without.
TRAINING = re.compile(r"\.lora_velora_embed|\.lora_monteclora_sampler\..+")
# The endings of keys that PEFT writes for other things than LoRA on a layer.
OTHER_SUFFIXES = {
    ".base_layer.weight": "it is no weight of this model, which all adapters share",
    ".base_layer.bias": "it is no bias of this model, which all adapters share",
}
# Nobody trains a rank above the longer side of a layer. A small layer gets the rank of the others.
MAX_RANK_OF_SMALL_LAYERS = 8192
BIASES = ("none", "lora_only", "all")
MAX_PATHS_IN_WARNING = 3


class Keys(NamedTuple):
    """What the keys of a file mean."""

    modules: dict[str, dict[str, str]]  # path -> {"A": key, "B": key, ...}
    copies: dict[str, str]  # parameter of the base model -> the key of a copy


def read_peft_folder(folder: str | PathLike[str], base: BaseModel | None = None) -> StoredAdapter:
    """Read the config and the header of a PEFT checkpoint folder.

    PEFT saves copies of the base's embeddings and head beside an adapter that touches them. Those
    are compared with the base model. Biases that were trained along are what they differ by from
    the base's: constants that the adapter adds, as those of lora_bias. Modules that were saved as a
    whole (modules_to_save) are what they differ by from the base's, too. Of DoRA's magnitudes gains
    are computed, with the base's weights as they are now.

    Args:
        base: the model that it is for; None = one without targets or weights.

    Raises:
        CheckpointError: names the file, and the field or key that is missing, broken, unsafe, or
            more than LoRA or DoRA. Reading the values later raises it if they are
            not finite, or if the file has changed.
        AdapterError: DoRA on a layer whose weight cannot be read here.
    """
    model = base or BaseModel()
    with open_folder(fspath(folder)) as opened:
        _refuse_pickle(opened)
        config_file, file = opened.open(CONFIG_FILE), opened.open(WEIGHTS_FILE)
        size = min(config_file.state.bytes, MAX_CONFIG_BYTES + 1)
        content, header = config_file.read(0, size), read_header(file)
    fields = parse_fields(content, config_file.path)
    config = parse_config(fields, config_file.path, BIASES)
    if base is None and (config.use_dora or config.blocks > 1):
        name = "use_dora" if config.use_dora else "use_bdlora"
        raise CheckpointError(
            f"{config_file.path}: `{name}` must be unset where there is no model, whose layers "
            "such an adapter depends on; load it into one"
        )

    def make(fingerprint: Fingerprint) -> FileOutline:
        places = parse_header(file.path, header, file.state.bytes).places
        return peft_outline(file.path, config, fingerprint, places, model)

    outline = shared_outline(file, header, (_digest(fields), model.meaning), make)
    stored = adapter_in_file(opened, file, WEIGHTS_FILE, outline)
    if config.blocks > 1:
        stored = _with_zeros(stored, config.blocks, model)
    stored = model.with_gains(stored)
    shifts, saved = check_copies(opened, file, outline.copies, model, config)
    if shifts:
        stored = _shifted(stored, shifts, model)
    modules = {path: (model.module(path), values) for path, values in saved.items()}
    whole = saved_modules(stored.source, modules) if saved else None
    return replace(stored, saved=whole, dropout=config.lora_dropout)


def peft_outline(
    source: str,
    config: PeftConfig,
    fingerprint: Fingerprint,
    places: Mapping[str, TensorPlace],
    base: BaseModel,
) -> FileOutline:
    """The outline of the adapter that has these tensors, whose keys are PEFT's."""
    keys = _keys(source, places, base, config)
    strengths = config.strengths(keys.modules)
    for path, parts in keys.modules.items():
        shapes = {part: list(places[key].shape) for part, key in parts.items()}
        _check_shapes(source, path, parts, strengths[path].rank, shapes, config.blocks)
        _check_part(source, path, "lora_B.bias", "bias" in parts, "lora_bias", config.lora_bias)
        magnitude = "lora_magnitude_vector"
        _check_part(source, path, magnitude, "gain" in parts, "use_dora", config.use_dora)
    scaling = {path: strength.scaling for path, strength in strengths.items()}
    remarks = (*_remarks(config, keys.modules.keys(), base.targets), *_unsaved(config, keys, base))
    return file_outline(fingerprint, keys.modules, scaling, places, keys.copies, remarks)


def _with_zeros(stored: StoredAdapter, blocks: int, base: BaseModel) -> StoredAdapter:
    """An adapter of BD-LoRA with whole factors, on the host.

    A [r, in_features / blocks] or B [out_features, r / blocks] holds the blocks of a diagonal.
    """
    weights = stored.weights(stored.read(False))
    for path, part in weights.items():
        A, B = part.A, part.B
        if path in base.targets and A.shape[1] * blocks == base.in_features(path):
            A = on_diagonal(A, blocks)
        elif B.shape[1] * blocks == len(A):
            B = on_diagonal(B, blocks)
        weights[path] = replace(part, A=A, B=B)
    return stored.holding(weights)


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
    return stored.holding(weights)


def _digest(fields: Mapping[str, Any]) -> bytes:
    """What a checked config means, in 32 bytes. PEFT writes modules, sets, in any order."""
    modules = {"target_modules", "exclude_modules", "modules_to_save"}
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
    missing = sorted(path for path in wanted - held if not config.saves(path))
    extra = sorted(held - targeted)
    for paths, what in (
        (missing, "lacks modules that its config targets"),
        (extra, "holds modules that its config does not target"),
    ):
        if paths:
            yield f"{what}: {_some(paths)}"


def _unsaved(config: PeftConfig, keys: Keys, base: BaseModel) -> Iterator[str]:
    """The parameters of modules to save that the file lacks; the base's are left then, as in PEFT.

    Raises:
        CheckpointError: a module was saved, and has LoRA as well.
    """
    names = base.parameters() if config.modules_to_save else ()
    saved = [name for name in names if config.saves(name.rpartition(".")[0])]
    for name in saved:
        path = name.rpartition(".")[0]
        if path in keys.modules and name in keys.copies:
            raise CheckpointError(
                f"{config.source}: `modules_to_save` must not name modules that have LoRA as well, "
                f"got {path!r}; PEFT computes one of them only, so take the other out of the file"
            )
    for name in keys.copies:
        path = name.removesuffix(TOKENS)
        if path in keys.modules:
            raise CheckpointError(
                f"{config.source}: `trainable_token_indices` must not name modules that have LoRA "
                f"as well, got {path!r}; train one of them"
            )
    if config.trainable_tokens and not any(name.endswith(TOKENS) for name in keys.copies):
        yield "lacks the tokens that its config trains"
    missing = [name for name in saved if name not in keys.copies]
    if missing:
        yield f"lacks what its config saves: {_some(missing)}"


def _some(paths: Sequence[str]) -> str:
    """A few paths of many, for a warning."""
    more = ", ..." if len(paths) > MAX_PATHS_IN_WARNING else ""
    return ", ".join(f"{path:.100}" for path in paths[:MAX_PATHS_IN_WARNING]) + more


def _refuse_pickle(folder: OpenedFolder) -> None:
    """Say why a folder that holds a pickle instead of safetensors is refused."""
    if folder.holds(PICKLE_FILE) and not folder.holds(WEIGHTS_FILE):
        raise CheckpointError(
            f"{folder.path} must hold {WEIGHTS_FILE}, got a folder without it, only {PICKLE_FILE}, "
            "a pickle, which can run code when it is read; load it with PEFT, and save it as "
            "safetensors with save_pretrained()"
        )


def _keys(source: str, keys: Iterable[str], base: BaseModel, config: PeftConfig) -> Keys:
    """Every key is understood, and every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    for key in sorted(keys):
        name = NAMED.sub(r"\1", base.renamed(key))
        if TRAINING.search(name):
            continue
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            own = base.parameter(name.replace(TOKENS, ".weight").replace(".base_layer.", "."))
            if own is not None and name.endswith(TOKENS):
                own = own.removesuffix(".weight") + TOKENS
            if own is None or own in copies:
                raise _unknown_key(source, key, config)
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


def _unknown_key(source: str, key: str, config: PeftConfig) -> CheckpointError:
    if config.saves(key.removeprefix(PREFIX).rpartition(".")[0]):
        return CheckpointError(
            f"{source}: key {key!r} must be of a module that the base has, got one of a saved "
            "module that is not there; load the base with the head that was trained, as "
            "AutoModelForSequenceClassification does"
        )
    reason = next((why for ending, why in OTHER_SUFFIXES.items() if key.endswith(ending)), None)
    hint = f": {reason}" if reason else ""
    return CheckpointError(f"{source}: key {key!r} must end in {', '.join(SUFFIXES)}{hint}")


def _check_shapes(
    source: str,
    path: str,
    parts: dict[str, str],
    rank: int,
    shapes: dict[str, list[int]],
    blocks: int,
) -> None:
    A, B = shapes["A"], shapes["B"]
    of_kernel = [1, B[0], *B[2:]] if len(B) > 2 else B[:1]  # as PEFT has magnitudes
    for part, fits, dimensions in (
        ("A", 2 <= len(A) <= 5, "2-dimensional, or as the kernel of a convolution"),
        ("B", len(B) == len(A) and all(n == 1 for n in B[2:]), "as lora_A, with a kernel of 1"),
        ("bias", len(shapes.get("bias", [0])) == 1, "1-dimensional"),
        ("gain", shapes.get("gain", of_kernel) == of_kernel, "as long as lora_B"),
    ):
        if not fits:
            raise CheckpointError(
                f"{source}: key {parts[part]!r} must be {dimensions}, got shape {shapes[part]}"
            )
    # B of a convolution in groups has the part of h that a group uses.
    in_groups = len(B) > 2 and B[1] > 0 and rank % B[1] == 0
    if A[0] != rank or not (B[1] in (rank, rank / blocks) or in_groups):
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


def _check_part(source: str, path: str, part: str, has: bool, field: str, should: bool) -> None:
    if has != should:
        raise CheckpointError(
            f"{source}: module {path!r} must {'' if should else 'not '}have {part}, because its "
            f"config says {field}={should}"
        )
