"""How values travel to the pools of one device: on CUDA by a side stream, else by plain copies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoints import PackedTensors


class CopyStream:
    """A side stream, so that adapters travel while the model computes.

    Everything that writes to the pools of a device goes through its one stream, in order. A reader
    waits for the mark of what it reads, and for nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )

    def to_device(self, values: PackedTensors) -> PackedTensors:
        """The values on the device, by one copy that waits for nothing."""
        if self._stream is None:
            return values
        with torch.cuda.stream(self._stream):
            return values.to(self._device)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Work inside waits for the current stream's work so far, which may read the rank rows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """A mark after the work that the stream was given so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the current stream wait for a mark of this stream."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
