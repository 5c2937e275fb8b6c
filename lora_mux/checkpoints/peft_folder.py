"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file name the adapted modules; the config gives the rank and the scaling of each. A
folder comes from strangers: no pickle is ever read, every key must be understood, and shapes are
compared with the config before a value is read.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from ..core import LoraWeights
from ..errors import CheckpointError
from .opened_folder import OpenedFolder, open_folder
from .peft_config import HONOURED, MAX_CONFIG_BYTES, PeftConfig, parse_config, parse_fields
from .safetensors_file import (
    FileOutline,
    Fingerprint,
    adapter_in_file,
    check_finite,
    file_outline,
    parse_header,
    read_header,
)
from .stored_adapter import StoredAdapter, TensorPlace, lora_weights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
# The endings of keys that PEFT writes for other things than LoRA on a linear layer.
OTHER_SUFFIXES = {
    ".lora_embedding_A": "LoRA on an embedding is not supported",
    ".lora_embedding_B": "LoRA on an embedding is not supported",
    ".lora_magnitude_vector": "DoRA rescales the base's own output",
    ".trainable_tokens_delta": "trainable tokens replace rows of the embedding",
    ".base_layer.weight": "it is a weight of the base model, which all adapters share",
    ".base_layer.bias": "it is a bias of the base model, which all adapters share",
}
DIMENSIONS = {"A": 2, "B": 2, "bias": 1}  # of the factors of a linear layer
# Nobody trains a rank above the longer side of a layer. A small layer gets the rank of the others.
MAX_RANK_OF_SMALL_LAYERS = 8192
MAX_PATHS_IN_WARNING = 3


def read_peft_folder(folder: str | PathLike[str], targets: Sequence[str] = ()) -> StoredAdapter:
    """Read the config and the header of a PEFT checkpoint folder.

    Args:
        targets: the paths of all linear layers that can carry adapters.

    Raises:
        CheckpointError: names the file, and the field or key that is missing, broken, unsafe, or
            more than plain LoRA on linear layers. Reading the values later raises it if they are
            not finite, or if the file has changed.
    """
    with open_folder(fspath(folder)) as opened:
        _refuse_pickle(opened)
        config_file, file = opened.open(CONFIG_FILE), opened.open(WEIGHTS_FILE)
        size = min(config_file.state.bytes, MAX_CONFIG_BYTES + 1)
        content, header = config_file.read(0, size), read_header(file)
    fields = parse_fields(content, config_file.path)
    config = parse_config(fields, config_file.path)

    def outline(fingerprint: Fingerprint) -> FileOutline:
        places = parse_header(file.path, header, file.state.bytes).places
        return peft_outline(file.path, config, fingerprint, places, targets)

    meaning = (_digest(fields), *targets)
    return adapter_in_file(opened, file, WEIGHTS_FILE, header, meaning, outline)


def peft_outline(
    source: str,
    config: PeftConfig,
    fingerprint: Fingerprint,
    places: Mapping[str, TensorPlace],
    targets: Sequence[str] = (),
) -> FileOutline:
    """The outline of the adapter that has these tensors, whose keys are PEFT's."""
    keys, scaling = _checked_keys(source, config, places)
    return file_outline(fingerprint, keys, scaling, places, _remarks(config, keys.keys(), targets))


def _digest(fields: Mapping[str, Any]) -> bytes:
    """What a checked config means, in 32 bytes. PEFT writes modules, sets, in any order."""
    modules = {"target_modules", "exclude_modules"}
    # An initialisation may be anything that is no string, and then means nothing.
    names = (HONOURED - {"init_lora_weights"}) & fields.keys()
    known = {name: fields[name] for name in sorted(names)}
    sets = {n: sorted(v) for n, v in known.items() if n in modules and isinstance(v, list)}
    return hashlib.sha256(json.dumps(known | sets).encode()).digest()


def _remarks(config: PeftConfig, held: Set[str], targets: Sequence[str]) -> Iterator[str]:
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


def peft_weights(
    source: str, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, LoraWeights]:
    """Path -> factors, from tensors whose keys are PEFT's.

    Raises:
        CheckpointError: begins with `source`, and names the key that does not agree with the
            config.
    """
    keys, scaling = _checked_keys(source, config, tensors)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: key {key!r} must be floating, got {tensor.dtype}")
        check_finite(source, key, tensor)
    return lora_weights(keys, scaling, tensors.__getitem__)


def _refuse_pickle(folder: OpenedFolder) -> None:
    """Say why a folder that holds a pickle instead of safetensors is refused."""
    if folder.holds(PICKLE_FILE) and not folder.holds(WEIGHTS_FILE):
        raise CheckpointError(
            f"{folder.path} must hold {WEIGHTS_FILE}, got a folder without it, only {PICKLE_FILE}, "
            "a pickle, which can run code when it is read; load it with PEFT, and save it as "
            "safetensors with save_pretrained()"
        )


def _checked_keys(
    source: str, config: PeftConfig, tensors: Mapping[str, Tensor | TensorPlace]
) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Path -> {"A": key, "B": key, "bias": key}, by shapes that agree with the config; scalings."""
    modules = _keys_by_module(source, tensors)
    strengths = config.strengths(modules)
    for path, parts in modules.items():
        shapes = {part: list(tensors[key].shape) for part, key in parts.items()}
        _check_shapes(source, path, parts, strengths[path].rank, shapes)
        _check_bias(source, path, "bias" in parts, config.lora_bias)
    return modules, {path: strength.scaling for path, strength in strengths.items()}


def _keys_by_module(source: str, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Path -> {"A": key, "B": key, "bias": key}; every key is understood, every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise _unknown_key(source, key)
        path = key.removesuffix(suffix).removeprefix(PREFIX)
        parts = modules.setdefault(path, {})
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
    return modules


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
    for part, dimensions in DIMENSIONS.items():
        if part in shapes and len(shapes[part]) != dimensions:
            raise CheckpointError(
                f"{source}: key {parts[part]!r} must be {dimensions}-dimensional (of a linear "
                f"layer), got shape {shapes[part]}"
            )
    if shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise CheckpointError(
            f"{source}: module {path!r} must have the config's rank {rank}, got lora_A "
            f"{shapes['A']} and lora_B {shapes['B']}"
        )
    most = max(MAX_RANK_OF_SMALL_LAYERS, shapes["A"][1], shapes["B"][0])
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
