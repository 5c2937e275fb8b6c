"""Numbers that are finite in fp32, and whose product is not: their own row pays, and no other.

Weights up to 3.4e38 are accepted, and so are scalings; weight * scaling is what a form computes
with, and may be infinite in its dtype.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from layer import LayerCase
from lora_mux.ops.cpu import plan as cpu
from oracle import assert_close, forward

pytestmark = pytest.mark.usefixtures("quiet")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HUGE = 3e38
# Adapters of each row, and its weights; the rows of HUGE ones are the first.
BATCHES = {
    "alone": ([[0], [-1], [-1]], [[HUGE], [0.0], [0.0]]),
    "beside another": ([[0], [1], [-1]], [[HUGE], [1.5], [0.0]]),
    "the same in another row": ([[0], [0], [1], [-1]], [[-HUGE], [0.5], [1.0], [0.0]]),
    "summed in its row": ([[0, 0], [0, 1], [-1, -1]], [[HUGE, HUGE], [2.0, 1.0], [0.0, 0.0]]),
    "with another": ([[0, 1], [1, 0], [-1, 1]], [[HUGE, 1.0], [2.0, 1.0], [0.0, 0.5]]),
    "many rows": (
        [[0]] + [[m % 3] for m in range(20)] + [[-1]],
        [[HUGE]] + [[m / 8] for m in range(20)] + [[0.0]],
    ),
}


class Scaled(LayerCase):
    """Adapters whose scaling is 4."""

    def __init__(self, dtype: torch.dtype, ranks: tuple[int, ...] = (2, 3, 4), **how: Any) -> None:
        super().__init__((), (16, 24), dtype, **how)
        for i, rank in enumerate(ranks):
            twin = LayerCase((rank,), (16, 24), dtype).adapters[0]
            self.adapters.append(type(twin)(twin.A, twin.B, 4.0))
            made = self.layer.add_adapter(f"a{i}", twin.A, twin.B, scaling=4)
            self.handles.append(made)


def check(case: Scaled, run: Any, batch: str, weight_dtype: torch.dtype) -> None:
    """Nothing raises, the row is not finite, and the others are those of a tame batch."""
    rows, weights = BATCHES[batch]
    index, x = torch.tensor(rows), case.x(len(rows))
    handles = torch.tensor([*case.handles, -1])[index]
    tame = torch.tensor([[2.0] * len(weights[0]), *weights[1:]], dtype=weight_dtype)
    with torch.no_grad():
        y = run(x, lora_mux.Routing(handles, torch.tensor(weights, dtype=weight_dtype)))
        want = run(x, lora_mux.Routing(handles, tame))
        if x.dtype != torch.float64:  # which holds 1.2e39
            assert not y[0].isfinite().any()
        if batch == "alone":
            assert torch.equal(y[1:], case.linear(x)[1:])
        assert torch.equal(y[1:], want[1:])
        chosen = [
            [(case.adapters[a], w) for a, w in zip(r, ws, strict=True) if a >= 0]
            for r, ws in zip(rows[1:], weights[1:], strict=True)
        ]
        if x.dtype != torch.float64:
            assert_close(y[1:], forward(case.linear, x[1:], chosen))


@pytest.fixture(params=[True, False], ids=["all with all", "by slot"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_all", lambda *_: request.param)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestValues:
    @pytest.mark.usefixtures("cut")
    @pytest.mark.parametrize("bf16_is_fast", [False, True], ids=["", "bf16 instructions"])
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
    def test_cpu(
        self, batch: str, dtype: Any, bf16_is_fast: bool, weight_dtype: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(cpu, "bf16_is_fast", lambda: bf16_is_fast)
        case = Scaled(dtype)
        check(case, case.layer, batch, weight_dtype)

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
    def test_reference(self, batch: str, dtype: Any, weight_dtype: Any) -> None:
        case = Scaled(dtype, backend="reference")
        check(case, case.layer, batch, weight_dtype)

    def test_operators(self, batch: str, dtype: Any) -> None:
        case = Scaled(dtype)
        torch._dynamo.reset()
        run = torch.compile(case.layer, fullgraph=True, backend="eager")
        check(case, run, batch, torch.float32)

    @pytest.mark.interpreter
    def test_triton(self, batch: str, dtype: Any) -> None:
        if dtype != torch.float64:  # which Triton refuses
            case = Scaled(dtype, backend="triton")
            check(case, case.layer, batch, torch.float32)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("dtype", "weight"),
    [(torch.float16, 1e5), (torch.float16, 1e30), (torch.bfloat16, 3.395e38)],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_weight_beyond_the_layers_dtype(
    rows: int, dtype: torch.dtype, weight: float, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held in fp32, so that an adapter that is as small gets right values."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = Scaled(dtype, (4,), backend=backend)
    scaling = 1 / weight
    a = case.adapters[0]
    case.handles[0] = case.layer.add_adapter("small", a.A, a.B, scaling=scaling)
    case.adapters[0] = type(a)(a.A, a.B, scaling)
    index = torch.zeros(rows, 1, dtype=torch.int64)
    index[1:2] = -1
    with torch.no_grad():
        case.check(case.x(rows), index, torch.full(index.shape, weight))


@pytest.mark.parametrize("weight", [3.395e38, 3.4028e38])
def test_a_strength_between_the_largest_of_bf16_and_of_fp32(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """index_add_ on bf16 takes no such alpha."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = Scaled(torch.bfloat16, (4,))
    a = case.adapters[0]
    one = case.layer.add_adapter("one", a.A, a.B, scaling=1)
    index, x = torch.tensor([[one], [-1], [one]]), case.x(3)
    with torch.no_grad():
        y = case.layer(x, lora_mux.Routing(index, torch.full((3, 1), weight)))
        assert torch.equal(y[1], case.linear(x)[1]) and not y[[0, 2]].isfinite().all()


def test_a_fp64_layer_keeps_the_digits_of_fp64_weights() -> None:
    case = Scaled(torch.float64, (3,))
    x, weight = case.x(2), torch.tensor([[1 + 1e-12], [2 / 3]], dtype=torch.float64)
    with torch.no_grad():
        y = case.layer(x, lora_mux.Routing(torch.tensor([[case.handles[0]]] * 2), weight))
        truth = forward(case.linear, x, [[(case.adapters[0], float(w))] for w in weight])
    torch.testing.assert_close(y, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_other_rows_stay_right(backend: Any) -> None:
    case = Scaled(torch.float32, backend=backend)
    index = torch.tensor(case.handles)[torch.tensor([[0], [0], [1]])]
    x0, found = case.x(3), []
    for first in (HUGE, 2.0):
        x, weight = x0.clone().requires_grad_(), torch.tensor([[first], [1.0], [0.5]])
        weight.requires_grad_()
        y: Tensor = case.layer(x, lora_mux.Routing(index, weight))
        y.backward(torch.ones_like(y))
        assert x.grad is not None and weight.grad is not None
        found.append((x.grad[1:], weight.grad[1:]))
    for huge, tame in zip(*found, strict=True):
        assert tame.isfinite().all() and torch.equal(huge, tame)
