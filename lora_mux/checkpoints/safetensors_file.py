"""Safetensors files of strangers: the header now, the values later and all in one read.

The header is checked by the safetensors library and costs no memory for values, so that thousands
of files can be opened. Values are read into memory of our own, for a mapping of the file would let
who writes to it change what was checked, and who truncates it end the process.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

# Of 10,000 tensors it has 1.2 MB; the library itself reads headers of up to 100 MB.
MAX_HEADER_BYTES = 1 << 23
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Entry(NamedTuple):
    """A tensor of a file, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Place(NamedTuple):
    """A tensor in a block."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte


@dataclass(frozen=True)
class Block:
    """Tensors side by side in one stretch of memory, which one copy moves."""

    data: Tensor  # uint8 [bytes]
    places: Mapping[str, Place]

    def __getitem__(self, key: str) -> Tensor:
        dtype, shape, start = self.places[key]
        held = self.data[start : start + math.prod(shape) * dtype.itemsize]
        if (held.storage_offset() % dtype.itemsize) != 0:
            held = held.clone()  # a file need not be aligned
        return held.view(dtype).view(shape)

    def to(self, device: torch.device) -> "Block":
        return Block(self.data.to(device, non_blocking=True), self.places)


def pack(tensors: Mapping[str, Tensor], pinned: bool) -> Block:
    """A block of copies of tensors."""
    places, end = {}, 0
    for key, tensor in tensors.items():
        end += -end % 16
        places[key] = Place(tensor.dtype, tuple(tensor.shape), end)
        end += tensor.numel() * tensor.element_size()
    block = Block(torch.empty(end, dtype=torch.uint8, pin_memory=pinned), places)
    for key, tensor in tensors.items():
        block[key].copy_(tensor.detach())
    return block


class TensorFile:
    """A safetensors file of floating tensors whose header was read and checked."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: no whole safetensors file, or one that holds other than floats.
        """
        self.path = path
        try:
            self._state = _state(os.stat(path))
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if header > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header} bytes, more than {MAX_HEADER_BYTES}")
            with safe_open(path, framework="pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}
                self.entries = {key: self._entry(key, part) for key, part in slices.items()}
                self.metadata: dict[str, str] = tensors.metadata() or {}
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise self._broken(error) from None

    def read(self, pinned: bool = False) -> Block:
        """The values.

        Args:
            pinned: into memory from which a GPU copies by itself.

        Raises:
            CheckpointError: not the file any more that it was when it was opened, or no memory.
        """
        try:
            with open(self.path, "rb") as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise CheckpointError(
                        f"{self.path} must stay as it was when it was loaded, which it did not; "
                        "load it again with replace=True"
                    )
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
                places = {key: self._place(key, header[key]) for key in self.entries}
                size = self._state[2] - 8 - length
                data = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                left = data.numpy().data
                while left and (got := file.readinto(left)):
                    left = left[got:]
            if left or any(place.start + _bytes(place) > size for place in places.values()):
                raise ValueError("less data than its header says")
        # RuntimeError is torch's when there is no memory.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._broken(error) from None
        return Block(data, places)

    def _entry(self, key: str, part: Any) -> Entry:
        dtype = part.get_dtype()
        if dtype not in FLOATING:
            raise CheckpointError(f"{self.path}: key {key!r} must be floating, got {dtype}")
        return Entry(FLOATING[dtype], tuple(part.get_shape()))

    def _place(self, key: str, said: Any) -> Place:
        start, end = said["data_offsets"]
        place = Place(*self.entries[key], start)
        same = FLOATING.get(said["dtype"]) == place.dtype and said["shape"] == [*place.shape]
        if not (same and type(start) is int and 0 <= start and start + _bytes(place) == end):
            raise ValueError(f"another header than before, at key {key!r}")
        return place

    def _broken(self, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(f"{self.path} must be a whole safetensors file, got {error}")


def _bytes(place: Place) -> int:
    return math.prod(place.shape) * place.dtype.itemsize


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from the one that it was."""
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("a checkpoint must hold regular files")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
