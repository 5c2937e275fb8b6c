"""What a GPU's side stream is asked to do, by one that only takes notes: no CUDA here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_mux.checkpoints import PackedTensors
from lora_mux.core.pool import Pool
from lora_mux.core.slots import Slots
from tenants import attached, tenant


class Notes:
    """A stream that notes its calls, and what is written to pools and tables inside of it."""

    made: list["Notes"] = []

    def __init__(self, device: torch.device) -> None:
        self.calls: list[Any] = []
        self.depth = 0
        Notes.made.append(self)

    def to_device(self, values: PackedTensors) -> PackedTensors:
        assert not self.depth, "it would wait for what the current stream was given"
        self.calls.append("to_device")
        return values

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def mark(self) -> Any:
        self.calls.append("mark")
        return len(self.calls)

    def wait(self, mark: Any) -> None:
        self.calls.append(("wait", mark))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Notes]]:
    monkeypatch.setattr("lora_mux.adapters.bounded.CopyStream", Notes)
    Notes.made.clear()

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(self: Any, *arguments: Any) -> Any:
            for stream in Notes.made:
                assert stream.depth, f"{name} outside of the stream"
                stream.calls.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((Pool, "write"), (Pool, "slide"), (Pool, "erase"), (Slots, "_write")):
        watch(owner, name)
    yield Notes.made


def test_one_copy_each_and_waiting_for_those_only(tmp_path: Path, notes: list[Notes]) -> None:
    _, mux = attached(8)
    for i, name in enumerate("abc"):
        folder = tenant(tmp_path / name, {"first": 4, "second": 4}, i).folder
        mux.load(name, folder)
    mux.prefetch(["a"])
    (stream,) = notes
    came = ["to_device", "write", "write", "_write", "mark"]  # two pools, then the table of handles
    assert stream.calls == [*came, ("wait", 5)]
    stream.calls.clear()
    with mux.route(["b"]):
        assert stream.calls[:5] == came and stream.calls[5:] == [("wait", 5)]
        stream.calls.clear()
        with mux.route(["a", "b"]):  # both are there: nothing but waiting
            assert {call[0] for call in stream.calls} == {"wait"} and len(stream.calls) == 2
    stream.calls.clear()
    mux.prefetch(["c"])  # a was routed last but one: b and a in turn
    assert stream.calls[:3] == ["_write", "erase", "erase"]
    assert stream.calls[3:8] == came


def test_removals_and_moves_are_in_the_same_order(tmp_path: Path, notes: list[Notes]) -> None:
    _, mux = attached(12)
    for i, (name, rank) in enumerate({"a": 3, "b": 3, "c": 3, "d": 3, "e": 6}.items()):
        mux.load(name, tenant(tmp_path / name, {"first": rank, "second": rank}, i).folder)
    for name in "abcd":
        mux.prefetch([name])
    (stream,) = notes
    for name in "bd":
        mux.pin(name)  # so that b moves: none of the two may go
    mux.remove("a")
    mux.remove("c")
    stream.calls.clear()
    mux.prefetch(["e"])
    assert stream.calls.count("slide") == 2 and stream.calls.index("slide") < stream.calls.index(
        "to_device"
    )
    mux.load("b", tenant(tmp_path / "new", {"first": 3}, 9).folder, replace=True)
    with mux.route(["b"]):
        mux.load("b", tenant(tmp_path / "newer", {"first": 3}, 10).folder, replace=True)
        assert mux.memory().replaced
    assert not mux.memory().replaced  # freed in the stream, as `watched` asserts
