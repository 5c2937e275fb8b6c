"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file name the adapted modules; the config gives the rank and the scaling of each. A
folder comes from strangers: no pickle is ever read, its files must be inside it, every key must be
understood, and shapes are compared with the config before a tensor is loaded.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..core import LoraWeights, is_finite
from ..errors import CheckpointError
from .peft_config import PeftConfig, Strength, read_config
from .safetensors_file import PackedTensors, SafetensorsFile
from .stored_adapter import StoredAdapter, lora_weights

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
MAX_PATHS_IN_WARNING = 3


@dataclass(frozen=True)
class PeftFolder:
    """A checkpoint folder of which everything but the values was read and checked."""

    folder: Path
    config: PeftConfig
    stored: StoredAdapter

    def gaps(self, targets: Sequence[str]) -> list[str]:
        """What to warn of, if the file holds other modules than its config targets.

        Args:
            targets: the paths of all linear layers that can carry adapters.

        Raises:
            CheckpointError: the config's patterns take too long for so many paths.
        """
        held = self.stored.keys.keys()
        targeted = self.config.targeted({*targets, *held})
        wanted = targeted.intersection(targets)
        if self.config.target_modules is None or isinstance(self.config.target_modules, str):
            wanted &= held  # a pattern may also match layers that were never adapted
        most = MAX_PATHS_IN_WARNING
        return [
            f"{self.folder / WEIGHTS_FILE} {what}: {', '.join(sorted(paths)[:most])}"
            + (", ..." if len(paths) > most else "")
            for paths, what in (
                (wanted - held, "lacks modules that its config targets"),
                (held - targeted, "holds modules that its config does not target"),
            )
            if paths
        ]


def read_peft_folder(folder: str | PathLike[str]) -> PeftFolder:
    """Read the config and the header of a PEFT checkpoint folder.

    Raises:
        CheckpointError: names the file, and the field or key that is missing, broken, unsafe, or
            more than plain LoRA on linear layers. Reading the values later raises it if they are
            not finite, or if the file has changed.
    """
    root = Path(folder)
    try:
        files = _find_files(root)
    except OSError as error:
        raise CheckpointError(f"`folder` must be readable, got {error}") from None
    config = read_config(files[CONFIG_FILE])
    file = SafetensorsFile(files[WEIGHTS_FILE])
    source = str(root / WEIGHTS_FILE)
    keys, scaling = _checked_keys(source, config, file.tensors, lambda k: file.tensors[k].shape)
    read = functools.partial(_read_and_check, file, source)  # not a closure, which has no pickle
    return PeftFolder(root, config, StoredAdapter(str(folder), keys, scaling, file.tensors, read))


def _read_and_check(file: SafetensorsFile, source: str, pinned: bool) -> PackedTensors:
    values = file.read(pinned)
    for key in values.places:
        _check_finite(source, key, values[key])
    return values


def peft_weights(
    source: str, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, LoraWeights]:
    """Path -> factors, from tensors whose keys are PEFT's.

    Raises:
        CheckpointError: begins with `source`, and names the key that does not agree with the
            config.
    """
    keys, scaling = _checked_keys(source, config, tensors, lambda key: tensors[key].shape)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: key {key!r} must be floating, got {tensor.dtype}")
        _check_finite(source, key, tensor)
    return lora_weights(keys, scaling, tensors.__getitem__)


def resolve_inside(folder: Path, file: Path) -> Path:
    """The real path of a file, if no link leads out of its folder, say to another tenant's.

    The hub's cache keeps a repository's files beside its folders, and links to them.
    """
    if not file.is_symlink():
        return file
    root, real = folder.resolve(), file.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{file} must be inside its folder, got a link to {real}")
    return real


def _find_files(root: Path) -> dict[str, Path]:
    """The two files of a folder, by their names."""
    if not root.is_dir():
        raise CheckpointError(f"`folder` must be an existing folder, got {str(root)!r}")
    files = {name: root / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for name, file in files.items():
        if not file.is_file():
            hint = ""
            if name == WEIGHTS_FILE and (root / PICKLE_FILE).exists():
                hint = (
                    f", only {PICKLE_FILE}, a pickle, which can run code when it is read; load it "
                    "with PEFT, and save it as safetensors with save_pretrained()"
                )
            raise CheckpointError(f"{root} must hold {name}, got a folder without it{hint}")
    return {name: resolve_inside(root, file) for name, file in files.items()}


def _checked_keys(
    source: str,
    config: PeftConfig,
    keys: Iterable[str],
    shape_of: Callable[[str], Sequence[int]],
) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Path -> {"A": key, "B": key, "bias": key}, whose shapes agree with the config, and path ->
    scaling."""
    modules = _keys_by_module(source, keys)
    strengths = config.strengths(modules)
    for path, parts in modules.items():
        shapes = {part: list(shape_of(key)) for part, key in parts.items()}
        _check_shapes(source, path, parts, config.lora_bias, strengths[path], shapes)
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
    bias: bool,
    strength: Strength,
    shapes: dict[str, list[int]],
) -> None:
    for part, dimensions in DIMENSIONS.items():
        if part in shapes and len(shapes[part]) != dimensions:
            raise CheckpointError(
                f"{source}: key {parts[part]!r} must be {dimensions}-dimensional (of a linear "
                f"layer), got shape {shapes[part]}"
            )
    rank = strength.rank
    if shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise CheckpointError(
            f"{source}: module {path!r} must have the config's rank {rank}, got lora_A "
            f"{shapes['A']} and lora_B {shapes['B']}"
        )
    if ("bias" in parts) != bias:
        raise CheckpointError(
            f"{source}: module {path!r} must {'' if bias else 'not '}have lora_B.bias, "
            f"because its config says lora_bias={bias}"
        )


def _check_finite(source: str, key: str, tensor: Tensor) -> None:
    if not is_finite(tensor, tensor.dtype):
        raise CheckpointError(f"{source}: key {key!r} must be finite, got NaN or infinity")
