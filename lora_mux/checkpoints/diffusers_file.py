"""A LoRA file of diffusers: adapters of one or more models of a pipeline, and maybe their configs.

    <component>.<path>.lora_A.weight      of pipe.save_lora_weights (transformer, unet, ...)
    <path>.lora_A.weight                  of model.save_lora_adapter

The file's metadata may hold a LoraConfig as JSON, whose fields are named like the keys. If it does
not, alpha = rank, as in diffusers itself, so that scaling = 1.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from ..core import LoraWeights
from ..errors import CheckpointError
from .peft_config import PeftConfig, parse_config, parse_fields
from .peft_folder import CONFIG_FILE, peft_weights, resolve_inside
from .safetensors_file import SafetensorsFile

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
LOAD_WITH_DIFFUSERS = "load it with diffusers (pipe.load_lora_weights) and use attach_peft"


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder holds diffusers' file. If it has PEFT's files as well, those count."""
    return (folder / DIFFUSERS_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def read_diffusers_file(folder: Path, targets: Collection[str]) -> dict[str, LoraWeights]:
    """Path -> factors, of the component in the file whose modules are targets.

    Raises:
        CheckpointError: names the file and the entry that is broken, belongs to another model, is
            in another of the many formats that diffusers reads, or is more than plain LoRA on
            linear layers.
    """
    path = resolve_inside(folder, folder / DIFFUSERS_FILE)
    file = SafetensorsFile(path)
    values = file.read()
    tensors = {key: values[key] for key in file.tensors}
    fields = parse_fields(file.metadata.get(METADATA, "{}"), f"{path}: `{METADATA}`")
    other = next((key for key in tensors if ".lora_A." not in key and ".lora_B." not in key), None)
    if other is not None:
        raise CheckpointError(
            f"{path}: key {other!r} must be of lora_A or lora_B, got another format; "
            f"{LOAD_WITH_DIFFUSERS}"
        )
    prefix = _prefix(path, tensors, targets)
    mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    config = parse_config(own, str(path)) if own else _inferred_config(mine)
    return peft_weights(str(path), config, mine)


def _prefix(file: Path, keys: Collection[str], targets: Collection[str]) -> str:
    """What the keys of this model begin with: "", or a component and a dot."""
    known = set(targets)
    matches: Counter[str] = Counter(
        prefix
        for path in {re.split(r"\.lora_[AB]\.", key)[0] for key in keys}
        for prefix in ("", path.partition(".")[0] + ".")
        if path.removeprefix(prefix) in known
    )
    if len(matches) == 1:
        return next(iter(matches))
    components = sorted(matches or {key.partition(".")[0] for key in keys})
    raise CheckpointError(
        f"{file} must hold one component whose modules are targets of this model, got "
        f"{'several' if matches else 'others'} ({', '.join(components[:5])}); "
        f"{LOAD_WITH_DIFFUSERS if matches else 'attach with targets that cover it'}"
    )


def _inferred_config(tensors: Mapping[str, Tensor]) -> PeftConfig:
    """The config that the shapes tell: alpha = rank everywhere."""
    ranks = {
        key.removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight") and tensor.ndim and len(tensor)
    }
    # The most common rank is the default, so that few paths are matched with patterns.
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = tuple((re.escape(path), rank) for path, rank in ranks.items() if rank != r)
    bias = any(key.endswith(".lora_B.bias") for key in tensors)
    return PeftConfig(r, r, lora_bias=bias, rank_pattern=others, alpha_pattern=others)
