"""Safetensors files from strangers: the header now, the values later and in one read.

The safetensors library checks the header. That takes no memory for values, so that thousands of
files can be open. Values are read into memory of our own and never mapped: whoever writes to a
mapped file changes what was checked, and whoever truncates it ends the process.
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

# 10,000 tensors need 1.2 MB. The library itself would read headers of up to 100 MB.
MAX_HEADER_BYTES = 1 << 23
LENGTH_BYTES = 8  # of the header's length, with which a file begins
ALIGNMENT = 16  # bytes; each packed tensor begins at a multiple
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class FileState(NamedTuple):
    """The numbers by which a file that was changed or replaced is noticed."""

    device: int
    inode: int
    bytes: int
    modified: int  # in nanoseconds


class TensorInfo(NamedTuple):
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]


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


class SafetensorsFile:
    """A safetensors file of floating tensors whose header was read and checked."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: it is no whole safetensors file, or holds other tensors than floats.
        """
        self.path = path
        try:
            self._state = _state(os.stat(path))
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
            with safe_open(path, framework="pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}
                self.tensors = {key: self._info(key, part) for key, part in slices.items()}
                self.metadata: dict[str, str] = tensors.metadata() or {}
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise self._broken(error) from None

    def read(self, pinned: bool = False) -> PackedTensors:
        """Read the values.

        Args:
            pinned: into memory from which a GPU copies without the host.

        Raises:
            CheckpointError: the file is not the one that was opened any more, or does not fit into
                memory.
        """
        try:
            with open(self.path, "rb") as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise CheckpointError(
                        f"{self.path} must be the file that was loaded, got one that has changed "
                        "since; load it again with replace=True"
                    )
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
                places = {key: self._place(key, header[key]) for key in self.tensors}
                size = self._state.bytes - LENGTH_BYTES - length
                data = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                left = data.numpy().data
                while left and (got := file.readinto(left)):
                    left = left[got:]
            if left or any(place.end > size for place in places.values()):
                raise ValueError("less data than its header says")
        # torch raises RuntimeError when there is no memory.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
            raise self._broken(error) from None
        return PackedTensors(data, places)

    def _info(self, key: str, part: Any) -> TensorInfo:
        dtype = part.get_dtype()
        if dtype not in FLOATING:
            raise CheckpointError(f"{self.path}: key {key!r} must be floating, got {dtype}")
        return TensorInfo(FLOATING[dtype], tuple(part.get_shape()))

    def _place(self, key: str, entry: Any) -> TensorPlace:
        """Where the values of a key are, if the header still says what it said before."""
        start, end = entry["data_offsets"]
        place = TensorPlace(*self.tensors[key], start)
        same = FLOATING.get(entry["dtype"]) == place.dtype and entry["shape"] == [*place.shape]
        if not (same and type(start) is int and 0 <= start and place.end == end):
            raise ValueError(f"a header that has changed at key {key!r}")
        return place

    def _broken(self, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(f"{self.path} must be a whole safetensors file, got {error}")


def _state(status: os.stat_result) -> FileState:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("something else than a regular file")
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
