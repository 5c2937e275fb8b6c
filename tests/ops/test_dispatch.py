"""Which form is chosen for what, as values; the forms themselves are judged elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn

import lora_mux
from lora_mux import ops
from lora_mux.core import Pool
from lora_mux.kernels import installed
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
    x, weight = torch.ones(40, 16, dtype=dtype), layer.weight
    method = ops.method(layer.mux_settings, x, 40, layer.mux_pool, weight)
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


def test_what_is_asked_on_cuda_can_be_traced() -> None:
    """As it is where a model is compiled there; a capture cannot be asked for inside of a graph."""

    def asked(x: torch.Tensor) -> torch.Tensor:
        pool = Pool(4, 4, torch.float32, torch.device("cpu"))
        fits = dispatch._runs_triton("auto", x, pool)
        return x + fits + 2 * ops.capturing(torch.device("cuda", 0))

    x = torch.zeros(1)
    torch._dynamo.reset()
    assert torch.compile(asked, fullgraph=True, backend="eager")(x) == float(not installed.PROBLEM)
