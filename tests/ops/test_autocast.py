"""Autocast on the CPU: the base answers in another dtype, and the adapters are added as ever.

Autocast would make products of 16 bits of ours, in a dtype that their masks, buffers and plans do
not have. What is judged is what the adapters add to the base's own answer.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from layer import RELATIVE_NORM, LayerCase
from lora_mux.ops.cpu import plan as cpu
from oracle import Adapter, make_adapter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
# Alike and mixed ranks, and a row of each kind.
RANKS = [(4, 4), (4, 8), (4, 7), (3,)]
CASES = [
    *(("auto", False, ranks) for ranks in RANKS),
    ("reference", False, (4, 7)),
    ("auto", True, (4, 7)),
    ("reference", True, (4, 7)),
    pytest.param("triton", False, (4, 7), marks=pytest.mark.interpreter),
    pytest.param("triton", True, (4, 7), marks=pytest.mark.interpreter),
]
INDEX = [[0, -1], [1, -1], [1, 0], [-1, -1], [-1, 0]]


class AutocastCase(LayerCase):
    """A batch under autocast, and what the formula in fp64 adds to the base's answer there."""

    def __init__(self, cast: torch.dtype, ranks: tuple[int, ...], *args: Any, **how: Any) -> None:
        super().__init__(ranks, (64, 48), *args, **how)
        self.cast = cast
        bias = torch.randn(48).to(self.linear.weight.dtype)
        plain = make_adapter(3, 64, 48, 4, bias.dtype)
        self.adapters.append(Adapter(plain.A, plain.B, plain.scaling, bias))
        made = self.layer.add_adapter("biased", plain.A, plain.B, alpha=4, bias=bias)
        self.handles.append(made)
        self.index = torch.tensor(INDEX).clamp(max=len(ranks))
        self.weight = torch.randn(self.index.shape)

    def routing(self, weight: Tensor) -> lora_mux.Routing:
        return lora_mux.Routing(torch.tensor([*self.handles, -1])[self.index], weight)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.cast)

    def pairs(self) -> list[tuple[int, int, Adapter]]:
        """(row, place, adapter) of each selection."""
        places = (self.index >= 0).nonzero().tolist()
        return [(m, j, self.adapters[int(self.index[m, j])]) for m, j in places]

    def truth(self, x: Tensor, base: Tensor) -> Tensor:
        """The base's own answer, and what the adapters add to it, in fp64."""
        want = base.detach().double()
        for m, j, a in self.pairs():
            delta = a.B.double() @ (a.A.double() @ x[m].double())
            if a.bias is not None:
                delta += a.bias.double()
            want[m] += float(self.weight[m, j]) * a.scaling * delta
        return want

    def gradients(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """What the adapters give to x and to weight, in fp64."""
        of_x, of_weight = torch.zeros(x.shape).double(), torch.zeros(self.weight.shape).double()
        for m, j, a in self.pairs():
            g = a.B.double().T @ upstream[m].double() * a.scaling
            of_x[m] += float(self.weight[m, j]) * (a.A.double().T @ g)
            of_weight[m, j] = g @ (a.A.double() @ x[m].double())
            if a.bias is not None:
                of_weight[m, j] += upstream[m].double() @ a.bias.double() * a.scaling
        return of_x, of_weight


def called(layer: nn.Module, compiled: bool) -> Callable[..., Tensor]:
    if not compiled:
        return layer
    torch._dynamo.reset()
    compiles: Callable[..., Tensor] = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return compiles


@pytest.fixture(params=[False, True], ids=["", "bf16 instructions"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: request.param)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "compiled", "ranks"), CASES, ids=str)
def test_values(
    backend: Any,
    compiled: bool,
    dtype: torch.dtype,
    cast: torch.dtype,
    ranks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: False)
    case = AutocastCase(cast, ranks, dtype, backend=backend)
    run, x = called(case.layer, compiled), case.x(5)
    with torch.no_grad(), case.autocast():
        base = case.linear(x)
        y = run(x, case.routing(case.weight))
    assert y.dtype == base.dtype == cast
    assert torch.equal(y[3], base[3])
    error = (y.double() - case.truth(x, base)).abs()
    # Without instructions for bf16 our products are fp32, and y is rounded once: half a unit of
    # each element, and no more. The kernels round h as well, where x and A are of one dtype of 16
    # bits.
    if backend != "triton" or dtype == torch.float32:
        assert (error <= 0.501 * torch.finfo(cast).eps * y.abs().double() + 1e-5).all()
    assert error.norm() <= RELATIVE_NORM[cast] * y.double().norm()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_serves_inside_and_outside(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The last plan is kept, with products that were prepared for other dtypes."""
    case = AutocastCase(torch.bfloat16, (4, 7), dtype)
    x, routing = case.x(*shape), case.routing(case.weight)
    with torch.no_grad():
        before = case.layer(x, routing)
        with case.autocast():
            inside = case.layer(x, routing)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(case.layer(x, routing), before)
            assert torch.equal(case.layer(x, routing), inside)
        assert torch.equal(case.layer(x, routing), before) and before.dtype == dtype
    assert inside.dtype == torch.bfloat16
    error = (inside.double() - before.double()).norm()
    assert error <= RELATIVE_NORM[torch.bfloat16] * before.double().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: Any, compiled: bool, dtype: torch.dtype) -> None:
    """To x and to a routing's weights; the base's part of dx is autocast's own."""
    case = AutocastCase(torch.bfloat16, (4, 7), dtype, backend=backend)
    case.linear.requires_grad_(False)
    x0, upstream = case.x(5), torch.randn(5, 48).to(torch.bfloat16)
    x, alone = x0.clone().requires_grad_(), x0.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    with case.autocast():
        base = case.linear(alone)
        y = called(case.layer, compiled)(x, case.routing(weight))
    y.backward(upstream)
    base.backward(upstream)
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and alone.grad is not None and weight.grad is not None
    of_x, of_weight = case.gradients(x0, upstream)
    for got, want, scale in (
        (x.grad.double() - alone.grad.double(), of_x, x.grad.double().norm()),
        (weight.grad.double(), of_weight, of_weight.norm()),
    ):
        # Gradients of x in 16 bits are rounded, of each part and of their sum.
        assert (got - want).norm() <= RELATIVE_NORM[dtype] * scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_inside(backend: Any) -> None:
    """torch advises against it, but it runs; autograd's own products are autocast's there."""
    case = AutocastCase(torch.bfloat16, (4, 7), backend=backend)
    x, weight = case.x(5).requires_grad_(), case.weight.clone().requires_grad_()
    upstream = torch.randn(5, 48).to(torch.bfloat16)
    with case.autocast():
        case.layer(x, case.routing(weight)).backward(upstream)
    _, of_weight = case.gradients(x.detach(), upstream)
    assert x.grad is not None and x.grad.isfinite().all() and weight.grad is not None
    error = (weight.grad.double() - of_weight).norm()
    assert error <= RELATIVE_NORM[torch.bfloat16] * of_weight.norm()


def test_operators_called_by_hand() -> None:
    """Bit for bit as without autocast, in the dtypes that they promise to torch.compile."""
    case = AutocastCase(torch.bfloat16, (4, 7))
    operators, pool = torch.ops.lora_mux, case.layer.mux_pool
    routing, slots = case.routing(case.weight), case.layer.mux_slots
    live, y = slots.live(torch.device("cpu")), torch.randn(5, 48)
    x, W, bias = case.x(5), case.linear.weight.detach(), case.linear.bias.detach()
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plan = operators.plan(routing.index, routing.weight, live, slots.capacity, 16)
            shared = *pool.rows, *plan, pool.max_rank
            made.append(
                (
                    operators.linear(x, W, bias, *shared),
                    operators.add_lora(y, x, *shared),
                    operators.strength_gradient(y, x, *shared),
                )
            )
    for outside, inside in zip(*made, strict=True):
        assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_attached_model(compiled: bool) -> None:
    """A second layer takes the first one's answer, whose dtype is autocast's, not its own."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).requires_grad_(False)
    mux = lora_mux.attach(model)
    for name in ("a", "b"):
        parts = {p: (torch.randn(3, 24) / 5, torch.randn(24, 3)) for p in ("0", "2")}
        mux.add_adapter(name, parts, scaling=0.5)
    x = torch.randn(4, 24)
    rows = ["a", None, "b", ("a", "b")]
    with torch.no_grad(), mux.route(rows):
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = called(model, compiled)(x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want.double()).norm() <= 2 * RELATIVE_NORM[got.dtype] * want.norm()
