"""A LoRA file of diffusers: adapters of one or more models of a pipeline, and maybe their configs.

    <component>.<path>.lora_A.weight      of pipe.save_lora_weights (transformer, unet, ...)
    <path>.lora_A.weight                  of model.save_lora_adapter

DoRA's magnitudes are <path>.lora_magnitude_vector, as in PEFT's files.

The file's metadata may hold a LoraConfig as JSON, whose fields are named like the keys. If it does
not, alpha = rank, as in diffusers itself, so that scaling = 1.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, TypeVar

from ..configs import PeftConfig, Strength, parse_config, parse_fields
from ..errors import CheckpointError
from .base_model import BaseModel
from .opened_folder import CONFIG_FILE, DIFFUSERS_FILE, open_folder
from .peft_folder import peft_outline
from .safetensors_file import (
    FileOutline,
    Fingerprint,
    Header,
    adapter_in_file,
    parse_header,
    read_header,
    shared_outline,
)
from .stored_adapter import StoredAdapter, TensorPlace

METADATA = "lora_adapter_metadata"
PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector")  # of a key
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


def read_diffusers_file(
    folder: str | PathLike[str], base: BaseModel, component: str | None = None
) -> StoredAdapter:
    """Read the header, of which the component counts whose modules are targets.

    Args:
        base: the model that it is for.
        component: the name of the component, where several fit.

    Raises:
        CheckpointError: names the file and the entry that is broken, belongs to another model, is
            in another of the many formats that diffusers reads, or is more than LoRA or DoRA on
            linear layers. Reading the values later raises it if they are not finite, or if the
            file has changed.
        AdapterError: DoRA on a layer whose weight cannot be read here.
    """
    with open_folder(fspath(folder)) as opened:
        file = opened.open(DIFFUSERS_FILE)
        header = read_header(file)

    def make(fingerprint: Fingerprint) -> FileOutline:
        parsed = parse_header(file.path, header, file.state.bytes)
        return _outline(file.path, parsed, fingerprint, base, component)

    outline = shared_outline(file, header, (base.meaning, component), make)
    return base.with_gains(adapter_in_file(opened, file, DIFFUSERS_FILE, outline))


def _outline(
    source: str,
    header: Header,
    fingerprint: Fingerprint,
    base: BaseModel,
    component: str | None,
) -> FileOutline:
    fields = _fields(source, header.metadata)
    other = next((k for k in header.places if not any(part in k for part in PARTS)), None)
    if other is not None:
        raise CheckpointError(
            f"{source}: key {other!r} must be of lora_A or lora_B, got another format; "
            f"{LOAD_WITH_DIFFUSERS}"
        )
    prefix = _prefix(source, header.places, base, component)
    places, own = _below(prefix, header.places), _below(prefix, fields)
    config = parse_config(own, source) if own else _inferred_config(places, base)
    return peft_outline(source, config, fingerprint, places, base)


def _fields(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configs in the metadata of a file."""
    return parse_fields(metadata.get(METADATA, "{}"), f"{source}: `{METADATA}`")


def _below(prefix: str, entries: Mapping[str, Value]) -> dict[str, Value]:
    """The entries whose keys begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _prefix(
    source: str, places: Mapping[str, TensorPlace], base: BaseModel, component: str | None
) -> str:
    """What the keys of this model begin with: "", or a component and a dot."""
    components = sorted({key.partition(".")[0] for key in places})
    if component is not None:
        if component in components:
            return f"{component}."
        raise CheckpointError(
            f"{source}: `component` must be one of the file's, got {component!r:.100}; it has "
            f"{_some(components)}"
        )
    matches: set[str] = set()
    fitting: dict[str, bool] = {}  # by prefix, of those that match
    for key, place in places.items():
        path, _, part = base.renamed(key).partition(".lora_")
        for prefix in {"", path.partition(".")[0] + "."}:
            target = base.path(path.removeprefix(prefix))
            if path.startswith(prefix) and target in base.targets:
                matches.add(prefix)
                if part == "A.weight":
                    fitting[prefix] = fitting.get(prefix, True) and base.fits(target, place.shape)
    # Where several match by name, as SDXL's text encoders do, their sizes tell them apart.
    found = matches if len(matches) < 2 else {p for p in matches if fitting.get(p)}
    if len(found) == 1:
        return found.pop()
    if matches:
        names = sorted(prefix.removesuffix(".") for prefix in matches)
        raise CheckpointError(
            f"{source} must hold one component whose modules are targets of this model, got "
            f"several ({_some(names)}); say which one by component="
        )
    raise CheckpointError(
        f"{source} must hold one component whose modules are targets of this model, got others "
        f"({_some(components)}); attach with targets that cover it"
    )


def _some(names: list[str]) -> str:
    return ", ".join(f"{name:.40}" for name in names[:5])


def _inferred_config(places: Mapping[str, TensorPlace], base: BaseModel) -> PeftConfig:
    """The config that the shapes tell: alpha = rank everywhere."""
    ranks = {
        base.path(name.removesuffix(".lora_A.weight")): place.shape[0]
        for name, place in ((base.renamed(key), place) for key, place in places.items())
        if name.endswith(".lora_A.weight") and place.shape
    }
    bias = any(key.endswith(".lora_B.bias") for key in places)
    dora = any(".lora_magnitude_vector" in key for key in places)
    return _InferredConfig(lora_bias=bias, use_dora=dora, ranks=ranks)
