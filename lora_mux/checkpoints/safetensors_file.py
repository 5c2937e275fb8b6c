"""Safetensors files from strangers: the header now, the values later, and only those needed.

The header is parsed here, from bytes that were read: the safetensors library maps the file to do
that. Everything that the format leaves open is refused: a key twice, other fields, empty tensors.

Format: 8 bytes, the length of a JSON object; the object, key -> dtype, shape and data_offsets; and
the values, side by side without holes. What is written has them in the library's order.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..core import is_finite
from ..errors import CheckpointError
from .opened_folder import FileState, OpenedFile, OpenedFolder, open_folder
from .stored_adapter import Outline, PackedTensors, StoredAdapter, TensorPlace

# 10,000 tensors need 1.2 MB.
MAX_HEADER_BYTES = 1 << 23
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 256  # real ones have about 100
MAX_DIMENSIONS = 8
MAX_DIGITS = 18  # of a number: less than 2^63
LENGTH_BYTES = 8  # of the header's length, with which a file begins
FLOATING = {  # in the order in which the library writes them
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Header(NamedTuple):
    """What a header says."""

    places: dict[str, TensorPlace]  # by key; where they are in the file
    metadata: dict[str, str]


class Fingerprint(NamedTuple):
    """A header, and how many bytes follow it, in little memory."""

    digest: bytes
    header_bytes: int
    file_bytes: int


@dataclass(frozen=True, eq=False)
class FileOutline(Outline):
    """An outline and what it takes to read the values of such a file."""

    fingerprint: Fingerprint = field(kw_only=True)
    # The first byte and the one after the last of each stretch that is needed.
    runs: tuple[tuple[int, int], ...] = field(kw_only=True)
    # Parameters of the base model that the file has a copy of, and where in it.
    copies: Mapping[str, TensorPlace] = field(kw_only=True)


# Outlines in use, by what they were made from, so that adapters of one shape share one.
_OUTLINES: WeakValueDictionary[Hashable, FileOutline] = WeakValueDictionary()


def read_header(file: OpenedFile) -> bytes:
    """A file up to its values, unparsed.

    Raises:
        CheckpointError: the file is shorter than it says, or its header too long.
    """
    if file.state.bytes < LENGTH_BYTES:
        raise _broken(file.path, f"{file.state.bytes} bytes")
    length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    most = min(MAX_HEADER_BYTES, file.state.bytes - LENGTH_BYTES)
    if length > most:
        raise _broken(file.path, f"a header of {length} bytes, more than {most}")
    return file.read(0, LENGTH_BYTES + length)


def parse_header(source: str, header: bytes, file_bytes: int) -> Header:
    """The meaning of a header.

    Args:
        source: what error messages call the file.
        header: what `read_header` returned.
        file_bytes: the size of the whole file.

    Raises:
        CheckpointError: it is none, does not cover the file exactly, or has tensors that are not
            floating.
    """
    try:
        return _parse(header, file_bytes)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _broken(source, str(error)[:200]) from None


def file_outline(
    fingerprint: Fingerprint,
    keys: Mapping[str, Mapping[str, str]],
    scaling: Mapping[str, float],
    places: Mapping[str, TensorPlace],
    copies: Mapping[str, str],
    remarks: Iterable[str] = (),
) -> FileOutline:
    """The outline of an adapter in a file.

    Args:
        keys: path -> {"A": key, ...}.
        scaling: by path.
        places: the tensors of all these keys, where they are in the file.
        copies: parameter of the base model -> the key of its copy.
    """
    packed: dict[str, TensorPlace] = {}
    runs: list[tuple[int, int]] = []
    end = 0
    wanted = (key for parts in keys.values() for key in parts.values())
    for key in sorted(wanted, key=lambda key: places[key].start):
        place = places[key]
        packed[key] = place._replace(start=end)
        end = packed[key].end
        start = runs.pop()[0] if runs and runs[-1][1] == place.start else place.start
        runs.append((start, place.end))
    return FileOutline(
        keys,
        scaling,
        packed,
        tuple(remarks),
        fingerprint=fingerprint,
        runs=tuple(runs),
        copies={name: places[key] for name, key in copies.items()},
    )


def shared_outline(
    file: OpenedFile,
    header: bytes,
    meaning: Hashable,
    make: Callable[[Fingerprint], FileOutline],
) -> FileOutline:
    """The outline of an adapter in a file, which adapters of one shape share.

    Args:
        header: what `read_header` returned.
        meaning: what the outline depends on beside the header.
        make: makes the outline, if no other adapter has the same.
    """
    digest = hashlib.sha256(header).digest()
    fingerprint = Fingerprint(digest, len(header), file.state.bytes)
    shared = _OUTLINES.get((fingerprint, meaning))
    if shared is None:
        shared = _OUTLINES.setdefault((fingerprint, meaning), make(fingerprint))
    return shared


def adapter_in_file(
    folder: OpenedFolder, file: OpenedFile, name: str, outline: FileOutline
) -> StoredAdapter:
    """An adapter in a file of this name, whose values are read when they are needed."""
    read = partial(_read_values, folder.absolute, name, file.state, outline)
    return StoredAdapter(folder.path, outline, read)


def read_tensor(file: OpenedFile, place: TensorPlace) -> Tensor:
    """The values of one tensor of an open file."""
    data = _allocate(file.path, place.end - place.start, False)
    file.read_into(place.start, data.numpy().data)
    return PackedTensors(data, {"it": place._replace(start=0)})["it"]


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a file as the safetensors library does for PEFT, byte for byte.

    Args:
        tensors: key -> a tensor of a dtype in FLOATING, on any device.
    """
    names = {dtype: name for name, dtype in FLOATING.items()}
    order = [*names]
    keys = sorted(tensors, key=lambda key: (order.index(tensors[key].dtype), key))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + tensors[key].nbytes
        entries[key] = {
            "dtype": names[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)  # so that the values are aligned
    file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
    for key in keys:
        values = tensors[key].detach().cpu().contiguous()
        file.write(values.flatten().view(torch.uint8).numpy().data)


def _read_values(
    folder: str, name: str, state: FileState, outline: FileOutline, pinned: bool
) -> PackedTensors:
    """The values of an adapter, if its file is the one that was looked at."""
    with open_folder(folder) as opened:
        file = opened.open(name)
        fingerprint = outline.fingerprint
        if file.state != state or fingerprint.digest != _digest(file, fingerprint.header_bytes):
            raise CheckpointError(
                f"{file.path} must be the file that was loaded, got one that has changed since; "
                "load it again with replace=True"
            )
        data = _allocate(file.path, sum(end - start for start, end in outline.runs), pinned)
        left = data.numpy().data
        for start, end in outline.runs:
            file.read_into(start, left[: end - start])
            left = left[end - start :]
    values = PackedTensors(data, outline.places)
    for key in values.places:
        check_finite(file.path, key, values[key])
    return values


def check_finite(source: str, key: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity."""
    if not is_finite(tensor, tensor.dtype):
        raise CheckpointError(f"{source}: key {key!r:.100} must be finite, got NaN or infinity")


def _digest(file: OpenedFile, size: int) -> bytes:
    return hashlib.sha256(file.read(0, size)).digest()


def _allocate(source: str, size: int, pinned: bool) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except (RuntimeError, MemoryError) as error:  # torch raises the first
        raise CheckpointError(
            f"{source}: {size} bytes must fit into memory, got {str(error)[:100]}"
        ) from None


def _parse(header: bytes, file_bytes: int) -> Header:
    text = header[LENGTH_BYTES:].decode()
    if not text.startswith("{"):
        raise ValueError("a header that is no JSON object")
    entries = json.loads(
        text,
        object_pairs_hook=_unique,
        parse_int=_natural,
        parse_float=_no_number,
        parse_constant=_no_number,
    )
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise ValueError("metadata that is no object of strings")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, more than {MAX_TENSORS}")
    places = {key: _place(key, entry, len(header)) for key, entry in entries.items()}
    end = len(header)
    for key, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start != end:
            raise ValueError(f"key {key!r:.100}, which does not begin where the one before ends")
        end = place.end
    if end != file_bytes:
        raise ValueError(f"{file_bytes} bytes, where its header says {end}")
    return Header(places, metadata)


def _place(key: str, entry: Any, begin: int) -> TensorPlace:
    """Where the tensor of one entry is in the file, whose values begin at `begin`."""
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"key {key!r:.100} of more than {MAX_KEY_BYTES} bytes")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
            numbers = *shape, start, end
        case _:
            numbers = (None,)
    if not all(type(number) is int for number in numbers) or len(entry) != 3:
        raise ValueError(f"key {key!r:.100} without dtype, shape and data_offsets alone")
    if dtype not in FLOATING:
        raise ValueError(f"key {key!r:.100}, which must be floating, of {dtype!r:.20}")
    if len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise ValueError(f"key {key!r:.100}, whose shape is {str(shape)[:100]}")
    place = TensorPlace(FLOATING[dtype], tuple(shape), begin + start)
    if place.end != begin + end:
        raise ValueError(
            f"key {key!r:.100}, whose shape {shape} takes {place.end - place.start} bytes, with "
            f"{end - start}"
        )
    return place


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a header that has a key twice")
    return made


def _natural(digits: str) -> int:
    if not digits.isdecimal() or len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {digits:.30}")
    return int(digits)


def _no_number(text: str) -> None:
    raise ValueError(f"the number {text:.30}")


def _broken(source: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{source} must be a whole safetensors file of floating tensors, got {got}"
    )
