"""An adapter where it is not in the pools: in a file, or packed in the host's memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..core import LoraWeights
from .safetensors_file import Block, Entry, pack


@dataclass(frozen=True)
class Stored:
    """What an adapter's factors look like, and how to read them, as often as it takes."""

    source: str  # what error messages call it
    keys: Mapping[str, Mapping[str, str]]  # path -> {"A": key, "B": key, "bias": key}
    scaling: Mapping[str, float]  # of each path
    entries: Mapping[str, Entry]  # of each key
    read: Callable[[bool], Block]  # True: into memory from which a GPU copies by itself

    def shapes(self) -> dict[str, LoraWeights]:
        """path -> factors without values, on the meta device."""

        def shape(key: str) -> torch.Tensor:
            dtype, shape = self.entries[key]
            return torch.empty(shape, dtype=dtype, device="meta")

        return self._weights(shape)

    def weights(self, block: Block) -> dict[str, LoraWeights]:
        """path -> factors, which lie in the block."""
        return self._weights(block.__getitem__)

    def _weights(self, tensor: Callable[[str], torch.Tensor]) -> dict[str, LoraWeights]:
        return {
            path: LoraWeights(
                scaling=self.scaling[path], **{part: tensor(key) for part, key in keys.items()}
            )
            for path, keys in self.keys.items()
        }


def kept(source: str, weights: Mapping[str, LoraWeights], pinned: bool) -> Stored:
    """A copy of an adapter in the host's memory."""
    keys: dict[str, dict[str, str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, part in weights.items():
        given = {"A": part.A, "B": part.B} | ({} if part.bias is None else {"bias": part.bias})
        keys[path] = {name: f"{path}.{name}" for name in given}
        tensors |= {keys[path][name]: tensor for name, tensor in given.items()}
    block = pack(tensors, pinned)
    entries = {key: Entry(place.dtype, place.shape) for key, place in block.places.items()}
    scaling = {path: part.scaling for path, part in weights.items()}
    return Stored(source, keys, scaling, entries, lambda pinned: block)
