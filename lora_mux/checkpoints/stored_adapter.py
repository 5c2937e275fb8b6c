"""An adapter that is not in the pools: in a file, or packed in the host's memory."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..core import LoraWeights, computed_once, rank_rows
from ..errors import CheckpointError
from ..layers import difference, own_class

ModuleKeys: TypeAlias = Mapping[str, Mapping[str, str]]  # path -> {"A": key, "B": key, ...}

ALIGNMENT = 16  # bytes; each packed tensor begins at a multiple


class TensorPlace(NamedTuple):
    """Where a tensor is among packed ones."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedTensors:
    """Tensors side by side in one stretch of memory, which one copy moves."""

    data: Tensor  # uint8 [bytes]
    places: Mapping[str, TensorPlace]  # by key

    def __getitem__(self, key: str) -> Tensor:
        place = self.places[key]
        held = self.data[place.start : place.end]
        if held.storage_offset() % place.dtype.itemsize:
            held = held.clone()  # the tensors of a file need not be aligned
        return held.view(place.dtype).view(place.shape)

    def to(self, device: torch.device) -> "PackedTensors":
        """The tensors on a device, by one copy."""
        return PackedTensors(self.data.to(device, non_blocking=True), self.places)


def pack(tensors: Mapping[str, Tensor], pinned: bool) -> PackedTensors:
    """Copies of tensors, packed; pinned: in memory from which a GPU copies without the host."""
    places, end = {}, 0
    for key, tensor in tensors.items():
        end += -end % ALIGNMENT
        places[key] = TensorPlace(tensor.dtype, tuple(tensor.shape), end)
        end = places[key].end
    packed = PackedTensors(torch.empty(end, dtype=torch.uint8, pin_memory=pinned), places)
    for key, tensor in tensors.items():
        packed[key].copy_(tensor.detach())
    return packed


@dataclass(frozen=True, eq=False)
class Outline:
    """An adapter without its values: names, shapes and scalings of its factors.

    Adapters of one shape share an outline, so that what follows from it alone is found once. It is
    equal to itself only, and nobody changes it.
    """

    keys: ModuleKeys
    scaling: Mapping[str, float]  # by path
    places: Mapping[str, TensorPlace]  # by key; where the values are, once they were read
    remarks: tuple[str, ...] = ()  # what whoever loads it should know

    def __deepcopy__(self, memo: dict[int, Any]) -> "Outline":
        return self

    @computed_once
    def rank_rows(self) -> dict[str, int]:
        """Path -> the rank rows that the adapter takes there."""
        return {path: rank_rows(part) for path, part in self.shapes().items()}

    def shapes(self) -> dict[str, LoraWeights]:
        """Path -> factors without values, on the meta device."""

        def without_values(key: str) -> Tensor:
            place = self.places[key]
            return torch.empty(place.shape, dtype=place.dtype, device="meta")

        return lora_weights(self.keys, self.scaling, without_values)


@dataclass(frozen=True)
class StoredAdapter:
    """An outline, and how to read the values."""

    source: str  # what error messages call it
    outline: Outline
    # Reads the values, as often as they are needed. True: into pinned memory, from which a GPU
    # copies without the host.
    read: Callable[[bool], PackedTensors]
    # The modules that it saved as a whole, where they differ from the base's, on the host.
    saved: "StoredAdapter | None" = None
    dropout: float = 0.0  # PEFT's lora_dropout, for whoever trains it further

    @property
    def digest(self) -> bytes:
        """Equal for adapters of equal values and a scaling of 1, in 32 bytes."""
        values, made = self.read(False), hashlib.sha256()
        for key, place in values.places.items():
            made.update(repr((key, place.dtype, place.shape)).encode())
            # Not all at once: what is between packed tensors is not theirs.
            made.update(values.data[place.start : place.end].numpy().data)
        return made.digest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredAdapter":
        return self  # nobody changes it, and it may be large

    def shapes(self) -> dict[str, LoraWeights]:
        """Path -> factors without values, on the meta device."""
        return self.outline.shapes()

    def weights(self, values: PackedTensors) -> dict[str, LoraWeights]:
        """Path -> factors, which are views of the values."""
        return lora_weights(self.outline.keys, self.outline.scaling, values.__getitem__)

    def holding(self, weights: Mapping[str, LoraWeights]) -> "StoredAdapter":
        """The same adapter with other factors, path -> factors, which are copied to the host."""
        held = copy_to_host(self.source, weights, False)
        return replace(held, outline=replace(held.outline, remarks=self.outline.remarks))


def lora_weights(
    keys: ModuleKeys, scaling: Mapping[str, float], tensor: Callable[[str], Tensor]
) -> dict[str, LoraWeights]:
    """Path -> factors.

    Args:
        keys: path -> the keys of its factors.
        scaling: path -> scaling.
        tensor: key -> the tensor.
    """
    return {
        path: LoraWeights(
            scaling=scaling[path], **{part: tensor(key) for part, key in parts.items()}
        )
        for path, parts in keys.items()
    }


def copy_to_host(source: str, weights: Mapping[str, LoraWeights], pinned: bool) -> StoredAdapter:
    """A copy of an adapter in the host's memory.

    Args:
        source: what error messages call it.
        weights: path -> factors.
        pinned: copy into memory from which a GPU copies without the host.
    """
    keys: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    for path, part in weights.items():
        given = part.tensors()
        keys[path] = {name: f"{path}.{name}" for name in given}
        tensors |= {keys[path][name]: tensor for name, tensor in given.items()}
    packed = pack(tensors, pinned)
    scaling = {path: part.scaling for path, part in weights.items()}
    outline = Outline(keys, scaling, packed.places)
    return StoredAdapter(source, outline, functools.partial(_held, packed))


def saved_modules(
    source: str, modules: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]]
) -> StoredAdapter | None:
    """The modules that an adapter saved, as what they are more than the base's.

    Args:
        source: what error messages call them.
        modules: path -> the base's module, and the values of its parameters that differ.

    Raises:
        CheckpointError: a module is one whose difference is no sum of low rank.
    """
    weights = {}
    for path, (module, values) in sorted(modules.items()):
        part = difference(module, values)
        if part is None:
            raise CheckpointError(
                f"{source}: the saved module {path!r} must be a linear layer, an embedding or a "
                "convolution without a forward of its own if it differs from the base's, got "
                f"{own_class(module).__name__} with another {', '.join(sorted(values))}; leave it "
                "out of modules_to_save, or merge the adapter into a model of its own"
            )
        weights[path] = part
    return copy_to_host(source, weights, False) if weights else None


def _held(packed: PackedTensors, pinned: bool) -> PackedTensors:
    return packed
