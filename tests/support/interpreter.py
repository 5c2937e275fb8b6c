"""Triton's NumPy interpreter, mended and watched.

`mend_bf16` puts right what it does to bf16: it multiplies the bits (triton #11584) and truncates
when it casts. `Memory` watches every load and store of interpreted kernels: accesses outside the
tensors, races between programs, two lanes of a store at one address, and exact traffic.
`waiting_first` runs the programs of a grid in the worst order there is for those that wait.
"""

import functools
import inspect
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


@contextmanager
def mend_bf16() -> Iterator[None]:
    """bf16 products by way of fp32, and casts to bf16 rounded to nearest, ties to even."""
    plain_dot, plain_cast = Builder.create_dot, Builder.cast_impl

    def is_bf16(handle: Any) -> bool:
        return bool(getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16)

    def widened(handle: Any) -> Any:
        if not is_bf16(handle):
            return handle
        return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        if is_bf16(source):
            return plain_cast(self, widened(source), wanted)
        if wanted.scalar == tl.bfloat16:
            exact = torch.from_numpy(np.ascontiguousarray(source.data.astype(np.float32)))
            bits = exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            return Handle(bits.reshape(source.data.shape), tl.bfloat16)
        return plain_cast(self, source, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "create_dot", create_dot)
        patch.setattr(Builder, "cast_impl", cast_impl)
        yield


class Memory:
    """What interpreted kernels do to the given tensors, while `watched`.

    Attributes:
        errors: accesses outside of all tensors, races, duplicate stores.
        bytes: (kind, name) -> bytes of the lanes that were not masked, kind "load", "store" or
            "atomic".
        programs: the same key -> the programs, by their first index.

    An atomic that releases hands on what its program wrote, and what was handed to it; one that
    acquires the same address takes that over. Nothing else orders two programs.
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        self.tensors = {name: t for name, t in tensors.items() if t is not None and t.numel()}
        self.errors: list[str] = []
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.programs: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        self._known: defaultdict[Any, set[Any]] = defaultdict(
            set
        )  # program -> whose writes it sees
        self._released: defaultdict[int, set[Any]] = defaultdict(set)  # address -> the same
        self._writer: dict[int, Any] = {}  # address -> the program that wrote it
        self._reader: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator["Memory"]:
        load, store = Builder.create_masked_load, Builder.create_masked_store

        def watched_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            return load(builder, ptrs, self._seen("load", ptrs, mask), *rest)

        def watched_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return store(builder, ptrs, value, self._seen("store", ptrs, mask), *rest)

        add = Builder.create_atomic_rmw

        def watched_add(
            builder: Any, op: Any, ptrs: Any, value: Any, mask: Any, sem: Any, scope: Any
        ) -> Any:
            (address,) = np.ravel(ptrs.data).tolist()
            program, order = interpreter.interpreter_builder.grid_idx, str(sem).lower()
            before = add(builder, op, ptrs, value, self._seen("atomic", ptrs, mask), sem, scope)
            if "release" in order:
                self._released[address] |= self._known[program] | {program}
            if "acquire" in order:
                self._known[program] |= self._released[address]
            return before

        def no_other(*arguments: Any) -> Any:
            raise AssertionError("the kernels use no compare-and-swap")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Builder, "create_masked_load", watched_load)
            patch.setattr(Builder, "create_masked_store", watched_store)
            patch.setattr(Builder, "create_atomic_rmw", watched_add)
            patch.setattr(Builder, "create_atomic_cas", no_other)
            yield self

    @contextmanager
    def of_launches(self) -> Iterator["Memory"]:
        """Watch every kernel that lora_mux.kernels launches, and the tensors it is given."""
        from lora_mux.kernels import launch, launch_gradient

        with pytest.MonkeyPatch.context() as patch:
            for module in (launch, launch_gradient):
                for name in [name for name in vars(module) if name.endswith("_kernel")]:
                    patch.setattr(module, name, _Spied(getattr(module, name), self))
            yield self

    def next_kernel(self) -> None:
        """Launches follow one another: what an earlier one wrote is no race."""
        for seen in (self._writer, self._reader, self._known, self._released):
            seen.clear()

    def _seen(self, kind: str, ptrs: Any, mask: Any) -> Any:
        """Note an access; returns its mask without the lanes that are out of bounds."""
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        addresses = ptrs.data[lanes].ravel().astype(np.int64)
        if not addresses.size:
            return mask
        program = interpreter.interpreter_builder.grid_idx
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for name, tensor in self.tensors.items():
            low, high = _extent(tensor)
            here = (addresses >= low) & (addresses + size <= high)
            self.bytes[kind, name] += int(here.sum()) * size
            if here.any():
                self.programs[kind, name].add(program[0])
            inside |= here
        known = self._known[program] | {program}
        if not inside.all():
            self.errors.append(f"{kind} outside of the tensors by program {program}")
            kept = lanes.copy()
            kept[lanes] = inside
            mask = Handle(kept, mask.dtype)
        if kind == "store" and len(np.unique(addresses)) != len(addresses):
            self.errors.append(f"two lanes of one store share an address, program {program}")
        if kind == "atomic":  # they do not race with one another
            return mask
        accesses = addresses.tolist()
        for other in set(map(self._writer.get, accesses)) - known - {None}:
            self.errors.append(f"{kind} of what program {other} wrote")
        if kind == "load":
            self._reader.update(dict.fromkeys(accesses, program))
            return mask
        for other in set(map(self._reader.get, accesses)) - known - {None}:
            self.errors.append(f"store of what program {other} read")
        self._writer.update(dict.fromkeys(accesses, program))
        return mask


class _Spied:
    """A kernel whose launches a Memory watches."""

    def __init__(self, kernel: Any, memory: Memory) -> None:
        self.kernel, self.memory = kernel, memory

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*tensors: Any, **constants: Any) -> None:
            for name, tensor in named_tensors(self.kernel.arg_names, tensors):
                self.memory.tensors[name.removesuffix("_ptr")] = tensor
            self.memory.next_kernel()
            with self.memory.watched():
                self.kernel[grid](*tensors, **constants)

        return call


def note_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that lora_mux.kernels.launch launches from now on, in order."""
    from lora_mux.kernels import launch

    names: list[str] = []

    class Noted:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        noted = Noted(getattr(launch, name), name.removesuffix("_kernel"))
        monkeypatch.setattr(launch, name, noted)
    return names


def named_tensors(names: Sequence[str], arguments: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a launch that hold something, those in tuples by the names of their fields."""
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, tuple):
            yield from named_tensors(argument._fields, argument)
        elif isinstance(argument, Tensor) and argument.numel():
            yield name, argument


def _extent(tensor: Tensor) -> tuple[int, int]:
    """[first byte, end) of a view: its own elements, not its storage."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def waiting_first() -> Iterator[None]:
    """Run the programs of each grid from the last to the first, in turns that end at an atomic.

    All that were started before have another turn before one more program is started. A turn ends
    before each poll (an addition of 0), and in programs that have not polled before any atomic:
    whoever goes on too early, or takes over something else than what it waits for, does so before
    the last of the others has done all of its work.
    """
    plain_init, plain_add = interpreter.GridExecutor.__init__, Builder.create_atomic_rmw
    builder = interpreter.interpreter_builder
    running = _Coroutines()

    def init(self: Any, fn: Callable[..., None], *rest: Any) -> None:
        @functools.wraps(fn)
        def collected(**arguments: Any) -> None:
            programs.append((builder.grid_idx, functools.partial(fn, **arguments)))
            if builder.grid_idx == tuple(n - 1 for n in builder.grid_dim):
                running.run(programs[::-1])

        programs: list[tuple[Any, Callable[[], None]]] = []
        collected.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
        plain_init(self, collected, *rest)

    def add(self: Any, op: Any, ptrs: Any, value: Any, *rest: Any) -> Any:
        running.pause(polls=not np.any(value.data))
        return plain_add(self, op, ptrs, value, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__init__", init)
        patch.setattr(Builder, "create_atomic_rmw", add)
        yield


class _Coroutines:
    """Programs in threads of their own, of which one runs at a time."""

    def __init__(self) -> None:
        self._errors: list[BaseException] = []

    def run(self, programs: list[tuple[Any, Callable[[], None]]]) -> None:
        waiting: list[tuple[Any, threading.Thread]] = []
        for index, program in programs:
            waiting = [one for one in waiting if self._step(*one)]
            thread = threading.Thread(target=self._guarded, args=(program,), daemon=True)
            thread.turn, thread.done = threading.Event(), threading.Event()  # type: ignore[attr-defined]
            thread.start()
            waiting += [(index, thread)] if self._step(index, thread) else []
        while waiting:
            waiting = [one for one in waiting if self._step(*one)]

    def pause(self, polls: bool) -> None:
        """Called by a program before an atomic: let others run."""
        me: Any = threading.current_thread()
        if not polls and getattr(me, "polled", False):
            return
        me.polled = polls
        me.done.set()
        me.turn.wait()
        me.turn.clear()

    def _step(self, index: Any, thread: Any) -> bool:
        """Let a program run until it pauses (True) or ends."""
        interpreter.interpreter_builder.grid_idx = index
        thread.done.clear()
        thread.turn.set()
        thread.done.wait()
        if self._errors:
            raise self._errors.pop()
        return bool(thread.is_alive() and not getattr(thread, "ended", False))

    def _guarded(self, program: Callable[[], None]) -> None:
        me: Any = threading.current_thread()
        me.turn.wait()
        me.turn.clear()
        try:
            program()
        except BaseException as error:
            self._errors.append(error)
        me.ended = True
        me.done.set()
