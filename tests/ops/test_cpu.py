"""The CPU's fast form: every way of cutting a batch, against fp64 and against the reference."""

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_mux
from layer import LayerCase, check_relative_norm
from lora_mux import ops
from lora_mux.core.pool import LoraWeights
from lora_mux.ops.cpu import groups as cpu_groups
from lora_mux.ops.cpu import plan as cpu
from oracle import Adapter, assert_close, forward, make_adapter
from work import work

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plan_of(case: LayerCase, index: Tensor) -> cpu.Plan:
    handles = torch.tensor([*case.handles, -1])[index]
    plan = ops.plan(lora_mux.Routing(handles), case.layer.mux_slots, ops.Method("cpu"))
    assert isinstance(plan, cpu.Plan)
    return plan


# Rows of each adapter, and which of them share a product: (adapters, most rows of one).
CUTS = {
    "one for all": ([9], [(1, 9)]),
    "four quarters": ([8] * 4, [(4, 8)]),
    "one each, in order": ([1] * 12, [(12, 1)]),
    "twos, in order": ([2] * 17, [(17, 2)]),
    "about as many": ([3, 4, 2, 3, 4, 3] * 3, [(18, 4)]),
    "one popular": ([1] * 20 + [20, 1, 1, 2, 4, 4], [(22, 1), (3, 4), (1, 20)]),
    "many for two": ([1, 40, 2, 33] + [1] * 20, [(1, 33), (1, 40), (21, 1), (1, 2)]),
    "many in order": ([40] * 17, [(17, 40)]),
}


@pytest.mark.parametrize("bf16_is_fast", [False, True], ids=["", "bf16 instructions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts(
    name: str, dtype: torch.dtype, bf16_is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_groups, "FEW", (0, 0))
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: bf16_is_fast)
    rows_of, _ = CUTS[name]
    case = LayerCase(ranks=(6,) * len(rows_of), dtype=dtype)
    index = torch.arange(len(rows_of)).repeat_interleave(torch.tensor(rows_of))[:, None]
    with torch.no_grad():
        case.check(case.x(len(index)), index)
        shuffled = index[torch.randperm(len(index))]
        case.check(case.x(len(index)), shuffled, torch.randn(index.shape))
        some = torch.where(torch.rand(index.shape) < 0.3, -1, index)
        some[0] = index[0]
        case.check(case.x(len(index)), some)


@pytest.mark.parametrize("name", CUTS)
def test_adapters_with_about_as_many_rows_share_a_product(name: str) -> None:
    counts, expected = (np.array(numbers) for numbers in CUTS[name])
    shared = cpu_groups.sharing(counts)
    groups = [counts[shared == number] for number in np.unique(shared)]
    assert [(len(group), group.max()) for group in groups] == list(map(tuple, expected))


@pytest.mark.parametrize(
    ("rows", "slots", "selections", "expected"),
    [
        (16, 16, 16, (True, True)),  # few: nothing else is worth its calls
        (32, 32, 32, (False, True)),  # with bf16 instructions more of them
        (64, 32, 64, (False, False)),
        (80, 16, 320, (True, True)),  # a quarter is wanted
        (80, 16, 319, (False, True)),
        (200, 16, 200, (False, True)),  # a sixteenth is
        (200, 16, 199, (False, False)),
        (9, 1, 9, (True, True)),
    ],
)
def test_when_all_rows_are_multiplied_with_all_adapters(
    rows: int, slots: int, selections: int, expected: tuple[bool, bool]
) -> None:
    """In fp32, and in bf16."""
    chosen = [cpu_groups.multiplies_all(rows, slots, selections, bf16) for bf16 in (False, True)]
    assert tuple(chosen) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_adapters_of_a_row_are_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from several products, whose sum is kept in fp32."""
    monkeypatch.setattr(cpu_groups, "FEW", (0, 0))
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase(ranks=(4,) * 64, dtype=dtype)
    index = torch.rand(30, 64).argsort(1)[:, :2]
    index[3] = -1
    index[5, 0] = -1
    slots, selections = len(index.unique()) - 1, int((index >= 0).sum())
    assert selections > 29 and not cpu_groups.multiplies_all(29, slots, selections, bf16=True)
    with torch.no_grad():
        case.check(case.x(30), index)
        case.check(case.x(5, 6), index, torch.rand(index.shape))


def test_adapters_that_cancel_leave_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of several products in bf16 would round what is 64 times as large."""
    monkeypatch.setattr(cpu_groups, "FEW", (0, 0))
    monkeypatch.setattr(cpu, "MOVED", 1)  # what index_add_ gets at once it sums in fp32 itself
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase(ranks=(4,) * 40, dtype=torch.bfloat16)
    for a, twin in enumerate(case.adapters):
        case.layer.add_adapter(f"twin{a}", twin.A, twin.B, scaling=-twin.scaling)
    handles = torch.tensor(list(case.layer.adapters.values())).view(2, 40).T
    x = case.x(40)
    with torch.no_grad():
        y = case.layer(x, lora_mux.Routing(handles, torch.full((40, 2), 64.0)))
        # In fp32 what is left of it is 1e-5; in bf16 it would be 2.
        torch.testing.assert_close(y, case.linear(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 40, 200])
def test_products_in_bf16_round_as_torch_does(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the norm at most what plain PyTorch in bf16 is off, which rounds h and delta, and y."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase(ranks=(16,) * 24, size=(512, 512), dtype=torch.bfloat16, bias=False)
    index = torch.arange(rows)[:, None] % 24
    x = case.x(rows)
    with torch.no_grad():
        y = case.check(x, index)
        plain, truth = case.linear(x), case.linear(x).double()
        for a, adapter in enumerate(case.adapters):
            mine = index[:, 0] == a
            plain[mine] += (x[mine] @ adapter.A.T) @ adapter.B.T * adapter.scaling
            exact = (x[mine].double() @ adapter.A.double().T) @ adapter.B.double().T
            truth[mine] += exact * adapter.scaling
    assert (y.double() - truth).norm() <= (plain.double() - truth).norm()


class Moved(TorchDispatchMode):
    """The elements of x that each call brings side by side."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.elements = x, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if func is torch.ops.aten.index_select.default and args[0].shape == self.x.shape:
            self.elements.append(made.numel())
        return made


@pytest.mark.parametrize(
    ("at_once", "expected"), [(1, [2] * 18), (1024, [4] * 9), (1 << 20, [24, 12])]
)
def test_what_is_moved_at_once_is_bounded(
    at_once: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of x for each product: of two adapters with two rows each that is 4 * (96 + 160)."""
    monkeypatch.setattr(cpu_groups, "FEW", (0, 0))
    monkeypatch.setattr(cpu, "MOVED", at_once)
    case = LayerCase(ranks=(4, 4, 7) * 6)
    index = torch.randperm(18).repeat(2)[:, None]
    x = case.x(36)
    with torch.no_grad(), Moved(x) as moved:
        case.check(x, index)
        case.check(case.x(36), index, torch.randn(index.shape))
    rows = [elements // 96 for elements in moved.elements]
    assert sorted(rows[: len(rows) // 2]) == sorted(rows[len(rows) // 2 :]) == sorted(expected)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_drawn_batches(data: st.DataObject) -> None:
    """Larger than test_linear's: popularity, ranks, holes in the pool, places, weights."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    ranks = tuple(data.draw(st.lists(st.sampled_from([1, 4, 4, 16, 33]), min_size=1, max_size=20)))
    case = LayerCase(ranks, (48, 56), data.draw(st.sampled_from(DTYPES)))
    for gone in data.draw(st.sets(st.integers(0, len(ranks) - 1), max_size=len(ranks) - 1)):
        case.layer.remove_adapter(f"a{gone}")
        case.adapters[gone] = make_adapter(5, 48, 56, 5, case.linear.weight.dtype)
        new = case.adapters[gone]
        case.handles[gone] = case.layer.add_adapter(f"b{gone}", new.A, new.B, scaling=1.0)
    rows, J = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    skew = data.draw(st.sampled_from([0.0, 1.0, 3.0]))
    chance = torch.arange(1.0, len(ranks) + 2) ** -skew
    index = torch.multinomial(chance, rows * J, replacement=True).view(rows, J) - 1
    check_relative_norm(case, index, torch.randn(rows, J) if data.draw(st.booleans()) else None)


def two_layers() -> tuple[nn.Sequential, lora_mux.Mux, dict[str, list[Adapter | None]]]:
    """Adapters that leave one layer alone, or have another rank and scaling in it."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).requires_grad_(False)
    mux = lora_mux.attach(model, ["0", "1"])
    kept: dict[str, list[Adapter | None]] = {}
    mixed = [(3, 0), (0, 2), (4, 4), (3, 8), (0, 4), (3, 0), (5, 1), (3, 4)]
    for i, ranks in enumerate(mixed + [(4, 8)] * 6):
        parts = [make_adapter(r, 24, 24, 6, torch.float32) if r else None for r in ranks]
        kept[f"a{i}"] = parts
        weights = {str(n): (part.A, part.B) for n, part in enumerate(parts) if part}
        mux.add_adapter(f"a{i}", weights, alpha=6)
    return model, mux, kept


@pytest.mark.parametrize(
    "names", [["a2"], ["a0", "a1"], [f"a{i}" for i in range(8)], [f"a{i}" for i in range(8, 14)]]
)
def test_layers_that_an_adapter_leaves_alone(names: list[str]) -> None:
    model, mux, kept = two_layers()
    rows = [*names, None, *names[::-1], (names[0], names[-1]) if len(names) > 1 else names[0]]
    x = torch.randn(len(rows), 24)
    y = x
    chosen = [[name] if isinstance(name, str) else list(name or []) for name in rows]
    mux.set_adapter(None)
    for n, linear in enumerate(model):
        parts = [[(part, 1.0) for c in row if (part := kept[c][n])] for row in chosen]
        y = forward(linear, y.to(torch.float32), parts)
    with mux.route(rows):
        assert_close(model(x), y)


@pytest.mark.parametrize("others", [["a2"], [f"a{i}" for i in (2, 0, 3, 5, 6, 7, 2, 0)]], ids=len)
def test_rows_that_get_nothing_keep_minus_zero(others: list[str]) -> None:
    """Base rows, and those whose adapters are elsewhere: -0.0 + 0.0 would be 0.0."""
    model, mux, _ = two_layers()
    handles = [-1, *(mux.adapters[name] for name in ("a1", *others))]
    plan = ops.plan(lora_mux.Routing(torch.tensor(handles)[:, None]), mux._slots, ops.Method("cpu"))
    assert isinstance(plan, cpu.Plan)
    layer = model[0]
    assert isinstance(layer, lora_mux.MuxLinear)
    base = torch.full((len(handles), 24), -0.0)
    y = plan.add(base, torch.randn(len(handles), 24), layer.mux_pool, owned=False)
    assert y[:2].signbit().all() and not y[2:].signbit().all()
    assert base.signbit().all()  # not owned, so not written to


@pytest.mark.parametrize("bf16_is_fast", [False, True])
def test_base_rows_keep_the_bits_of_a_nan(
    bf16_is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way to fp32 and back a NaN would lose its sign and payload."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: bf16_is_fast)
    case = LayerCase(ranks=(2,), size=(16, 12), dtype=torch.bfloat16)
    y = torch.full((2, 12), -0x3E, dtype=torch.int16).view(torch.bfloat16)
    plan = plan_of(case, torch.tensor([[-1], [0]]))
    got = plan.add(y, case.x(2), case.layer.mux_pool, owned=False)
    assert y.isnan().all() and torch.equal(got[0].view(torch.int16), y[0].view(torch.int16))


@pytest.mark.parametrize("adapters", [1, 2, 12])
def test_biases(adapters: int) -> None:
    """PEFT's lora_bias, of every second adapter: a rank row without a product."""
    case = LayerCase(ranks=())
    for i in range(adapters):
        plain = make_adapter(3, 96, 160, 4, torch.float32)
        bias = None if i % 2 else torch.randn(160)
        made = case.layer.add_adapter(f"a{i}", plain.A, plain.B, alpha=4, bias=bias)
        case.handles.append(made)
        case.adapters.append(Adapter(plain.A, plain.B, plain.scaling, bias))
    index = torch.arange(adapters)[:, None]
    with torch.no_grad():
        case.check(case.x(adapters), index, torch.randn(index.shape))


def test_another_rows_adapter_that_overflows_reaches_no_row() -> None:
    """All rows are multiplied with all adapters here; inf must be left out by selecting."""
    case = LayerCase(ranks=(2,), size=(16, 12))
    huge = case.layer.add_adapter("huge", torch.full((2, 16), 3e38), torch.ones(12, 2), alpha=1)
    x = torch.full((3, 16), 9.0)
    with torch.no_grad():
        clean = case.layer(x, lora_mux.Routing(torch.tensor([[0], [-1], [0]])))
        got = case.layer(x, lora_mux.Routing(torch.tensor([[0], [-1], [huge]])))
    torch.testing.assert_close(got[0], clean[0])
    assert torch.equal(got[1], clean[1]) and got[2].isinf().all()


@pytest.mark.parametrize("change", ["index", "weight", "remove", "shape"])
def test_a_remembered_plan_is_not_used_for_another_routing(change: str) -> None:
    case = LayerCase(ranks=(4, 4))
    index, weight, x = torch.tensor([[0], [1]]), torch.ones(2, 1), case.x(2)
    with torch.no_grad():
        case.layer(x, lora_mux.Routing(index, weight))
        if change == "index":
            index.numpy()[:] = index.numpy()[::-1].copy()  # no version counter sees this
        elif change == "weight":
            weight.numpy()[0] = 3.0
        elif change == "remove":
            case.layer.remove_adapter("a1")
            with pytest.raises(lora_mux.LoraMuxError, match="removed"):
                case.layer(x, lora_mux.Routing(index, weight))
            return
        else:
            index, weight, x = index[:1], weight[:1], x[:1]
        case.check(x, index, weight)


@pytest.mark.parametrize("change", ["slide", "write", "A_rows", "B_rows"])
def test_a_remembered_plan_follows_the_rank_rows(change: str) -> None:
    """It holds views of the pool between calls."""
    case = LayerCase(ranks=(4, 4, 4))
    layer, index, x = case.layer, torch.tensor([[1], [1]]), case.x(2)
    handles = torch.tensor(case.handles)[index]
    pool = layer.mux_pool
    with torch.no_grad():
        pool.erase([0])
        case.check(x, index)
        plan = layer.mux_last.plan if layer.mux_last else None
        if change == "slide":
            pool.slide(1)
        elif change == "write":
            case.adapters[1] = case.adapters[2]
            new = case.adapters[2]
            pool.erase([1])
            pool.write(1, LoraWeights(new.A, new.B, new.scaling), slots=3)
        else:
            double = {f"mux_pool.{change}": 2 * getattr(pool, change)}
            y = torch.func.functional_call(layer, double, (x, lora_mux.Routing(handles)))
            base = case.linear(x)
            torch.testing.assert_close(y, base + 2 * (case.check(x, index) - base))
        case.check(x, index)
        assert layer.mux_last and layer.mux_last.plan is plan is not None


def test_a_remembered_plan_is_bound_for_other_dtypes_again(monkeypatch: Any) -> None:
    """As under autocast: what is fp32 is not rounded to bf16 on the way."""
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: True)
    case = LayerCase(ranks=(8,), dtype=torch.bfloat16)
    pool, plan, x = case.layer.mux_pool, plan_of(case, torch.zeros(4, 1, dtype=int)), case.x(4)
    adapter = case.adapters[0]
    want = x.double() @ adapter.A.double().T @ adapter.B.double().T * adapter.scaling
    for dtype in (torch.bfloat16, torch.float32):
        y = torch.zeros(4, 160, dtype=dtype)
        got = plan.add(y, x.to(dtype), pool, owned=True)
        error = (got.double() - want).norm() / want.norm()
        assert got.dtype == dtype and error < {2: 1e-2, 4: 1e-6}[dtype.itemsize]


@pytest.mark.parametrize("change", ["growth", "move", "erase"])
def test_a_remembered_plan_keeps_no_buffer_alive(change: str) -> None:
    case = LayerCase(ranks=(4,))
    layer = case.layer
    with torch.no_grad():
        case.check(case.x(2), torch.tensor([[0], [-1]]))
    before = weakref.ref(layer.mux_pool.A_rows)
    if change == "growth":
        layer.reserve(adapters=100, rank=16)
    elif change == "move":
        layer.to(torch.float64)
    else:
        layer.remove_adapter("a0")
        layer.reserve(adapters=100, rank=16)
    gc.collect()
    assert before() is None


def planned(monkeypatch: pytest.MonkeyPatch) -> list[ops.Plan | None]:
    """The plans that are made from now on."""
    made: list[ops.Plan | None] = []
    plan = ops.plan

    def counted(*args: Any, **how: Any) -> ops.Plan | None:
        made.append(plan(*args, **how))
        return made[-1]

    monkeypatch.setattr(ops, "plan", counted)
    return made


def test_forward_passes_that_are_alike_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mux, _ = two_layers()
    a, b = ([name] * 4 for name in ("a2", "a3"))
    x = torch.randn(4, 24)
    with torch.no_grad():
        with mux.route(a):
            want = model(x)
            made = planned(monkeypatch)
            assert torch.equal(model(x), want) and not made
            mux.add_adapter("new", {"0": (torch.ones(2, 24), torch.ones(24, 2))}, alpha=2)
            assert torch.equal(model(x), want) and not made
            mux.remove("a5")
            assert torch.equal(model(x), want) and len(made) == 1
        with mux.route(a):  # another block with equal rows, as a server opens one for each step
            assert torch.equal(model(x), want) and len(made) == 1
        with mux.route(b):
            assert not torch.equal(model(x), want) and len(made) == 2
        with mux.route(a):
            assert torch.equal(model(x), want) and len(made) == 3


def test_forward_passes_with_other_weights_do_not() -> None:
    model, mux, _ = two_layers()
    x = torch.randn(2, 24)
    with torch.no_grad():
        with mux.route([{"a2": 1.0}, {"a3": 1.0}]):
            whole = model(x)
        with mux.route([{"a2": 0.5}, {"a3": 1.0}]):
            half = model(x)
        with mux.route([{"a2": 0.5}, "a3"]):
            assert torch.equal(model(x), half)
    torch.testing.assert_close(half[1], whole[1])  # the product's alpha may differ, and its bits
    assert not torch.allclose(half[0], whole[0])


def test_forward_passes_with_indices_of_equal_values_share_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However their numbers lie in memory."""
    model, mux, _ = two_layers()
    two, three = mux.adapters["a2"], mux.adapters["a3"]
    index, x = torch.tensor([[two, three], [three, two], [-1, two]]), torch.randn(3, 24)
    other = torch.stack([index[:, 0], index[:, 1]]).T  # by columns
    made = planned(monkeypatch)
    with torch.no_grad():
        with mux.route(index):
            want = model(x)
        with mux.route(other):
            assert not other.is_contiguous() and torch.equal(model(x), want) and len(made) == 1
        with mux.route(index.flip(0)):
            assert not torch.equal(model(x), want) and len(made) == 2


@pytest.mark.parametrize("shapes", [((2, 2), (4, 1)), ((4, 1), (2, 2)), ((2, 2), (2, 3))], ids=str)
def test_forward_passes_of_other_batches_do_not(shapes: tuple[tuple[int, int], ...]) -> None:
    """As many rows, that belong to samples in another order."""
    model, mux, _ = two_layers()
    with torch.no_grad(), mux.route(["a2", "a3"], expand="tile"):
        for shape in shapes:
            x = torch.randn(*shape, 24)
            got = model(x)
            with mux.route(["a2", "a3"] * (shape[0] // 2)):
                assert torch.equal(model(x), got)


def test_a_plan_of_inference_mode_serves_training() -> None:
    model, mux, _ = two_layers()
    x = torch.randn(2, 24)
    with mux.route(["a2", "a3"]):
        with torch.inference_mode():
            want = model(x)
        got = model(x.requires_grad_())
        got.sum().backward()
    assert_close(got.detach(), want.double())
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_nothing_is_copied_per_row() -> None:
    """A and B of 2 MB, in use by 512 rows: a copy for each row would be 512 MB."""
    case = LayerCase(ranks=(16,) * 8, size=(2048, 2048), bias=False)
    index = torch.arange(8).repeat(64)[torch.randperm(512)][:, None]
    x = case.x(512)
    with torch.no_grad():
        done = work(lambda: case.layer(x, lora_mux.Routing(index)))
    # The base's y, the moved x, h, and what is added: three tensors of 4 MB and a small one.
    assert done.allocated_bytes < 16e6


def test_a_copy_of_a_plan_prepares_for_its_own_pools() -> None:
    """What is kept for a pool holds views of it, which no copy and no file is to take along."""
    case = LayerCase(ranks=(4, 4))
    index, x = torch.tensor([[0], [1]]), case.x(2)
    with torch.no_grad():
        y = case.check(x, index)
        routing = lora_mux.Routing(torch.tensor(case.handles)[index])
        for twin in (copy.deepcopy(case.layer), pickle.loads(pickle.dumps(case.layer))):
            twin.mux_pool.A_rows.zero_()
            assert torch.equal(twin(x, routing), case.linear(x))
        assert torch.equal(case.layer(x, routing), y)
