"""PEFT checkpoint folders: adapter_config.json + adapter_model.safetensors, read strictly.

The keys in the file are the adapted modules; the config gives rank and scaling for each. A folder
comes from strangers: only safetensors is read, never pickle, shapes are compared with the config
before a tensor is loaded, and every key must be understood.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .peft_config import PeftConfig, read_config
from .pool import LoraWeights

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
    """A checkpoint that was read whole and checked: path of a module -> its factors."""

    folder: Path
    config: PeftConfig
    weights: dict[str, LoraWeights]

    def warn_unless_complete(self, targets: Sequence[str]) -> None:
        """Warn when the modules in the file are not the ones that the config means."""
        meant = {path for path in targets if self.config.targets(path)}
        if self.config.target_modules is None or isinstance(self.config.target_modules, str):
            meant &= self.weights.keys()  # a pattern may mean what is no linear layer, or all
        missing = sorted(meant - self.weights.keys())
        extra = sorted(path for path in self.weights if not self.config.targets(path))
        for paths, what in ((missing, "lacks modules"), (extra, "holds modules")):
            if paths:
                verb = "means" if what == "lacks modules" else "does not mean"
                warnings.warn(
                    f"{self.folder / WEIGHTS} {what} that its config {verb}: "
                    f"{', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}",
                    stacklevel=3,
                )


def read_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Read a PEFT checkpoint folder.

    Raises:
        CheckpointError: names the file and the field or key that is missing, broken, unsafe, not
            finite, or means more than plain LoRA on linear layers.
    """
    root = Path(folder)
    _check_files(root)
    config = read_config(root / CONFIG)
    file = root / WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            weights = weights_from(
                str(file),
                config,
                tensors.keys(),
                lambda key: tensors.get_slice(key).get_shape(),  # no tensor is loaded
                tensors.get_tensor,
            )
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} must be a whole safetensors file, got {error}") from None
    return Checkpoint(root, config, weights)


def weights_from(
    source: str,
    config: PeftConfig,
    keys: Iterable[str],
    shape_of: Callable[[str], Sequence[int]],
    tensor_of: Callable[[str], Tensor],
) -> dict[str, LoraWeights]:
    """path -> factors, of tensors that PEFT named; all shapes are checked before any is read.

    Raises:
        CheckpointError: begins with `source` and names the key that is not as the config says.
    """
    modules = _keys_by_module(source, keys)
    for path, parts in modules.items():
        shapes = {part: list(shape_of(key)) for part, key in parts.items()}
        _check_shapes(source, path, parts, config, shapes)
    return {
        path: _load(source, parts, config.scaling(path), tensor_of)
        for path, parts in modules.items()
    }


def _check_files(root: Path) -> None:
    if not root.is_dir():
        raise CheckpointError(f"`folder` must be an existing folder, got {str(root)!r}")
    for name in (CONFIG, WEIGHTS):
        if not (root / name).is_file():
            hint = ""
            if name == WEIGHTS and (root / PICKLE).exists():
                hint = (
                    f"; {PICKLE} is a pickle, which can run code when it is read: load it with "
                    "PEFT and save_pretrained it as safetensors"
                )
            raise CheckpointError(f"{root} must hold {name}, which it does not{hint}")


def _keys_by_module(source: str, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """path -> {"A": key, "B": key, "bias": key}; every key is understood, every pair is whole."""
    modules: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        for ending, reason in OTHERS.items():
            if key.endswith(ending):
                raise CheckpointError(f"{source}: key {key!r} is refused: {reason}")
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
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


def _load(
    source: str, parts: dict[str, str], scaling: float, tensor_of: Callable[[str], Tensor]
) -> LoraWeights:
    loaded: dict[str, Tensor] = {}
    for part, key in parts.items():
        tensor = tensor_of(key)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: key {key!r} must be floating, got {tensor.dtype}")
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{source}: key {key!r} must be finite, got NaN or infinity")
        loaded[part] = tensor
    return LoraWeights(loaded["A"], loaded["B"], scaling, loaded.get("bias"))
