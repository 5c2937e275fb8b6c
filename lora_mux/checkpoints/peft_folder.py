"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file are the adapted modules; the config gives rank and scaling for each. A folder
comes from strangers: only safetensors is read, never pickle, shapes are compared with the config
before a tensor is loaded, every key must be understood, and its files must lie in it.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..core import LoraWeights, is_finite
from ..errors import CheckpointError
from .peft_config import PeftConfig, read_config
from .safetensors_file import Block, TensorFile
from .stored_adapter import Stored

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"

PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
# Keys that PEFT writes for what is not LoRA on a linear layer.
OTHERS = {
    ".lora_embedding_A": "LoRA on an embedding is not supported",
    ".lora_embedding_B": "LoRA on an embedding is not supported",
    ".lora_magnitude_vector": "DoRA rescales the base's own output",
    ".trainable_tokens_delta": "trainable tokens replace rows of the embedding",
    ".base_layer.weight": "it is a weight of the base model, which all adapters share",
    ".base_layer.bias": "it is a bias of the base model, which all adapters share",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and header were read and checked: all but the values."""

    folder: Path
    config: PeftConfig
    stored: Stored

    @property
    def weights(self) -> dict[str, LoraWeights]:
        """path of a module -> its factors, read from the file."""
        return self.stored.weights(self.stored.read(False))

    def warn_unless_complete(self, targets: Sequence[str]) -> None:
        """Warn when the modules in the file are not the ones that the config means."""
        held = self.stored.keys.keys()
        meant = {path for path in targets if self.config.targets(path)}
        if self.config.target_modules is None or isinstance(self.config.target_modules, str):
            meant &= held  # a pattern may mean what is no linear layer, or all
        missing = sorted(meant - held)
        extra = sorted(path for path in held if not self.config.targets(path))
        for paths, what in ((missing, "lacks modules"), (extra, "holds modules")):
            if paths:
                verb = "means" if what == "lacks modules" else "does not mean"
                warnings.warn(
                    f"{self.folder / WEIGHTS} {what} that its config {verb}: "
                    f"{', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}",
                    stacklevel=3,
                )


def read_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Read config and header of a PEFT checkpoint folder.

    Raises:
        CheckpointError: names the file and the field or key that is missing, broken, unsafe, or
            means more than plain LoRA on linear layers. Reading the values later raises it for
            what is not finite, and for a file that has changed meanwhile.
    """
    root = Path(folder)
    try:
        files = _files(root)
    except OSError as error:
        raise CheckpointError(f"`folder` must be readable, got {error}") from None
    config = read_config(files[CONFIG])
    file = TensorFile(files[WEIGHTS])
    source = str(root / WEIGHTS)
    modules = _modules(source, config, file.entries, lambda key: file.entries[key].shape)

    def read(pinned: bool) -> Block:
        block = file.read(pinned)
        for key in block.places:
            _check_finite(source, key, block[key])
        return block

    scaling = {path: config.scaling(path) for path in modules}
    return Checkpoint(root, config, Stored(str(folder), modules, scaling, file.entries, read))


def weights_from(
    source: str, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, LoraWeights]:
    """path -> factors, of tensors that PEFT named.

    Raises:
        CheckpointError: begins with `source` and names the key that is not as the config says.
    """
    modules = _modules(source, config, tensors, lambda key: tensors[key].shape)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: key {key!r} must be floating, got {tensor.dtype}")
        _check_finite(source, key, tensor)
    return {
        path: LoraWeights(
            scaling=config.scaling(path), **{part: tensors[key] for part, key in parts.items()}
        )
        for path, parts in modules.items()
    }


def _modules(
    source: str,
    config: PeftConfig,
    keys: Iterable[str],
    shape_of: Callable[[str], Sequence[int]],
) -> dict[str, dict[str, str]]:
    """path -> {"A": key, "B": key, "bias": key}, whose shapes are as the config says."""
    modules = _keys_by_module(source, keys)
    for path, parts in modules.items():
        shapes = {part: list(shape_of(key)) for part, key in parts.items()}
        _check_shapes(source, path, parts, config, shapes)
    return modules


def _files(root: Path) -> dict[str, Path]:
    """The two files of a folder."""
    if not root.is_dir():
        raise CheckpointError(f"`folder` must be an existing folder, got {str(root)!r}")
    files = {name: root / name for name in (CONFIG, WEIGHTS)}
    for name, file in files.items():
        if not file.is_file():
            hint = ""
            if name == WEIGHTS and (root / PICKLE).exists():
                hint = (
                    f"; {PICKLE} is a pickle, which can run code when it is read: load it with "
                    "PEFT and save_pretrained it as safetensors"
                )
            raise CheckpointError(f"{root} must hold {name}, which it does not{hint}")
    return {name: inside(root, file) for name, file in files.items()}


def inside(root: Path, file: Path) -> Path:
    """The path of a file, if no link leads out of the folder: to another tenant's, say.

    The hub's cache holds a repository's files beside its folders, and links to them.
    """
    if not file.is_symlink():
        return file
    folder, real = root.resolve(), file.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{file} must lie in its folder, got a link to {real}")
    return real


def _keys_by_module(source: str, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """path -> {"A": key, "B": key, "bias": key}; every key is understood, every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            for ending, reason in OTHERS.items():
                if key.endswith(ending):
                    raise CheckpointError(f"{source}: key {key!r} is refused: {reason}")
            raise CheckpointError(
                f"{source}: key {key!r} is not understood; "
                f"expected keys end in {', '.join(SUFFIXES)}"
            )
        path = key.removesuffix(suffix).removeprefix(PREFIX)
        parts = modules.setdefault(path, {})
        part = SUFFIXES[suffix]
        if part in parts:
            raise CheckpointError(f"{source}: key {key!r} says the same as {parts[part]!r}")
        parts[part] = key
    for path, parts in modules.items():
        for part in "AB":
            if part not in parts:
                raise CheckpointError(
                    f"{source}: module {path!r} must have both lora_A.weight and lora_B.weight, "
                    f"lora_{part}.weight is missing"
                )
    if not modules:
        raise CheckpointError(f"{source} must hold at least one adapted module, got none")
    return modules


def _check_shapes(
    source: str,
    path: str,
    parts: dict[str, str],
    config: PeftConfig,
    shapes: dict[str, list[int]],
) -> None:
    for part, wanted in (("A", 2), ("B", 2), ("bias", 1)):
        if part in shapes and len(shapes[part]) != wanted:
            raise CheckpointError(
                f"{source}: key {parts[part]!r} must have {wanted} dimensions (a linear layer), "
                f"got shape {shapes[part]}"
            )
    rank = config.rank(path)
    if shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise CheckpointError(
            f"{source}: module {path!r} must have the config's rank {rank}, got lora_A "
            f"{shapes['A']} and lora_B {shapes['B']}"
        )
    if ("bias" in parts) != config.lora_bias:
        raise CheckpointError(
            f"{source}: module {path!r} must {'' if config.lora_bias else 'not '}have lora_B.bias, "
            f"as its config's lora_bias={config.lora_bias} says"
        )


def _check_finite(source: str, key: str, tensor: Tensor) -> None:
    if not is_finite(tensor, tensor.dtype):
        raise CheckpointError(f"{source}: key {key!r} must be finite, got NaN or infinity")
