"""The parser of headers, against the safetensors library: on good files and on broken ones."""

import json
import math
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load

import lora_mux
from lora_mux.checkpoints import safetensors_file
from lora_mux.checkpoints.opened_folder import open_folder
from lora_mux.checkpoints.safetensors_file import FLOATING, Header, parse_header, read_header
from lora_mux.errors import CheckpointError
from tenants import Model, tenant

FILE = "adapter_model.safetensors"
# What the library takes and we refuse, by words of our messages.
STRICTER = {
    "a key twice": "the format forbids it; the library takes the last one",
    "no JSON object": "the format forbids spaces before it",
    "shape and data_offsets alone": "other fields, and entries that are lists",
    "the number": "of a field that the library does not know",
    "must be floating": "integers",
    "whose shape is": "tensors without elements",
}


def join(header: bytes, values: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + values


def parse(folder: Path, content: bytes) -> Header:
    (folder / FILE).write_bytes(content)
    with open_folder(str(folder)) as opened:
        file = opened.open(FILE)
        header = read_header(file)
    return parse_header(file.path, header, file.state.bytes)


class Files:
    """Good files, and the same ones damaged."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def good(self) -> tuple[dict[str, Any], bytes]:
        """A header and the values, whose order need not be the header's."""
        draw = self.draw
        header: dict[str, Any] = {}
        keys = [f"{draw.choice('abé')}{i}.lora_{draw.choice('AB')}.weight" for i in range(5)]
        end = 0
        for key in keys[: draw.randrange(1, 6)]:
            dtype = draw.choice([*FLOATING, "F32", "F32"])
            shape = [draw.randrange(1, 5) for _ in range(draw.randrange(4))]
            size = math.prod(shape) * FLOATING[dtype].itemsize
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        if draw.random() < 0.5:
            header["__metadata__"] = {"format": "pt", "ü": "\n"}
        mixed = draw.sample(list(header.items()), len(header))
        return dict(mixed), draw.randbytes(end)

    def damaged(self) -> bytes:
        draw = self.draw
        header, values = self.good()
        way = draw.choice([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
        if way == 0:
            self._change(header)
        elif way == 7:
            header["none"] = {"dtype": "F32", "shape": [draw.randrange(2), 3]}
            header["none"]["data_offsets"] = [0, 0]
        elif way == 8 and len(header) > 1:  # a hole, or values behind the last tensor
            del header[draw.choice(list(header))]
        text = json.dumps(header, ensure_ascii=draw.random() < 0.5).encode()
        if way == 1:  # a bit
            at = draw.randrange(len(text))
            text = text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :]
        elif way == 2:  # a character in place of another
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice([b"9", b"-", b" ", b"}", b'"', b"e5"]) + text[at + 1 :]
        elif way == 3:
            values = values[:-1] if draw.random() < 0.5 else values + b"\0"
        elif way == 4:
            text = draw.choice([text + b"  ", text + b"\n", b" " + text, text + b"}", text + b"\0"])
        elif way == 5:  # a key twice
            key = draw.choice(list(header))
            text = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}".encode()
        elif way == 6:
            length = draw.choice([0, 1, 7, len(text) - 1, len(text) + 1, 1 << 40, 2**64 - 1])
            return join(text, values, length)
        return join(text, values)

    def _change(self, header: dict[str, Any]) -> None:
        draw = self.draw
        key = draw.choice(list(header))
        numbers = [0, 1, -1, 2, 3, 1 << 40, 1 << 63, 1 << 64, 2.0, True, None, "1", [], [1]]
        field = draw.choice(["dtype", "shape", "data_offsets", "more", "gone", "whole"])
        entry = header[key]
        if field == "whole":
            header[key] = draw.choice([*numbers, {}, {"x": 1}, ["F32", [1], [0, 4]]])
        elif field == "more":
            entry["more"] = draw.choice([*numbers, "text"])
        elif field == "gone":
            entry.pop(draw.choice(list(entry)))
        elif field == "dtype":
            entry["dtype"] = draw.choice(["I32", "BOOL", "F8_E8M0", "f32", "Q", 1, None, [], {}])
        elif isinstance(entry.get(field), list) and entry[field] and draw.random() < 0.8:
            entry[field][draw.randrange(len(entry[field]))] = draw.choice(numbers)
        else:
            entry[field] = draw.choice([*numbers, [0, 0], [1, 0], [4, 8]])


def same_as_the_library(folder: Path, content: bytes) -> str:
    """Compare one file; says what came out."""
    try:
        theirs: dict[str, torch.Tensor] | None = load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, OverflowError, RuntimeError):
        theirs = None  # the last ones are of the part that is in Python, about dtypes
    try:
        ours = parse(folder, content)
    except CheckpointError as error:
        assert FILE in str(error) and len(str(error)) < 600 + len(str(folder))
        if theirs is None:
            return "both refuse"
        whys = [why for why in STRICTER if why in str(error)]
        assert whys, f"the library takes what we refuse: {error}"
        return whys[0]
    assert theirs is not None and theirs.keys() == ours.places.keys()
    for key, place in ours.places.items():
        assert (place.dtype, place.shape) == (theirs[key].dtype, tuple(theirs[key].shape))
        values = theirs[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert content[place.start : place.end] == values
    return "both take it"


def test_good_files(tmp_path: Path) -> None:
    files = Files(seed=1)
    for _ in range(300):
        header, values = files.good()
        content = join(json.dumps(header).encode(), values)
        if header.keys() == {"__metadata__"}:
            continue
        assert same_as_the_library(tmp_path, content) == "both take it"


@pytest.mark.parametrize(
    "inputs", [1500, pytest.param(40_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damaged_files(inputs: int, tmp_path: Path) -> None:
    files = Files(seed=inputs)
    outcomes = Counter(same_as_the_library(tmp_path, files.damaged()) for _ in range(inputs))
    assert outcomes["both refuse"] > inputs // 4 and outcomes["both take it"] > inputs // 20
    assert outcomes.keys() >= STRICTER.keys()


def entry(shape: list[int], start: int = 0, dtype: str = "F32") -> dict[str, Any]:
    size = math.prod(shape) * 4
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def many_tensors() -> bytes:
    entries = {str(i): entry([1], 4 * i) for i in range(safetensors_file.MAX_TENSORS + 1)}
    return json.dumps(entries).encode()


TOO_MUCH: dict[str, tuple[bytes, str]] = {
    "digits": (b'{"a": ' + b"9" * 5_000_000 + b"}", "the number 999"),
    "digits of a float": (b'{"a": 0.' + b"9" * 5_000_000 + b"}", "the number 0.999"),
    "infinity": (b'{"a": Infinity}', "the number Infinity"),
    "brackets": (b'{"a": ' + b"[" * 4_000_000, "recursion"),
    "a long key": (json.dumps({"a" * 300: entry([1])}).encode(), "more than 256 bytes"),
    "half a character": (json.dumps({"\ud800": entry([1])}).encode(), "surrogates not allowed"),
    "dimensions": (json.dumps({"a": entry([1] * 100_000)}).encode(), "whose shape is"),
    "tensors": (many_tensors(), "65537 tensors, more than 65536"),
    "metadata": (json.dumps({"__metadata__": {"a": ["b"]}}).encode(), "object of strings"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_budgets(what: str, tmp_path: Path) -> None:
    """Whatever a header says, it takes seconds at most, and an error of a few lines."""
    header, match = TOO_MUCH[what]
    start = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        parse(tmp_path, join(header, bytes(4)))
    assert time.process_time() - start < 4
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_the_rank_of_a_sparse_file(tmp_path: Path) -> None:
    """It costs its owner no disk, and us no memory: no layer justifies such a rank."""
    mux = lora_mux.attach(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    for rank, match in ((10**9, "a rank of at most 8192, got 1000000000"), (8192, "finite")):
        begin, size = 4 * 8 * rank, 4 * 12 * rank
        header = {"0.lora_A.weight": entry([rank, 8]), "0.lora_B.weight": entry([4, rank], begin)}
        config = {"peft_type": "LORA", "r": rank, "target_modules": ["0"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with open(tmp_path / FILE, "wb") as file:
            file.write(content := join(json.dumps(header).encode(), b""))
            file.truncate(len(content) + size)
            file.seek(-4, 2)
            file.write(struct.pack("<f", math.nan))
        before = peak_bytes()
        with pytest.raises(CheckpointError, match=match):
            mux.load("a", tmp_path)
        assert peak_bytes() - before < 64 << 20


def peak_bytes() -> int:
    resource = pytest.importorskip("resource")
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def test_values_for_which_there_is_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, mux = tenant(tmp_path / "a", {"first": 4}, 0), lora_mux.attach(Model())
    empty = torch.empty

    def full(*size: Any, pin_memory: bool | None = None, **how: Any) -> torch.Tensor:
        if pin_memory is None:  # not for a file
            return empty(*size, **how)
        raise RuntimeError("not enough memory: you tried to allocate so many")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(CheckpointError, match="352 bytes must fit into memory, got not enough"):
            mux.load("a", made.folder)
    assert not mux.adapters
    mux.load("a", made.folder)
