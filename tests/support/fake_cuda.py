"""CUDA tensors on machines without a GPU: they have shapes, dtypes and a device, but no values.

Inside `FakeCuda(monkeypatch)` tensors on the CPU are real, and those on "cuda:0" are fake: an
operator that touches one computes shapes alone. Whatever would wait for the GPU raises, because
there is no value to wait for. torch.compile and torch.export trace them like tensors of a GPU.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import lora_mux

CUDA, META = 1, 14  # in c10::DeviceType
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


def _let_devices_be_chosen() -> None:
    """Many methods choose a tensor's device first, which fails where there is none.

    Here nothing happens then. torch itself does so for fake tensors, but only if built with CUDA.
    """
    if torch.cuda.is_available():
        return
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (META + 1)).in_dll(c10, REGISTRY)
    registry[CUDA] = registry[META]


class FakeCuda(TorchDispatchMode):
    """Real tensors on the CPU and fake ones on CUDA, side by side."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        _let_devices_be_chosen()
        # A parameter that moves is another one: torch 2.6 would put fake values into a real one.
        overwrite = "get_overwrite_module_params_on_conversion"
        patch.setattr(torch.__future__, overwrite, lambda: True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        # Of streams and what waits for what there is another stand-in: cuda_streams.py.
        patch.setattr(lora_mux.core.streams, "WITH_STREAMS", set())
        patch.setattr("lora_mux.kernels.launch.capability", lambda device: (9, 0))
        patch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", lambda: False)
        patch.setattr(torch.cuda, "current_device", lambda: 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        if not any(map(_is_on_cuda, tree_leaves(given))):
            return func(*given[0], **given[1])
        args, kwargs = tree_map_only(Tensor, self._as_fake, given)
        with self.fake:
            return func(*args, **kwargs)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def call(self, compiled: Callable[..., Any], *args: Any) -> Any:
        """Call what torch.compile has made: it traces inside of no mode but torch's own.

        So what a graph is about to read is made before, where that can be fake.
        """
        for router in [*lora_mux.routes.compiled.ROUTERS.values()]:
            router.begin_to_show()
        with _disable_current_modes(), self.fake:
            return compiled(*args)


def _is_on_cuda(one: object) -> bool:
    device = one.device if isinstance(one, FakeTensor) else one
    return isinstance(device, torch.device) and device.type == "cuda"
