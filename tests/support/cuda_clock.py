"""torch.cuda as far as timing uses it, on the CPU: graphs call what they captured, events look at a
clock, and what was asked for is written down in the order in which it was.

    cuda = play_cuda(monkeypatch)      # torch.device("cuda") in `modules` is the CPU from then on
"""

import time
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class Device(str):
    """The CPU, which says that it is a GPU."""

    type, index = "cuda", 0


class Asked(list[str]):
    """What was asked of the GPU, in this order."""

    mode = "default"  # of torch.cuda.set_sync_debug_mode

    def sync(self) -> None:
        """What a call does that makes the host wait."""
        self.append("sync")
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def set_mode(self, mode: str) -> None:
        self.mode = mode


def play_cuda(patch: pytest.MonkeyPatch, *modules: ModuleType, l2: int = 50 << 20) -> Asked:
    """Let these modules see a GPU with a cache of so many bytes."""
    asked = Asked()

    class Stream:
        def __init__(self, device: object = None) -> None: ...

        def wait_stream(self, other: object) -> None:
            asked.append("wait")

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...

        def record(self) -> None:
            self.moment = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.moment - self.moment)

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    class Capture(nullcontext[None]):
        def __init__(self, graph: Graph, stream: Stream) -> None:
            super().__init__()
            asked.append("capture")

    properties = SimpleNamespace(L2_cache_size=l2, multi_processor_count=132, major=9, minor=0)
    for name, played in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "stream": nullcontext,
        "device": nullcontext,
        "current_stream": Stream,
        "synchronize": lambda device=None: asked.append("synchronize"),
        "_sleep": lambda cycles: asked.append("sleep"),
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "a played GPU",
        "get_sync_debug_mode": lambda: asked.mode,
        "set_sync_debug_mode": asked.set_mode,
    }.items():
        patch.setattr(torch.cuda, name, played)
    patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    for module in modules:
        patch.setattr(module, "torch", _Torch("torch"))
    return asked


class _Torch(ModuleType):
    """torch, in which a GPU is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: Any) -> Any:
        return Device("cpu") if str(name).startswith("cuda") else torch.device(name)
