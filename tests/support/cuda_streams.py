"""torch.cuda's streams, events and graphs on the CPU, and who may read and write what at once.

CPU tensors stand for a device's where they come from a pool or from a copy to the device, and so do
all that is computed from them. Every operator notes which of their bytes it reads and writes, on
the stream that is current. A stream knows, by a vector clock, the work of others that it has waited
for. Two accesses to the same bytes, one of them a write, of which neither waits for the other, are
a race: on a GPU they come in any order.

What would make the host wait (a copy from pageable memory, a value that is read) is noted, too.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import lora_mux
from lora_mux.core import slots, streams
from lora_mux.core.pool import Pool
from lora_mux.ops import dispatch


class Access(NamedTuple):
    """Bytes of one storage that an operator reads or writes."""

    storage: int
    start: int
    end: int
    writes: bool
    what: str


class Done(NamedTuple):
    """An access, and where it stands in the order."""

    access: Access
    stream: "Stream"
    number: int


NUMBERS = itertools.count(1)


@dataclass(eq=False)
class Stream:
    """Stands for torch.cuda.Stream."""

    device: object = None
    name: str = ""
    clock: "dict[Stream, int]" = field(default_factory=dict)  # the work of each that has happened
    captured: "list[Launch] | None" = None  # by the graph that is being captured on it
    waits: int = 0

    def __post_init__(self) -> None:
        self.name = self.name or f"stream {next(NUMBERS)}"

    @property
    def cuda_stream(self) -> int:
        return id(self)

    def given(self) -> int:
        """The number of one more piece of work."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def know(self, clock: "dict[Stream, int]") -> None:
        for stream, number in clock.items():
            self.clock[stream] = max(number, self.clock.get(stream, 0))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.clock, event.in_capture = dict(self.clock), self.captured is not None
        return event

    def wait_event(self, event: "Event") -> None:
        in_capture = self.captured is not None
        assert event.in_capture == in_capture, "a capture and work outside cannot wait for another"
        self.waits += 1
        self.know(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """The host waits, so that whatever is given to any stream from now on comes later."""
        CUDA.host.know(self.clock)
        CUDA.syncs.append("synchronize")


class Event:
    """Stands for torch.cuda.Event."""

    clock: dict[Stream, int]
    in_capture = False

    def __init__(self, **how: bool) -> None:
        self.clock = {}

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle an event, nor copy it")

    def record(self, stream: Stream | None = None) -> None:
        (stream or CUDA.current()).record_event(self)


class Launch(NamedTuple):
    """An operator that ran on the device."""

    func: Any
    args: Any
    kwargs: Any
    made: list[Tensor]  # its outputs

    def note(self) -> None:
        """What it reads, then what it writes."""
        name, given = self.func._schema.name.split("::")[1], tree_tensors((self.args, self.kwargs))
        written = written_by(self.func, self.args)
        if self.func.namespace == "lora_mux":
            note_operator(name, self.args)
        else:
            for tensor in given:
                if not any(tensor is one for one in written):
                    CUDA.touch(tensor, False, name)
        inputs = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in self.made if t.untyped_storage().data_ptr() not in inputs]
        if name in ("index_fill_", "index_copy_"):  # by a list of slots
            written = [self.args[0][i] for i in self.args[2].tolist()]
        for tensor in (*written, *map(CUDA.put, new)):
            CUDA.touch(tensor, True, name)

    def again(self) -> None:
        """As a replay: into the same outputs."""
        with _disable_current_modes():
            made = tree_tensors(self.func(*self.args, **self.kwargs))
            for tensor, new in zip(self.made, made, strict=True):
                if tensor is not new:
                    tensor.copy_(new)
            self.note()


def tree_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any) -> list[Tensor]:
    arguments = func._schema.arguments[: len(args)]
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    return tree_tensors([arg for arg, is_written in zip(args, writes, strict=True) if is_written])


class Graph:
    """Stands for torch.cuda.CUDAGraph: a replay does again what was captured."""

    launches: list[Launch]

    def replay(self) -> None:
        for launch in self.launches:
            launch.again()


class Cuda:
    """The one device, and what has happened on it."""

    def __init__(self) -> None:
        self.host = Stream(name="host")
        self.default = Stream(name="default")
        self.local = threading.local()
        self.done: dict[int, list[Done]] = {}  # by storage
        self.held: dict[int, Any] = {}  # the device's storages, so that no address is used twice
        self.pinned: dict[int, Any] = {}
        self.races: list[str] = []
        self.syncs: list[str] = []

    def current(self, device: object = None) -> Stream:
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack else self.default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[Stream]:
        stack = self.local.__dict__.setdefault("stack", [])
        stack.append(stream)
        yield stream
        stack.pop()

    @contextmanager
    def capture(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        """Stands for torch.cuda.graph, which waits for all that came before."""
        stream = stream or Stream(name="capture")
        self.synchronize()
        stream.captured = []
        with self.stream(stream):
            yield
        graph.launches, stream.captured = stream.captured, None

    def synchronize(self, device: object = None) -> None:
        for done in self.done.values():
            for one in done:
                self.host.know({one.stream: one.number})
        self.syncs.append("synchronize")

    def is_on_device(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.held

    def put(self, tensor: Tensor) -> Tensor:
        """From now on the tensor is on the device."""
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            self.held.setdefault(storage.data_ptr(), storage)
        return tensor

    def happens(self, access: Access) -> None:
        stream = self.current()
        stream.know(self.host.clock)
        number, kept = stream.given(), []
        for one in self.done.get(access.storage, []):
            other = one.access
            apart = other.end <= access.start or access.end <= other.start
            is_known = stream.clock.get(one.stream, 0) >= one.number
            if not (apart or is_known) and (access.writes or other.writes):
                self.races.append(
                    f"{access.what} {'writes' if access.writes else 'reads'} on {stream.name}, and "
                    f"{other.what} {'writes' if other.writes else 'reads'} on {one.stream.name}"
                )
            inside = access.start <= other.start and other.end <= access.end
            if not (inside and is_known and (access.writes or not other.writes)):
                kept.append(one)
        self.done[access.storage] = [*kept, Done(access, stream, number)]

    def touch(self, tensor: Tensor, writes: bool, what: str) -> None:
        """An operator reads or writes the bytes that a tensor spans."""
        if not tensor.numel() or not self.is_on_device(tensor):
            return
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start = tensor.storage_offset() * tensor.element_size()
        end = start + extent * tensor.element_size()
        storage = tensor.untyped_storage().data_ptr()
        self.happens(Access(storage, start, end, writes, what))


CUDA = Cuda()
# Operators by which the host learns values, and those that take an index from wherever it is.
READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select")
TAKES_INDEX = ("index", "index_put_", "_index_put_impl_")


class Notes(TorchDispatchMode):
    """Notes the accesses of each operator."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(map(CUDA.is_on_device, tree_tensors((args, kwargs)))):
            return func(*args, **kwargs)
        self._note_sync(func._schema.name.split("::")[1], args)
        made = func(*args, **kwargs)
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        if written_by(func, args) or not is_view:
            launch = Launch(func, args, kwargs, tree_tensors(made))
            captured = CUDA.current().captured
            if captured is None:
                launch.note()
            else:
                captured.append(launch)
                for tensor in launch.made:
                    CUDA.put(tensor)
        return made

    def _note_sync(self, name: str, args: Any) -> None:
        if name in READS_VALUES:
            CUDA.syncs.append(name)
        # Also of one number that is assigned to one element, as an H100 showed.
        elif name == "copy_" and not CUDA.is_on_device(args[1]):
            if args[1].untyped_storage().data_ptr() not in CUDA.pinned:
                CUDA.syncs.append("copy_ from pageable memory")
        elif name in TAKES_INDEX and not all(
            CUDA.is_on_device(t) for t in tree_leaves(args[1]) if isinstance(t, Tensor)
        ):
            CUDA.syncs.append(f"{name} by an index on the host")


def note_operator(name: str, args: Any) -> None:
    """What our own operators read: of the tables and rank rows, those of the selected slots."""
    if name == "plan":
        index, weight, live, *_ = args
        for tensor in (index, weight):
            CUDA.touch(tensor, False, name)
        for handle in set(index.flatten().tolist()) - {-1}:
            CUDA.touch(live[handle & 0xFFFF], False, name)
        return
    if name == "rows_now":
        for tensor in args[:2]:
            CUDA.touch(tensor, False, name)
        return
    A_rows, B_rows, constant, offset, rank, scaling, selected = args[2:9]
    for tensor in (*args[:2], *tree_tensors(args[8:])):
        CUDA.touch(tensor, False, name)
    for slot in set(selected.flatten().tolist()) - {-1}:
        for table in (offset, rank, scaling):
            CUDA.touch(table[slot], False, name)
        held = slice(int(offset[slot]), int(offset[slot] + rank[slot]))
        for rows in tree_tensors((A_rows, B_rows, constant)):
            CUDA.touch(rows[held], False, name)


def to(self: Tensor, *args: Any, **how: Any) -> Tensor:
    """Stands for Tensor.to: with a device, a copy onto it."""
    device = how.get("device", next((a for a in args if isinstance(a, torch.device)), None))
    if device is None or CUDA.is_on_device(self) or hasattr(CUDA.local, "on_host"):
        return TO(self, *args, **how)
    is_pinned = self.untyped_storage().data_ptr() in CUDA.pinned
    if not (is_pinned and how.get("non_blocking")):
        CUDA.syncs.append("a copy from pageable memory")
    moved = TO(self, *args, **{**how, "copy": True})
    CUDA.touch(CUDA.put(moved), True, "a copy to the device")
    return moved


def on_host(method: Any) -> Any:
    """A method whose tensors are the host's, wherever it moves them."""

    def called(*args: Any) -> Any:
        CUDA.local.on_host = True
        try:
            return method(*args)
        finally:
            del CUDA.local.on_host

    return called


def pin_memory(self: Tensor) -> Tensor:
    """Stands for Tensor.pin_memory."""
    return pin_memory_(self.clone())


def pin_memory_(made: Tensor) -> Tensor:
    CUDA.pinned[made.untyped_storage().data_ptr()] = made.untyped_storage()
    return made


def empty(*size: Any, pin_memory: bool = False, **how: Any) -> Tensor:
    """Stands for torch.empty."""
    made = EMPTY(*size, **how)
    return pin_memory_(made) if pin_memory else made


def capturing(device: object = None) -> bool:
    """Stands for torch.cuda.is_current_stream_capturing."""
    return CUDA.current().captured is not None


TO, EMPTY = Tensor.to, torch.empty


@contextmanager
def cuda_streams() -> Iterator[Cuda]:
    """Inside, the CPU is a device with streams. At the end nothing may have raced."""
    CUDA.__init__()  # type: ignore[misc]
    choose, init = dispatch.choose_form, Pool.__init__

    def choose_operators(*case: Any, **named: Any) -> Any:
        form = choose(*case, **named)
        return "operators" if form == "cpu" else form  # which reads the index on the device

    def init_on_device(self: Pool, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        for name, buffer in self.named_buffers():  # empty, but not without a place
            setattr(self, name, CUDA.put(buffer.new_empty(1, *buffer.shape[1:]))[:0])

    instead: list[tuple[object, dict[str, Any]]] = [
        (streams, {"WITH_STREAMS": {"cpu"}, "stream_handle": lambda device: id(CUDA.current())}),
        (slots, {"CPU": torch.device("cpu", 0)}),  # so that the table on the device is another
        (slots.Slots, {"_slots_of": on_host(slots.Slots._slots_of)}),
        (Tensor, {"to": to, "pin_memory": pin_memory, "record_stream": lambda *of: None}),
        (dispatch, {"choose_form": choose_operators, "capturing": capturing}),
        (lora_mux.ops, {"capturing": capturing}),
        (Pool, {"__init__": init_on_device}),
        (torch, {"empty": empty}),
    ]
    cuda = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": CUDA.capture}
    cuda |= {"stream": CUDA.stream, "current_stream": CUDA.current}
    cuda |= {"is_current_stream_capturing": capturing, "synchronize": CUDA.synchronize}
    with ExitStack() as stack:
        for owner, names in [*instead, (torch.cuda, cuda)]:
            stack.enter_context(patch.multiple(owner, **names))
        stack.enter_context(Notes())
        yield CUDA
    assert not CUDA.races, "\n".join(CUDA.races)


def buffers_on_device(model: nn.Module) -> None:
    """The parameters of a model are on the device, as its pools are."""
    for parameter in model.parameters():
        CUDA.put(parameter.data)
