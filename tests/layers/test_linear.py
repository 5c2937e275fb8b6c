"""MuxLinear against fp64, on named cases and on drawn ones, and what a drop-in must keep."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_mux
from layer import ROUTINGS, LayerCase, check_relative_norm
from lora_mux.ops.cpu import plan as cpu
from oracle import Adapter, forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(96, 160), (33, 41), (1024, 512)], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_values(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    case = LayerCase(size=size, dtype=dtype)
    case.check(case.x(4), torch.tensor(ROUTINGS[name]))


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_scale_each_selection(dtype: torch.dtype) -> None:
    case = LayerCase(dtype=dtype)
    index = torch.tensor(ROUTINGS["subsets"])
    case.check(case.x(4), index, torch.tensor([[0.5, -2.0, 0.0]] * 4))


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("scaling", [0.0, -1.5, 4.0])
def test_scaling_of_any_sign(scaling: float) -> None:
    case = LayerCase(ranks=())
    A, B = torch.randn(3, 96), torch.randn(160, 3)
    case.handles = [case.layer.add_adapter("a", A, B, scaling=scaling)]
    case.adapters = [Adapter(A, B, scaling)]
    case.check(case.x(2), torch.tensor([[0], [-1]]))


@pytest.mark.usefixtures("each_form")
def test_bias_is_scaled_and_weighted_like_the_rest() -> None:
    case = LayerCase()
    adapter = Adapter(torch.randn(7, 96), torch.randn(160, 7), 2.5, torch.randn(160))
    handle = case.layer.add_adapter("biased", adapter.A, adapter.B, scaling=2.5, bias=adapter.bias)
    case.handles.append(handle)
    case.adapters.append(adapter)
    index = torch.tensor([[4, -1], [0, 4], [-1, -1], [4, 4]])
    case.check(case.x(4), index, torch.tensor([[0.5, 1.0], [1.0, -2.0], [1.0, 1.0], [1.0, 2.0]]))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_drawn_cases(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    size = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 130))
    ranks = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=6)))
    rows, J = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    case = LayerCase(ranks, size, dtype, bias=data.draw(st.booleans()))
    index = torch.randint(-1, len(ranks), (rows, J))
    check_relative_norm(case, index, torch.randn(rows, J) if data.draw(st.booleans()) else None)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=3000, deadline=None)
def test_many_drawn_cases(data: st.DataObject) -> None:
    test_drawn_cases.hypothesis.inner_test(data)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 3), (0,), (2, 0)], ids=str)
def test_one_routing_row_per_row(shape: tuple[int, ...]) -> None:
    case = LayerCase()
    x = case.x(*shape)
    rows = x[..., 0].numel()
    y = case.check(x, torch.arange(rows)[:, None] % 4)
    assert y.shape == (*shape, 160)


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 1)], ids=str)
def test_one_routing_row_per_sample(shape: tuple[int, ...]) -> None:
    case = LayerCase()
    x = case.x(*shape)
    index = torch.tensor([[0, 1], [-1, -1], [2, -1], [3, 0]])
    handles = torch.tensor([*case.handles, -1])
    by_sample = case.layer(x, lora_mux.Routing(handles[index]))
    repeats = x[0, ..., 0].numel()
    by_row = case.check(x, index.repeat_interleave(repeats, 0))
    assert torch.equal(by_sample, by_row)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 13, 24])
def test_rows_that_only_divide_are_refused(rows: int) -> None:
    case = LayerCase()
    routing = lora_mux.Routing(torch.zeros(rows, 1, dtype=torch.int64))
    with pytest.raises(lora_mux.errors.RoutingError, match=rf"12 rows.*or 4.*got {rows}"):
        case.layer(case.x(4, 3), routing)


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an ulp from the base's tensor plus the exact delta: h and delta are not rounded.

    Products in bf16 on CPUs that have them do round h; test_cpu has their bound.
    """
    monkeypatch.setattr(cpu, "bf16_is_fast", lambda: False)
    case = LayerCase(dtype=dtype)
    x, chosen = case.x(64), torch.tensor([[0, 1, 2, 3]] * 64)
    y = case.layer(x, lora_mux.Routing(torch.tensor(case.handles)[chosen]))
    rows = [[(adapter, 1.0) for adapter in case.adapters]] * 64
    with torch.no_grad():
        zero = nn.Linear(96, 160, bias=False)
        zero.weight.zero_()
        exact = case.linear(x).double() + forward(zero, x, rows)
    error = (y.double() - exact).abs()
    # 1e-3: where the exact value lies between two floats, fp32's own error may decide.
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-3 * error.max()).all()


@pytest.mark.usefixtures("each_form")
def test_strided_input() -> None:
    case = LayerCase()
    case.check(case.x(8)[::2], torch.tensor(ROUTINGS["subsets"]))
    wide = torch.randn(4, 200)
    case.check(wide[:, 7 : 7 + 96], torch.tensor(ROUTINGS["subsets"]))


@pytest.mark.usefixtures("each_form")
def test_int32_index_and_half_weights() -> None:
    case = LayerCase()
    x, index = case.x(2), torch.tensor([[0, 1], [2, -1]])
    weight = torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    y = case.layer(x, lora_mux.Routing(index.int(), weight.half()))
    assert torch.equal(y, case.layer(x, lora_mux.Routing(index, weight)))


@pytest.mark.usefixtures("each_form")
def test_fp64_is_computed_in_fp64() -> None:
    case = LayerCase(ranks=(3, 8), dtype=torch.float64)
    x, index = case.x(2), torch.tensor([[0, 1], [1, -1]])
    y = case.layer(x, lora_mux.Routing(index))
    a, b = ((adapter, 1.0) for adapter in case.adapters)
    truth = forward(case.linear, x, [[a, b], [b]])
    torch.testing.assert_close(y, truth, rtol=1e-13, atol=1e-13)


def test_gradients() -> None:
    case = LayerCase(ranks=(3, 5), size=(6, 4), dtype=torch.float64)
    index = torch.tensor([[0, 1], [1, -1], [-1, -1]])

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return case.layer(x, lora_mux.Routing(index, weight))  # type: ignore[no-any-return]

    x = case.x(3).requires_grad_()
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weight))


def test_no_adapters_in_the_batch_is_the_base() -> None:
    case = LayerCase()
    x = case.x(3)
    base = case.linear(x)
    assert torch.equal(case.layer(x), base)
    assert torch.equal(case.layer(x, lora_mux.Routing(torch.full((3, 2), -1))), base)


class Foreign(nn.Module):
    """A linear of somebody else's make: sizes and a forward, and a weight not to be looked at."""

    in_features, out_features = 8, 4

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the base's weight was read")

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4] * 2


@pytest.mark.usefixtures("each_form")
def test_base_rows_keep_every_bit() -> None:
    """-0.0 + 0.0 is 0.0: a base row must not even be added to."""
    base = Foreign()
    layer = lora_mux.MuxLinear(base)
    a = layer.add_adapter("a", torch.ones(2, 8), torch.ones(4, 2), alpha=2)
    x = torch.full((2, 8), -0.0)
    y = layer(x, lora_mux.Routing(torch.tensor([[a], [-1]])))
    assert base(x).signbit().all()
    assert y[1].signbit().all() and not y[0].signbit().any()


class TestDropIn:
    def test_is_a_new_module_that_shares_parameters(self) -> None:
        linear = nn.Linear(8, 4)
        layer = lora_mux.MuxLinear(linear)
        assert type(linear) is nn.Linear and not hasattr(linear, "mux_pool")
        assert isinstance(layer, nn.Linear) and isinstance(layer, lora_mux.MuxLinear)
        assert layer.weight is linear.weight and layer.bias is linear.bias
        assert (layer.in_features, layer.out_features) == (8, 4)

    def test_hooks_and_buffers_are_its_own(self) -> None:
        linear = nn.Linear(8, 4)
        layer = lora_mux.MuxLinear(linear)
        layer.register_buffer("extra", torch.zeros(1))
        layer.register_forward_hook(lambda *args: None)
        assert "extra" not in linear.state_dict() and not linear._forward_hooks

    def test_says_what_it_holds(self) -> None:
        case = LayerCase(ranks=(2, 5), size=(8, 4))
        case.layer.add_adapter("b", torch.ones(3, 8), torch.ones(4, 3), alpha=1, bias=torch.ones(4))
        says = "MuxLinear(\n  in_features=8, out_features=4, bias=True, adapters=3, rank_rows=11\n"
        assert repr(case.layer).startswith(says)
        assert lora_mux.MuxLinear(Foreign()).extra_repr() == "adapters=0, rank_rows=0"

    def test_state_dict_is_the_linears(self) -> None:
        case = LayerCase()
        assert list(case.layer.state_dict()) == ["weight", "bias"]
        case.layer.load_state_dict(nn.Linear(96, 160).state_dict())

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, how: str) -> None:
        case = LayerCase()
        if how == "deepcopy":
            twin = copy.deepcopy(case.layer)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(case.layer))
        else:
            buffer = io.BytesIO()
            torch.save(case.layer, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        x, routing = case.x(2), lora_mux.Routing(torch.tensor([[0], [2]]))
        assert torch.equal(twin(x, routing), case.layer(x, routing))
        twin.remove_adapter("a0")
        assert "a0" in case.layer.adapters

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_to_dtype(self, dtype: torch.dtype) -> None:
        case = LayerCase()
        scaling = case.layer.mux_pool.scaling.clone()
        case.layer.to(dtype)
        assert case.layer.mux_pool.A_rows.dtype == dtype
        assert torch.equal(case.layer.mux_pool.scaling, scaling)  # not rounded to half
        case.adapters = [Adapter(a.A.to(dtype), a.B.to(dtype), a.scaling) for a in case.adapters]
        case.check(case.x(4).to(dtype), torch.tensor(ROUTINGS["subsets"]))

    def test_loading_inside_inference_mode_does_not_poison_autograd(self) -> None:
        linear = nn.Linear(8, 4)
        layer = lora_mux.MuxLinear(linear)
        with torch.inference_mode():
            a = layer.add_adapter("a", torch.ones(2, 8), torch.ones(4, 2), alpha=2)
        x = torch.ones(1, 8, requires_grad=True)
        layer(x, lora_mux.Routing(torch.tensor([[a]]))).sum().backward()
        assert x.grad is not None
        layer.add_adapter("b", torch.ones(2, 8), torch.ones(4, 2), alpha=2)

    def test_never_reads_the_base_weight(self) -> None:
        layer = lora_mux.MuxLinear(Foreign())
        a = layer.add_adapter("a", torch.ones(1, 8), torch.ones(4, 1), alpha=1)
        x = torch.randn(3, 8)
        y = layer(x, lora_mux.Routing(torch.tensor([[a], [-1], [a]])))
        torch.testing.assert_close(y[0], x[0, :4] * 2 + x[0].sum())
        assert torch.equal(y[1], x[1, :4] * 2)
