"""A LoRA file of diffusers: adapters of one or more models of a pipeline, and maybe their configs.

    <component>.<path>.lora_A.weight      of pipe.save_lora_weights (transformer, unet, ...)
    <path>.lora_A.weight                  of model.save_lora_adapter

The file's metadata may hold a LoraConfig as JSON, whose fields are named like the keys. If it does
not, alpha = rank, as in diffusers itself, so that scaling = 1.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, TypeVar

from ..errors import CheckpointError
from .opened_folder import open_folder
from .peft_config import PeftConfig, Strength, parse_config, parse_fields
from .peft_folder import CONFIG_FILE, peft_outline
from .safetensors_file import (
    FileOutline,
    Fingerprint,
    Header,
    adapter_in_file,
    parse_header,
    read_header,
)
from .stored_adapter import StoredAdapter, TensorPlace

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
LOAD_WITH_DIFFUSERS = "load it with diffusers (pipe.load_lora_weights) and use attach_peft"

Value = TypeVar("Value")


@dataclass(frozen=True)
class _InferredConfig(PeftConfig):
    ranks: Mapping[str, int] = field(default_factory=dict)  # by path

    def strengths(self, paths: Collection[str]) -> dict[str, Strength]:
        return {path: Strength(self.ranks[path], 1.0) for path in paths}


def is_diffusers_folder(folder: str | PathLike[str]) -> bool:
    """Whether a folder holds diffusers' file. If it has PEFT's files as well, those count."""
    return os.path.lexists(os.path.join(folder, DIFFUSERS_FILE)) and not os.path.lexists(
        os.path.join(folder, CONFIG_FILE)
    )


def read_diffusers_file(folder: str | PathLike[str], targets: Sequence[str]) -> StoredAdapter:
    """Read the header, of which the component counts whose modules are targets.

    Raises:
        CheckpointError: names the file and the entry that is broken, belongs to another model, is
            in another of the many formats that diffusers reads, or is more than plain LoRA on
            linear layers. Reading the values later raises it if they are not finite, or if the
            file has changed.
    """
    with open_folder(fspath(folder)) as opened:
        file = opened.open(DIFFUSERS_FILE)
        header = read_header(file)

    def outline(fingerprint: Fingerprint) -> FileOutline:
        parsed = parse_header(file.path, header, file.state.bytes)
        return _outline(file.path, parsed, fingerprint, targets)

    return adapter_in_file(opened, file, DIFFUSERS_FILE, header, tuple(targets), outline)


def _outline(
    source: str, header: Header, fingerprint: Fingerprint, targets: Sequence[str]
) -> FileOutline:
    fields = _fields(source, header.metadata)
    other = next((k for k in header.places if ".lora_A." not in k and ".lora_B." not in k), None)
    if other is not None:
        raise CheckpointError(
            f"{source}: key {other!r} must be of lora_A or lora_B, got another format; "
            f"{LOAD_WITH_DIFFUSERS}"
        )
    prefix = _prefix(source, header.places, targets)
    places, own = _below(prefix, header.places), _below(prefix, fields)
    config = parse_config(own, source) if own else _inferred_config(places)
    return peft_outline(source, config, fingerprint, places)


def _fields(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configs in the metadata of a file."""
    return parse_fields(metadata.get(METADATA, "{}"), f"{source}: `{METADATA}`")


def _below(prefix: str, entries: Mapping[str, Value]) -> dict[str, Value]:
    """The entries whose keys begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _prefix(source: str, keys: Collection[str], targets: Collection[str]) -> str:
    """What the keys of this model begin with: "", or a component and a dot."""
    known = set(targets)
    matches: Counter[str] = Counter(
        prefix
        for path in {re.split(r"\.lora_[AB]\.", key)[0] for key in keys}
        for prefix in ("", path.partition(".")[0] + ".")
        if path.startswith(prefix) and path.removeprefix(prefix) in known
    )
    if len(matches) == 1:
        return next(iter(matches))
    components = sorted(matches or {key.partition(".")[0] for key in keys})
    some = ", ".join(f"{component:.40}" for component in components[:5])
    raise CheckpointError(
        f"{source} must hold one component whose modules are targets of this model, got "
        f"{'several' if matches else 'others'} ({some}); "
        f"{LOAD_WITH_DIFFUSERS if matches else 'attach with targets that cover it'}"
    )


def _inferred_config(places: Mapping[str, TensorPlace]) -> PeftConfig:
    """The config that the shapes tell: alpha = rank everywhere."""
    ranks = {
        key.removesuffix(".lora_A.weight"): place.shape[0]
        for key, place in places.items()
        if key.endswith(".lora_A.weight") and place.shape
    }
    bias = any(key.endswith(".lora_B.bias") for key in places)
    return _InferredConfig(lora_bias=bias, ranks=ranks)
