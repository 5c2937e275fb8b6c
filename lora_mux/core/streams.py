"""What waits for what, where a device works on several streams at once.

Rank rows and the tables of slots are written on one stream and read on others. The writes of a
device follow one another, whatever streams they are on. Each concerns some slots, or all: it waits
for those who read these slots, and who reads them afterwards waits for it. Nobody else waits, and
the host never does.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Stream: TypeAlias = Any  # torch.cuda.Stream, whose methods have no types
Event: TypeAlias = Any
SomeSlots: TypeAlias = Collection[int] | None  # None = any, because only the device knows
# Where something runs: on a device, and the handle of the stream that is current there.
Site: TypeAlias = tuple[torch.device, int]
WITH_STREAMS = {"cuda"}  # device types; ROCm's is called so, too
ANY = -1  # the slot under which it stands who may read any


def has_streams(device: torch.device) -> bool:
    """Whether a device does what it is given later, and in the order of streams."""
    return device.type in WITH_STREAMS


def stream_handle(device: torch.device) -> int:
    """A number for the stream that is current on a device; 0 where there are none."""
    if not has_streams(device):
        return 0
    # Asked by each layer, so not torch.cuda.current_stream, which makes an object.
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


def site_on(device: torch.device) -> Site:
    """Where on a device that runs which is given to it now."""
    return device, stream_handle(device)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of host tensors on a device: where it has streams, by one copy that nobody waits for.

    From pageable memory each copy would stop the host until the stream has come to it.
    """
    # What torch.compile traces pins no memory.
    if not has_streams(device) or torch.compiler.is_compiling():
        return [tensor.to(device, copy=True) for tensor in tensors]
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    # Kernels are compiled for tensors that begin at a multiple of 16 bytes, as others do.
    padded = [nn.functional.pad(part, (0, -len(part) % 16)) for part in flat]
    packed = torch.cat(padded).pin_memory().to(device, non_blocking=True)
    parts = torch.split(packed, [len(part) for part in padded])
    return [
        part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)
    ]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there: nothing may sync or come from the host.

    Not while torch.compile traces, which cannot ask: what it makes is captured later.
    """
    if not has_streams(device) or torch.compiler.is_compiling():
        return False
    # torch asks the stream of the current device, which need not be this one.
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def note_stream(streams: dict[Stream, None], devices: Iterable[torch.device]) -> None:
    """Add the streams that are current on devices, but for those on which a graph is captured."""
    for device in devices:
        if has_streams(device) and not is_capturing(device):
            streams[torch.cuda.current_stream(device)] = None


def wait_for(writers: Iterable[Stream]) -> list[Stream]:
    """Let the current stream of each device wait for all that other streams were given by now.

    Returns:
        Those that it waits for: of what a graph captures on one, nothing runs.
    """
    others = []
    for writer in writers:
        here = torch.cuda.current_stream(writer.device)
        if writer != here and not _captures(writer) and not _captures(here):
            here.wait_stream(writer)
            others.append(writer)
    return others


@contextmanager
def reading(device: torch.device, reader: Stream, writers: Iterable[Stream]) -> Iterator[None]:
    """Inside, a stream reads what is written on others: after all that they were given by now.

    What they are given afterwards waits until it was read.
    """
    if not has_streams(device):
        yield
        return
    with torch.cuda.stream(reader):
        others = wait_for(one for one in writers if one.device == reader.device)
        try:
            yield
        finally:
            event = reader.record_event()
            for other in others:
                other.wait_event(event)


class Made(NamedTuple):
    """When tensors were put on a device, which any of its streams may come to read."""

    site: Site
    event: Event

    @classmethod
    def now(cls, device: torch.device) -> "Made | None":
        """For what the current stream has just been given; None where nobody has to wait."""
        if not has_streams(device) or torch.compiler.is_compiling():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device)
        return cls(site_on(device), stream.record_event())

    def read(self, *tensors: Tensor) -> None:
        """Let the current stream read them, and their memory stay until it has."""
        device, _ = self.site
        if site_on(device) != self.site and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.event)
            for tensor in tensors:
                tensor.record_stream(stream)


class Mark(NamedTuple):
    """The end of a write. One with a higher number comes after it."""

    number: int
    event: Event
    stream: Stream


class StreamOrder:
    """The order of reads and writes on the devices of one model.

    Those who write hold a lock. Readers do not: the slots that one is reading are not written
    until it has said that it is done.
    """

    def __init__(self) -> None:
        self.devices: dict[torch.device, DeviceOrder] = {}  # that are read and written

    @contextmanager
    def writing(self, device: torch.device, stream: Stream, slots: SomeSlots) -> Iterator[None]:
        """What is written inside, on this stream, concerns these slots; None = all."""
        if not has_streams(device):
            yield
            return
        order = self.devices.setdefault(device, DeviceOrder())
        if order.last is None:
            # What was there before was made on the current stream: at attach, or by a copy.
            stream.wait_stream(torch.cuda.current_stream(device))
            slots = None
        order.let_write(stream, slots)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            order.has_written(stream, slots)

    def wait(self, device: torch.device, slots: SomeSlots) -> Stream | None:
        """Let the current stream wait for what was written to these slots; returns the stream.

        None where a device has no streams; and while a CUDA graph is captured. There the work is
        only noted, and a wait for work outside is an error: who replays it waits, see `routed`.
        """
        if not has_streams(device) or torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device)
        self.devices.setdefault(device, DeviceOrder()).let_read(stream, slots)
        return stream

    def read(
        self, device: torch.device, stream: Stream, slots: SomeSlots, *, is_over: bool
    ) -> None:
        """Note that a stream has been given work that reads these slots.

        Args:
            is_over: no more of it comes. Else whoever writes waits for all that the stream has
                been given by then, as a backward may still come.
        """
        self.devices[device].has_read(stream, slots, is_over=is_over)

    def read_unseen(self, device: torch.device) -> None:
        """Let the current stream read any slot, of which nothing tells the end."""
        stream = self.wait(device, None)
        if stream is not None:
            self.read(device, stream, None, is_over=False)

    def copied(self) -> None:
        """Everything is about to be read for a copy, on the current stream."""
        self.routed(None)
        for device, order in self.devices.items():
            if not torch.cuda.is_current_stream_capturing():
                order.copying[torch.cuda.current_stream(device)] = None

    def keep(self, tensor: Tensor) -> None:
        """Let the memory of a tensor stay until its readers are done, whoever lets go of it."""
        if tensor.device in self.devices:
            for stream in self.devices[tensor.device].readers:
                tensor.record_stream(stream)

    def routed(self, slots: SomeSlots) -> None:
        """Slots are put in force, which graphs may read whose replay nobody tells us of."""
        for device in self.devices:
            self.wait(device, slots)

    def left(self, slots: SomeSlots) -> None:
        """Slots are no longer in force: what has read them unseen was on the current stream."""
        for device, order in self.devices.items():
            if not torch.cuda.is_current_stream_capturing():
                order.has_read(torch.cuda.current_stream(device), slots, is_over=True)


class DeviceOrder:
    """The same, of one device."""

    def __init__(self) -> None:
        self.readers: dict[Stream, None] = {}  # all that there ever were
        # Streams that read all slots for a copy; the next write waits for them.
        self.copying: dict[Stream, None] = {}
        # By slot, the last read of each stream; None = it is not over. Nothing is taken out:
        # another thread may be noting a read, and an interrupt come before the wait.
        self._reads: dict[int, dict[Stream, Event | None]] = {}
        self.last: Mark | None = None
        self._for_all: Mark | None = None  # the last one that concerns all slots
        self._writes: dict[int, Mark] = {}  # by slot, the last one since then

    def let_write(self, stream: Stream, slots: SomeSlots) -> None:
        self.readers[stream] = None  # of what it copies to another place
        if self.last is not None and self.last.stream != stream:
            stream.wait_event(self.last.event)
        for reader in list(self.copying):
            if reader != stream and not _captures(reader):
                stream.wait_stream(reader)
            self.copying.pop(reader, None)
        for slot in [*self._reads] if slots is None else {*slots, ANY}:
            held = self._reads.get(slot, {})
            for reader, event in list(held.items()):
                if event is None and reader != stream and not _captures(reader):
                    event = reader.record_event()
                    if slots is not None and slot != ANY:  # whose tenant is read no more
                        held[reader] = event
                if event is not None:
                    stream.wait_event(event)

    def has_written(self, stream: Stream, slots: SomeSlots) -> None:
        number = 0 if self.last is None else self.last.number + 1
        mark = self.last = Mark(number, stream.record_event(), stream)
        if slots is None:
            self._for_all = mark
            self._writes = {}
        else:
            self._writes.update(dict.fromkeys(slots, mark))

    def let_read(self, stream: Stream, slots: SomeSlots) -> None:
        self.readers[stream] = None
        last, writes = self.last, self._writes
        if slots is not None:  # the last one that concerns any of them comes after the others
            last = max(filter(None, (*map(writes.get, slots), self._for_all)), default=None)
        if last is not None and last.stream != stream:
            stream.wait_event(last.event)

    def has_read(self, stream: Stream, slots: SomeSlots, *, is_over: bool) -> None:
        event = stream.record_event() if is_over else None
        for slot in (ANY,) if slots is None else slots:
            held = self._reads.setdefault(slot, {})
            if held.get(stream, event) is not None or event is None:
                held[stream] = event


def _captures(stream: Stream) -> bool:
    """Whether a graph is captured on a stream: then nothing of it runs that could be waited for."""
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
