"""Triton's NumPy interpreter, mended and watched.

`mend_bf16` puts right what it does to bf16: it multiplies the bits (triton #11584) and truncates
when it casts. `Memory` watches every load and store of interpreted kernels: accesses outside the
tensors, races between programs, two lanes of a store at one address, and exact traffic.
"""

from collections import Counter
from collections.abc import Iterator
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
        bytes: (kind, name) -> bytes of the lanes that were not masked, kind "load" or "store".
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        self.tensors = {name: t for name, t in tensors.items() if t is not None and t.numel()}
        self.errors: list[str] = []
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._writer: dict[int, Any] = {}  # address -> the program that wrote it
        self._reader: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator["Memory"]:
        load, store = Builder.create_masked_load, Builder.create_masked_store

        def watched_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            return load(builder, ptrs, self._seen("load", ptrs, mask), *rest)

        def watched_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return store(builder, ptrs, value, self._seen("store", ptrs, mask), *rest)

        def atomic(*arguments: Any) -> Any:
            raise AssertionError("the kernels use no atomics")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Builder, "create_masked_load", watched_load)
            patch.setattr(Builder, "create_masked_store", watched_store)
            patch.setattr(Builder, "create_atomic_rmw", atomic)
            patch.setattr(Builder, "create_atomic_cas", atomic)
            yield self

    def next_kernel(self) -> None:
        """Launches follow one another: what an earlier one wrote is no race."""
        self._writer.clear()
        self._reader.clear()

    def _seen(self, kind: str, ptrs: Any, mask: Any) -> Any:
        """Note an access; returns its mask without the lanes that are out of bounds."""
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        addresses = ptrs.data[lanes].ravel().astype(np.int64)
        if not addresses.size:
            return mask
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for name, tensor in self.tensors.items():
            low, high = _extent(tensor)
            here = (addresses >= low) & (addresses + size <= high)
            self.bytes[kind, name] += int(here.sum()) * size
            inside |= here
        program = interpreter.interpreter_builder.grid_idx
        if not inside.all():
            self.errors.append(f"{kind} outside of the tensors by program {program}")
            kept = lanes.copy()
            kept[lanes] = inside
            mask = Handle(kept, mask.dtype)
        if kind == "store" and len(np.unique(addresses)) != len(addresses):
            self.errors.append(f"two lanes of one store share an address, program {program}")
        for address in addresses.tolist():
            if self._writer.get(address, program) != program:
                self.errors.append(f"{kind} of what program {self._writer[address]} wrote")
            if kind == "load":
                self._reader[address] = program
                continue
            if self._reader.get(address, program) != program:
                self.errors.append(f"store of what program {self._reader[address]} read")
            self._writer[address] = program
        return mask


def _extent(tensor: Tensor) -> tuple[int, int]:
    """[first byte, end) of a view: its own elements, not its storage."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
