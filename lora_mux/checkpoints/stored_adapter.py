"""An adapter that is not in the pools: in a file, or packed in the host's memory."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import LoraWeights
from .safetensors_file import PackedTensors, TensorInfo, pack

ModuleKeys: TypeAlias = Mapping[str, Mapping[str, str]]  # path -> {"A": key, "B": key, "bias": key}


@dataclass(frozen=True)
class StoredAdapter:
    """The names, shapes and scalings of an adapter's factors, and how to read their values."""

    source: str  # what error messages call it
    keys: ModuleKeys
    scaling: Mapping[str, float]  # by path
    tensors: Mapping[str, TensorInfo]  # by key
    # Reads the values, as often as they are needed. True: into pinned memory, from which a GPU
    # copies without the host.
    read: Callable[[bool], PackedTensors]

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredAdapter":
        return self  # nobody changes it, and it may be large

    def shapes(self) -> dict[str, LoraWeights]:
        """Path -> factors without values, on the meta device."""

        def without_values(key: str) -> Tensor:
            dtype, shape = self.tensors[key]
            return torch.empty(shape, dtype=dtype, device="meta")

        return lora_weights(self.keys, self.scaling, without_values)

    def weights(self, values: PackedTensors) -> dict[str, LoraWeights]:
        """Path -> factors, which are views of the values."""
        return lora_weights(self.keys, self.scaling, values.__getitem__)


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
        given = {"A": part.A, "B": part.B} | ({} if part.bias is None else {"bias": part.bias})
        keys[path] = {name: f"{path}.{name}" for name in given}
        tensors |= {keys[path][name]: tensor for name, tensor in given.items()}
    packed = pack(tensors, pinned)
    infos = {key: TensorInfo(place.dtype, place.shape) for key, place in packed.places.items()}
    scaling = {path: part.scaling for path, part in weights.items()}
    return StoredAdapter(source, keys, scaling, infos, functools.partial(_held, packed))


def _held(packed: PackedTensors, pinned: bool) -> PackedTensors:
    return packed
