"""A GPU driver for machines without a GPU: launches compile for real, and are recorded.

After `install("sm_90")`, `kernel[grid](...)` takes Triton's own path on CPU tensors: the JIT binder
specialises the arguments, the compiler makes the machine code of that architecture and refuses too
much shared memory, and the launch lands in LAUNCHES. Then the NumPy interpreter computes it, so
that launchers run from end to end. A recorded launch can be replayed, as a CUDA graph would.

Must run in a process without TRITON_INTERPRET: tests/support/launches.py does.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpretedFunction

from codegen import SHARED


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel as specialised and compiled, its grid and its arguments."""

    source: Any  # triton.compiler.ASTSource
    metadata: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    device: int  # that was current

    @property
    def name(self) -> str:
        return str(self.source.fn.__name__)

    def specialised(self) -> dict[str, Any]:
        """argument -> 16 when divisible by it, or the value that was compiled in.

        A field of a tuple is "plan.union".
        """
        found = {
            self._name(path): 16
            for path, attributes in self.source.attrs.items()
            if ["tt.divisibility", 16] in attributes
        }
        return found | {self._name(path): v for path, v in self.source.constants.items()}

    def _name(self, path: tuple[int, ...]) -> str:
        first, *rest = path
        name = str(self.source.fn.arg_names[first])
        return ".".join([name, *(self.source.signature[name]._fields[i] for i in rest)])

    def replay(self) -> None:
        """Compute it again, on what its arguments hold now."""
        names = self.source.fn.arg_names
        arguments = dict(zip(names, self.arguments, strict=True))
        if "PREFETCHES" in arguments:
            arguments["PREFETCHES"] = False  # the interpreter runs no assembly
        with interpreted(self.source.fn) as function:
            function[self.grid](**arguments)


LAUNCHES: list[Launch] = []
# Triton's names of types -> torch's.
DTYPES = {
    **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "u1": torch.bool},
    **{"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64},
}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, *everything: Any) -> None:
        grid, arguments = everything[:3], everything[9:]
        if len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            arguments = tuple(arguments[0])  # one tuple from triton 3.8 on
        arguments = tuple(map(_tensors, arguments, self.source.signature.values()))
        driver = triton.runtime.driver.active
        launch = Launch(self.source, self.metadata, grid, arguments, driver.device)
        LAUNCHES.append(launch)
        if driver.computes:
            launch.replay()


def _tensors(argument: Any, type_: Any) -> Any:
    """An argument with tensors for pointers, as the interpreter takes it.

    A launch that is made again has pointers. Its tensors are as long as an element: where a kernel
    reads and writes depends on where they begin.
    """
    if isinstance(type_, tuple):
        return type(type_)(*map(_tensors, argument, type_))
    if isinstance(argument, int) and type_.startswith("*"):
        dtype = DTYPES[type_.removeprefix("*")]
        memory = (ctypes.c_byte * dtype.itemsize).from_address(argument)
        return torch.frombuffer(memory, dtype=dtype)
    return argument


class _Utils:
    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            **{"max_shared_mem": SHARED[self.architecture], "multiprocessor_count": 132},
            **{"max_num_regs": 65536, "warpSize": 32},
        }

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, *arguments: Any) -> None:
        return None


class FakeDriver(DriverBase):
    """What triton asks of a driver, answered for `architecture`."""

    def __init__(self, architecture: str, computes: bool) -> None:
        self.computes = computes
        self.device = 0
        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)
        self.utils, self.launcher_cls = _Utils(architecture), _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def exchange_device(self, device: int) -> int:
        """Make another device current; returns the one that was."""
        before, self.device = self.device, device
        return before

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError

    def get_device_interface(self) -> Any:
        raise NotImplementedError


def install(architecture: str, computes: bool = True) -> None:
    """Launch for `architecture` from now on; `computes` says whether outputs are computed too."""
    triton.runtime.driver.set_active(FakeDriver(architecture, computes))
    LAUNCHES.clear()


@contextlib.contextmanager
def interpreted(kernel: Any) -> Iterator[Any]:
    """`kernel` as an interpreted function; afterwards triton can compile again.

    Every @triton.jit function that the kernel can reach, triton.language's own too, is replaced
    for the time, and what the interpreter leaves patched in triton.language is put back.
    """
    from triton.language import math, random, standard

    patched = tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base, tl.core.dtype
    before = [(owner, dict(vars(owner))) for owner in patched]
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    seen: set[int] = set()
    made: dict[int, InterpretedFunction] = {}

    def visit(names: dict[str, Any]) -> None:
        if id(names) in seen:
            return
        seen.add(id(names))
        for name, value in list(names.items()):
            if isinstance(value, triton.JITFunction):
                visit(value.fn.__globals__)
                replaced.append((names, name, value))
                names[name] = made.setdefault(id(value), InterpretedFunction(value.fn))

    for module in (tl, tl.core, standard, random, math):
        visit(vars(module))
    visit(kernel.fn.__globals__)
    try:
        yield made.setdefault(id(kernel), InterpretedFunction(kernel.fn))
    finally:
        for owner, attributes in before:
            for name in list(vars(owner)):
                with contextlib.suppress(AttributeError, TypeError):
                    if name not in attributes:
                        delattr(owner, name)
                    elif vars(owner)[name] is not attributes[name]:
                        setattr(owner, name, attributes[name])
        for names, name, value in replaced:
            names[name] = value
