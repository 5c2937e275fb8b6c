"""Products in bf16 have even inner dimensions: with AMX, oneDNN reads beyond an odd one.

The element that it reads is multiplied by 0, and a neighbour's infinity or NaN makes NaN of that.
Few machines have AMX, so that these tests put the fault into every product of torch.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_mux
from layer import RELATIVE_NORM, LayerCase
from lora_mux import ops
from lora_mux.ops.cpu import plan as cpu
from oracle import Adapter, forward, make_adapter

aten = torch.ops.aten
# torch's products of matrices, and which argument is the left one.
PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.addmm_.default: 1,
    aten.baddbmm.default: 1,
    aten.baddbmm_.default: 1,
}


class ReadsBeyond(TorchDispatchMode):
    """As with AMX; notes the inner dimensions of products in bf16, and the dtypes of others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: list[int] = []
        self.others: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if func not in PRODUCTS:
            # A product that is not in the table would go unseen.
            assert not any(word in str(func) for word in ("mm", "mv", "matmul", "linear", "dot"))
            return made
        left = args[PRODUCTS[func]]
        if left.dtype != torch.bfloat16:
            self.others.append(left.dtype)
            return made
        self.inner.append(left.shape[-1])
        if left.shape[-1] % 2:
            next_rows = left.flatten(0, -2)[:, 0].roll(-1)
            next_rows[-1] = 0
            made += (0 * next_rows).view(*left.shape[:-1], 1)
        return made


class Biased(LayerCase):
    """Adapters with rank rows of their own numbers; "8+" is rank 8 and a bias."""

    def __init__(self, ranks: tuple[int | str, ...], size: tuple[int, int]) -> None:
        super().__init__((), size, torch.bfloat16)
        for i, rank in enumerate(ranks):
            r = int(str(rank).rstrip("+"))
            plain = make_adapter(r, *size, r + 3, torch.bfloat16)
            bias = torch.randn(size[1]).to(torch.bfloat16) if str(rank).endswith("+") else None
            adapter = Adapter(plain.A, plain.B, plain.scaling, bias)
            self.adapters.append(adapter)
            made = self.layer.add_adapter(f"a{i}", plain.A, plain.B, alpha=r + 3, bias=bias)
            self.handles.append(made)

    def add(self, x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        """What the plan makes of the base's answer; in it are the adapters' products alone."""
        y = self.linear(x)
        routing = lora_mux.Routing(torch.tensor([*self.handles, -1])[index], weight)
        plan = ops.plan(routing, self.layer.mux_slots, ops.Method("cpu"))
        assert isinstance(plan, cpu.Plan)
        with ReadsBeyond() as products:
            got = plan.add(y, x, self.layer.mux_pool, owned=False)
        assert len(products.inner) >= 2 and not products.others
        assert not any(inner % 2 for inner in products.inner)
        return got

    def truth(self, x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        strength = torch.ones(index.shape) if weight is None else weight
        chosen = [
            [(self.adapters[a], w) for a, w in zip(r, ws, strict=True) if a >= 0]
            for r, ws in zip(index.tolist(), strength.tolist(), strict=True)
        ]
        return forward(self.linear, x, chosen)


def check_norm(got: Tensor, truth: Tensor) -> None:
    """h is rounded too, which is more than one rounding of the largest value."""
    assert (got.double() - truth).norm() <= RELATIVE_NORM[torch.bfloat16] * truth.norm()


# Rank rows: one, odd by themselves, odd in sum, with a bias, and even ones among them.
RANKS: dict[str, tuple[int | str, ...]] = {
    "one": (1, 1, 1),
    "odd": (3, 5, 7),
    "biases": ("8+", "8+", 8),
    "alike": (5, 5, 5),
    "even": (4, 8, 2),
}
BATCHES = {
    "one row": [[0]],
    "one adapter": [[0]] * 5,
    "in order": [[-1], [0], [0], [-1]],
    "apart": [[0], [-1], [0], [-1], [-1]],
    "one each": [[0], [1], [2]],
    "other counts": [[0], [1], [1], [-1], [2], [2], [2], [0]],
    "several": [[0, 1], [1, 2], [-1, -1], [2, -1], [0, 2], [1, 1]],
}


@pytest.fixture(params=[True, False], ids=["all with all", "by slot"])
def case(
    request: pytest.FixtureRequest, ranks: str, size: tuple[int, int], monkeypatch: Any
) -> Biased:
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    monkeypatch.setattr(cpu, "multiplies_all", lambda *_: request.param)
    return Biased(RANKS[ranks], size)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", [(96, 160), (97, 161)], ids=["even sizes", "odd sizes"])
@pytest.mark.parametrize("ranks", RANKS)
class TestEveryForm:
    """All rows with all adapters and slot by slot, alone and batched, in order and not."""

    def test_values(self, batch: str, case: Biased) -> None:
        index = torch.tensor(BATCHES[batch])
        with torch.no_grad():
            for weight in (None, torch.randn(index.shape)):
                x = case.x(len(index))
                check_norm(case.add(x, index, weight), case.truth(x, index, weight))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_neighbours_input(self, value: float, batch: str, case: Biased) -> None:
        index = torch.tensor(BATCHES[batch])
        weight, x = torch.randn(index.shape), case.x(len(index))
        with torch.no_grad():
            clean = case.add(x, index, weight)
            for v in range(len(index)):
                poisoned, others = x.clone(), torch.arange(len(index)) != v
                poisoned[v] = value
                got = case.add(poisoned, index, weight)
                assert clean[others].isfinite().all() and torch.equal(got[others], clean[others])

    def test_a_neighbours_adapter(self, batch: str, case: Biased) -> None:
        """Huge but finite, so that it is accepted: its own row becomes infinite."""
        K, N = case.linear.in_features, case.linear.out_features
        A, B = torch.full((3, K), 3e38), torch.randn(N, 3)
        case.handles.append(case.layer.add_adapter("huge", A, B, alpha=1))
        case.adapters.append(Adapter(A[:, :0], B, 1 / 3))
        index = torch.tensor(BATCHES[batch])
        x = case.x(len(index)).abs() + 0.1
        with torch.no_grad():
            for v in range(len(index)):
                others, with_huge = torch.arange(len(index)) != v, index.clone()
                with_huge[v, 0] = len(case.adapters) - 1
                got = case.add(x, with_huge, None)
                assert not got[v].isfinite().all()
                truth = case.truth(x[others], index[others], None)
                check_norm(got[others], truth)


def test_the_fault_is_seen() -> None:
    """A product of an odd inner dimension, as torch would make it: the row before the NaN."""
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    x[1] = math.nan
    with ReadsBeyond() as products:
        made = x @ torch.ones(5, 4, dtype=torch.bfloat16)
    assert made[0].isnan().all() and made[2].isfinite().all() and products.inner == [5]


@pytest.mark.parametrize("form", ["reference", "operators"])
@pytest.mark.parametrize("ranks", ["one", "odd", "biases"])
def test_other_forms_multiply_in_fp32(
    form: Any, ranks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, einsum = Biased(RANKS[ranks], (97, 161)), torch.einsum
    index = torch.tensor(BATCHES["several"])
    x = case.x(len(index))
    method = ops.Method(form, 16 if form == "operators" else 0)
    routing = lora_mux.Routing(torch.tensor([*case.handles, -1])[index])
    plan = ops.plan(routing, case.layer.mux_slots, method)
    assert plan is not None and not isinstance(plan, ops.FusedPlan)
    dtypes = []

    def watched(equation: str, *operands: Tensor) -> Tensor:
        dtypes.extend(operand.dtype for operand in operands)
        return einsum(equation, *operands)

    monkeypatch.setattr(torch, "einsum", watched)  # an operator hides its products from a mode
    with torch.no_grad():
        got = plan.add(case.linear(x), x, case.layer.mux_pool, owned=False)
    assert dtypes == [torch.float32] * 4
    check_norm(got, case.truth(x, index, None))


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_an_odd_number_of_rank_rows_is_copied(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase((rank, rank, rank), dtype=dtype)
    routing = lora_mux.Routing(torch.tensor([[case.handles[1]]] * 3))
    plan = ops.plan(routing, case.layer.mux_slots, ops.Method("cpu"))
    assert isinstance(plan, cpu.Plan)
    prepared = plan._in(case.layer.mux_pool, dtype, dtype)
    ((product, factors),) = prepared.products
    padded = rank == 5 and dtype == torch.bfloat16
    assert prepared.widening == 0 and product.shape == (1, 3, 6 if padded else rank)
    assert (factors is None) == padded and (product.mask is not None) == padded
    if factors is not None:
        offset = case.layer.mux_pool.spans[1].offset
        starts = [rows[offset].data_ptr() for rows in case.layer.mux_pool.rows[:2]]
        assert [factor.data_ptr() for factor in factors] == starts


def test_rank_rows_from_the_meta_device_are_padded_with_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """to_empty() brings reserved ones with anything in them, which 0 may be multiplied with."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase((), (97, 161), torch.bfloat16)
    pool = case.layer.mux_pool
    pool.reserve(8, 4, 5)
    for rows in (pool.A_rows, pool.B_rows):
        rows.fill_(math.nan)
    adapter = make_adapter(5, 97, 161, 5, torch.bfloat16)
    case.adapters.append(adapter)
    case.handles.append(case.layer.add_adapter("a", adapter.A, adapter.B, alpha=5))
    with torch.no_grad():
        case.check(case.x(3), torch.tensor([[0], [-1], [0]]))
