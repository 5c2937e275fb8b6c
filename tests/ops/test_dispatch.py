"""Which form is chosen for what, as values; the forms themselves are judged elsewhere."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lora_mux
from fake_cuda import FakeCuda
from lora_mux import ops
from lora_mux.core import Pool
from lora_mux.errors import BackendError
from lora_mux.kernels import installed, launch
from lora_mux.ops import dispatch

# backend, type of x's device, whether the kernels run: the form, and the form while compiling.
FORMS = [
    ("auto", "cpu", False, "cpu", "operators"),
    ("auto", "cuda", True, "triton", "triton"),
    ("auto", "cuda", False, "reference", "operators"),
    ("auto", "mps", False, "reference", "operators"),
    ("reference", "cpu", False, "reference", "operators"),
    ("reference", "cuda", False, "reference", "operators"),
    ("triton", "cuda", True, "triton", "triton"),
    ("triton", "cpu", True, "triton", "triton"),  # the interpreter
]


@pytest.mark.parametrize(("backend", "device", "triton", "eager", "compiled"), FORMS)
def test_forms(backend: Any, device: str, triton: bool, eager: str, compiled: str) -> None:
    chosen = [dispatch.choose_form(backend, device, triton, compiling) for compiling in (0, 1)]
    assert chosen == [eager, compiled]


@pytest.mark.parametrize(
    ("how", "dtype", "form"),
    [
        ({}, torch.float32, "cpu"),
        ({}, torch.float64, "cpu"),
        ({"backend": "reference"}, torch.float32, "reference"),
        ({"backend": "triton"}, torch.float32, "triton"),
        ({"backend": "triton"}, torch.bfloat16, "triton"),
        ({"backend": "triton", "fused": True}, torch.float32, "triton"),
        ({"backend": "triton", "fused": True}, torch.bfloat16, "fused"),
    ],
    ids=str,
)
@pytest.mark.interpreter
def test_method_of_a_layer(how: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    layer = lora_mux.MuxLinear(nn.Linear(16, 24, dtype=dtype), **how)
    x, weight = torch.ones(30, 16, dtype=dtype), layer.weight
    method = ops.method(layer.mux_settings, x, 30, layer.mux_pool, weight)
    assert method.form == form and method.on_host == (form in ("cpu", "reference"))
    assert (method.block_m > 0) == (not method.on_host)


@pytest.mark.interpreter
def test_tiles_of_a_batch_invariant_method_do_not_depend_on_the_batch() -> None:
    layer = lora_mux.MuxLinear(nn.Linear(16, 24), backend="triton", batch_invariant=True)
    methods = {
        ops.method(layer.mux_settings, torch.ones(rows, 16), rows, layer.mux_pool)
        for rows in (1, 40, 3000)
    }
    assert len(methods) == 1


def test_a_capture_on_another_device_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], device
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert [ops.capturing(torch.device("cuda", i)) for i in (0, 1)] == [False, True]
    assert not ops.capturing(torch.device("cpu")) and current == [0]


class Gpu:
    """A GPU of some compute capability, which does not have to be there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.cuda = patch, FakeCuda(patch)
        patch.setattr(dispatch, "_interpreted", lambda: True)  # so that "triton" may be asked for
        patch.setattr(dispatch, "_TOLD", set())
        patch.setattr(installed, "PROBLEM", "")
        patch.setattr(launch, "device_name", lambda device: "GTX")

    def method(
        self, capability: tuple[int, int], dtype: torch.dtype, **how: Any
    ) -> tuple[str, list[str]]:
        """(the form of a layer there, the warnings)."""
        self.patch.setattr(launch, "capability", lambda device: capability)
        layer = lora_mux.MuxLinear(nn.Linear(16, 24, dtype=dtype), **how)
        with self.cuda:
            x = torch.ones(30, 16, dtype=dtype, device="cuda:0")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = ops.method(layer.mux_settings, x, 30, layer.mux_pool, layer.weight)
        return found.form, [str(one.message) for one in told]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.mark.parametrize(
    ("capability", "dtype", "lacking"),
    [
        ((8, 0), torch.bfloat16, ""),
        ((12, 0), torch.bfloat16, ""),
        ((7, 5), torch.float16, ""),
        ((7, 0), torch.float32, ""),
        ((7, 5), torch.bfloat16, "compute capability 8.0 or newer, got 7.5"),
        ((6, 1), torch.float32, "compute capability 7.0 or newer, got 6.1"),
    ],
    ids=str,
)
def test_gpus(capability: tuple[int, int], dtype: torch.dtype, lacking: str, gpu: Gpu) -> None:
    form, told = gpu.method(capability, dtype)
    if not lacking:
        assert form == "triton" and not told
        assert gpu.method(capability, dtype, backend="triton") == ("triton", [])
        return
    assert form == "reference" and len(told) == 1 and f"the kernels need {lacking}" in told[0]
    assert gpu.method(capability, dtype) == ("reference", [])  # told once
    assert gpu.method(capability, dtype, backend="reference") == ("reference", [])
    with pytest.raises(
        BackendError, match=rf"^`backend` 'triton'.* needs {lacking} on cuda:0; use"
    ):
        gpu.method(capability, dtype, backend="triton")


def test_a_gpu_without_tensor_cores_that_triton_uses_does_not_fuse(gpu: Gpu) -> None:
    with pytest.raises(BackendError, match=r"^`fused` True needs compute capability 8\.0"):
        gpu.method((7, 5), torch.float16, fused=True)
    gpu.patch.setattr(dispatch.tuned, "fuses", lambda device, case: True)
    assert gpu.method((7, 5), torch.float16) == ("triton", [])
    assert gpu.method((8, 6), torch.float16) == ("fused", [])
    assert gpu.method((8, 6), torch.float16, fused=False) == ("triton", [])


def test_a_triton_that_is_too_old_for_a_gpu(gpu: Gpu) -> None:
    """As with torch 2.6 to 2.10."""
    gpu.patch.setattr(installed, "PROBLEM", "3.6 or newer, got 3.2.0")
    form, told = gpu.method((9, 0), torch.bfloat16)
    assert form == "reference" and len(told) == 1
    assert "the kernels need triton 3.6 or newer, got 3.2.0; backend='reference'" in told[0]
    assert gpu.method((9, 0), torch.float32) == ("reference", [])


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        ((6, 1), "reference elsewhere (on GTX the kernels need compute capability 7.0 or newer"),
        ((7, 5), "triton on GTX but for bfloat16, "),
        ((8, 9), "triton on GTX, "),
    ],
)
def test_what_auto_means(capability: tuple[int, int], says: str, gpu: Gpu) -> None:
    gpu.patch.setattr(launch, "capability", lambda device: capability)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "GTX")):
        gpu.patch.setattr(torch.cuda, name, lambda value=value: value)
    assert says in ops.backend_reason()


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
def test_what_is_asked_on_cuda_can_be_traced(capability: tuple[int, int], gpu: Gpu) -> None:
    """As it is where a model is compiled there; a capture cannot be asked for inside of a graph."""
    gpu.patch.setattr(launch, "capability", lambda device: capability)

    def asked(x: torch.Tensor) -> torch.Tensor:
        pool = Pool(4, 4, torch.bfloat16, torch.device("cpu"))
        fits = dispatch._runs_triton("auto", x, pool)
        return x + fits + 2 * ops.capturing(torch.device("cuda", 0))

    x = torch.zeros(1, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    if capability >= (8, 0):
        assert compiled(x) == 1
        return
    with pytest.warns(UserWarning, match="compute capability"):
        assert compiled(x) == 0
    assert compiled(x) == 0
