"""backend="triton" from the outside: MuxLinear and Mux, in Triton's interpreter."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_mux
from layer import ROUTINGS, LayerCase, check_relative_norm
from lora_mux import Routing, ops
from lora_mux.kernels import config, installed, launch
from lora_mux.layers.kinds import plain_weight
from lora_mux.ops import dispatch, on_triton
from oracle import Adapter, assert_close, forward

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_values(name: str, dtype: torch.dtype) -> None:
    case = LayerCase(dtype=dtype, backend="triton")
    with torch.no_grad():
        case.check(case.x(4), torch.tensor(ROUTINGS[name]))


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_drawn_cases(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    size = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 130))
    ranks = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=6)))
    rows, J = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    case = LayerCase(ranks, size, dtype, bias=data.draw(st.booleans()), backend="triton")
    index = torch.randint(-1, len(ranks), (rows, J))
    check_relative_norm(case, index, torch.randn(rows, J) if data.draw(st.booleans()) else None)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_many_drawn_cases(data: st.DataObject) -> None:
    test_drawn_cases.hypothesis.inner_test(data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    case = LayerCase(backend="triton")
    x = case.x(*shape)
    with torch.no_grad():
        y = case.check(x, torch.arange(x[..., 0].numel())[:, None] % 4)
    assert y.shape == (*shape, 160)


def test_one_routing_row_per_sample() -> None:
    case = LayerCase(backend="triton")
    x, index = case.x(2, 3), torch.tensor([[0, 1], [2, -1]])
    with torch.no_grad():
        by_sample = case.layer(x, Routing(torch.tensor([*case.handles, -1])[index]))
        by_row = case.check(x, index.repeat_interleave(3, 0))
    assert torch.equal(by_sample, by_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_references(dtype: torch.dtype) -> None:
    """To x, y and weight, of duplicates and biases too, where the reference is autograd's."""
    case = LayerCase(ranks=(3, 20, 1), size=(24, 40), dtype=dtype, backend="triton")
    bias = torch.randn(40)
    A, B = torch.randn(5, 24), torch.randn(40, 5)
    handles = [*case.handles, case.layer.add_adapter("b", A, B, alpha=5, bias=bias), -1]
    index = torch.tensor(handles)[torch.tensor([[0, 1], [1, 1], [-1, -1], [3, 0], [2, 4]])]
    twin = lora_mux.MuxLinear(case.linear, backend="reference")
    for i, adapter in enumerate(case.adapters):
        twin.add_adapter(f"a{i}", adapter.A, adapter.B, scaling=adapter.scaling)
    twin.add_adapter("b", A, B, alpha=5, bias=bias)
    x, weight, upstream = case.x(5), torch.randn(5, 2), torch.randn(5, 40).to(dtype)
    found = []
    for layer in (case.layer, twin):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = layer(inputs[0], Routing(index, inputs[1]))
        y.backward(upstream)
        found.append((*(t.grad for t in inputs), layer.weight.grad.clone()))  # type: ignore[union-attr]
        layer.weight.grad = None
    for got, want in zip(*found, strict=True):
        scale = float(want.float().norm())
        units = 8 if dtype == torch.float32 else 2
        assert float((got - want).float().norm()) <= units * torch.finfo(dtype).eps * scale


def test_adapters_come_and_go_before_the_backward() -> None:
    """Others than those in use, whose rank rows stay where they are."""
    model, mux = blocks()
    mux.reserve(8, 8)
    x = torch.randn(2, 16, requires_grad=True)
    with mux.route(["b", None]):
        y = model(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    mux.add_adapter("comes", {"0": (torch.randn(3, 16), torch.randn(24, 3))}, alpha=2)
    mux.remove("a")
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize("by_columns", [False, True])
def test_fused_whatever_lies_between_rows(by_columns: bool, apart: int) -> None:
    """A kernel that loads 16 bytes at once gets a copy of x, and no weight that lies by columns."""
    linear = nn.Linear(16, 32).half()
    if by_columns:
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    layer = lora_mux.MuxLinear(linear, backend="triton", fused=True)
    A, B = torch.randn(4, 16).half() / 4, torch.randn(32, 4).half() / 4
    handle = layer.add_adapter("a", A, B, scaling=0.5)
    x = torch.randn(3, 16 + apart).half()[:, :16]
    with torch.no_grad():
        assert (plain_weight(layer, x) is None) == by_columns
        y = layer(x, Routing(torch.tensor([[handle], [-1], [handle]])))
    adapter = [(Adapter(A, B, 0.5), 1.0)]
    assert_close(y, forward(linear, x, [adapter, [], adapter]))


def test_a_fused_layer_that_a_mode_looks_on() -> None:
    """As one that counts FLOPs. Then the launch is an operator, which the mode sees."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = lora_mux.MuxLinear(nn.Linear(16, 32).half(), backend="triton", fused=True)
    A, B = torch.randn(4, 16).half() / 4, torch.randn(32, 4).half() / 4
    routing = Routing(torch.tensor([[layer.add_adapter("a", A, B, scaling=0.5)], [-1]]))
    x = torch.randn(2, 16).half()
    with torch.no_grad():
        want = layer(x, routing)
        with Seen():
            got = layer(x, routing)
    assert torch.equal(got, want)
    assert [name for name in seen if "lora_mux" in name] == [
        "lora_mux.plan.default",
        "lora_mux.linear.default",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_before_and_after_its_first_adapter(dtype: torch.dtype) -> None:
    """It has no rank rows then that numbers could be looked up in."""
    base, x = nn.Embedding(11, 6).to(dtype), torch.randint(11, (2, 5))
    model = nn.Sequential(copy.deepcopy(base))
    mux = lora_mux.attach(model, ["0"], backend="triton")
    with torch.no_grad():
        assert torch.equal(model[0](x, Routing(torch.full((2, 1), -1))), base(x))
        A, B = torch.randn(3, 11).to(dtype), torch.randn(6, 3).to(dtype)
        handle = mux.add_adapter("a", {"0": (A, B)}, scaling=0.5)
        got = model[0](x, Routing(torch.tensor([[handle], [-1]]), torch.tensor([[2.0], [1.0]])))
    assert torch.equal(got[1], base(x)[1])
    want = base(x)[0].double() + A.double()[:, x[0]].T @ B.double().T
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_weights_of_a_batch_without_rows_have_gradients() -> None:
    case = LayerCase(ranks=(3,), size=(24, 40), backend="triton")
    weight = torch.ones(0, 2, requires_grad=True)
    index = torch.empty(0, 2, dtype=torch.int64)
    case.layer(case.x(0).requires_grad_(), Routing(index, weight)).sum().backward()
    assert weight.grad is not None and weight.grad.shape == (0, 2)


@pytest.mark.parametrize("stride", [0, 2])
def test_a_bias_of_any_stride(stride: int) -> None:
    linear = nn.Linear(16, 32).half()
    numbers = torch.randn(64).half()
    linear.bias = nn.Parameter(numbers[::2] if stride else numbers[:1].expand(32))
    layer = lora_mux.MuxLinear(linear, backend="triton", fused=True)
    handle = layer.add_adapter("a", torch.randn(4, 16) / 4, torch.randn(32, 4) / 4, scaling=1.0)
    x, routing = torch.randn(3, 16).half(), Routing(torch.tensor([[handle], [-1], [handle]]))
    twin = copy.deepcopy(layer)
    twin.mux_settings = ops.Settings("reference")
    with torch.no_grad():
        torch.testing.assert_close(layer(x, routing), twin(x, routing), rtol=4e-3, atol=4e-3)


def test_second_gradients_reach_the_input() -> None:
    case = LayerCase(ranks=(3,), size=(8, 6), backend="triton")
    x = case.x(2).requires_grad_()
    upstream = torch.randn(2, 6, requires_grad=True)
    y = case.layer(x, Routing(torch.tensor([[case.handles[0]], [-1]])))
    (first,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), upstream)
    jacobian = case.linear.weight.detach().repeat(2, 1, 1)
    jacobian[0] += case.adapters[0].scaling * case.adapters[0].B @ case.adapters[0].A
    want = torch.einsum("mnk,mk->mn", jacobian, 2 * torch.einsum("mnk,mn->mk", jacobian, upstream))
    torch.testing.assert_close(second, want)


class Shared(nn.Module):
    """A linear of somebody else's make, which keeps what it returns."""

    in_features, out_features = 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept


def test_a_foreign_bases_tensor_is_not_written_to() -> None:
    base = Shared()
    layer = lora_mux.MuxLinear(base, backend="triton")
    a = layer.add_adapter("a", torch.ones(1, 8), torch.ones(4, 1), alpha=1)
    with torch.no_grad():
        y = layer(torch.ones(3, 8), Routing(torch.tensor([[a], [-1], [a]])))
    assert y[:, 0].tolist() == [8.0, 0.0, 8.0] and not base.kept.any()


def test_base_rows_keep_every_bit() -> None:
    case = LayerCase(backend="triton", dtype=torch.bfloat16)
    x = case.x(5)
    index = torch.tensor([[0], [-1], [2], [-1], [-1]])
    with torch.no_grad():
        y = case.check(x, index)
        assert torch.equal(y[[1, 3, 4]], case.linear(x)[[1, 3, 4]])
        nothing = case.layer(x, Routing(torch.full((5, 2), -1)))
        assert torch.equal(nothing, case.linear(x))


class TestHandles:
    """The index is read by the kernel: it raises nothing, and answers nothing wrong either."""

    @pytest.mark.parametrize("handle", [3, 77, 65535, 1 << 16, 2**31 - 1, 2**62])
    def test_never_given_out(self, handle: int) -> None:
        case = LayerCase(ranks=(2, 3, 4), backend="triton")
        x = case.x(3)
        routing = Routing(
            torch.tensor([[case.handles[0], -1], [case.handles[1], handle], [-1] * 2])
        )
        with torch.no_grad():
            y = case.layer(x, routing)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
        with pytest.raises(lora_mux.errors.UnknownAdapterError, match=r"1 of 3 rows.*NaN: 1$"):
            routing.check()

    @pytest.mark.parametrize("tenant", [False, True])
    def test_freed(self, tenant: bool) -> None:
        case = LayerCase(ranks=(2, 3, 4), backend="triton")
        x, index = case.x(2), torch.tensor([[case.handles[1]], [case.handles[0]]])
        routing = Routing(index)
        with torch.no_grad():
            before = case.layer(x, routing)
            routing.check()
            case.layer.remove_adapter("a1")
            if tenant:
                case.layer.add_adapter("t", torch.ones(3, 96), torch.ones(160, 3), alpha=1)
            after = case.layer(x, routing)
        assert after[0].isnan().all() and torch.equal(after[1], before[1])
        with pytest.raises(lora_mux.LoraMuxError, match=r"NaN: 0$"):
            routing.check()

    def test_in_a_layer_without_adapters(self) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 3), backend="triton")
        with torch.no_grad():
            y = layer(torch.ones(2, 4), Routing(torch.tensor([[5], [-1]])))
        assert y[0].isnan().all() and y[1].isfinite().all()

    def test_many_samples_are_named_in_short(self) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 3), backend="triton")
        routing = Routing(torch.tensor([[5]]))
        layer(torch.ones(1, 12, 4), routing)
        with pytest.raises(lora_mux.LoraMuxError, match=r"12 of 12 rows.*: 0, 1, .*, 9, \.\.\.$"):
            routing.check()


class TestRefusals:
    def test_dtype(self) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 3).double(), backend="triton")
        a = layer.add_adapter("a", torch.ones(1, 4), torch.ones(3, 1), alpha=1)
        with pytest.raises(lora_mux.errors.BackendError, match=r"`backend`.*float64"):
            layer(torch.ones(1, 4).double(), Routing(torch.tensor([[a]])))

    def test_where_no_kernel_can_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 3), backend="triton")
        a = layer.add_adapter("a", torch.ones(1, 4), torch.ones(3, 1), alpha=1)
        monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
        with pytest.raises(lora_mux.errors.BackendError, match=r"CUDA and ROCm, got x on cpu"):
            layer(torch.ones(1, 4), Routing(torch.tensor([[a]])))

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(installed, "PROBLEM", installed.problem())
        says = "needs triton 3.6 or newer, which is not installed"
        with pytest.raises(lora_mux.errors.BackendError, match=says):
            lora_mux.MuxLinear(nn.Linear(4, 3), backend="triton")
        assert "which is not installed" in ops.backend_reason()

    @pytest.mark.parametrize(
        ("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.10", True)]
    )
    def test_an_old_triton(self, version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("triton.__version__", version)
        assert installed.problem() == ("" if fits else f"3.6 or newer, got {version}")

    def test_auto_raises_on_the_cpu(self) -> None:
        case = LayerCase(backend="auto")
        with pytest.raises(lora_mux.LoraMuxError, match="never given out"):
            case.layer(case.x(1), Routing(torch.tensor([[99]])))


def blocks(**how: Any) -> tuple[nn.Module, lora_mux.Mux]:
    """Two layers, the second of which adapter "a" leaves alone."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    mux = lora_mux.attach(model, backend="triton", **how)
    first, second = ((torch.randn(3, k), torch.randn(n, 3)) for k, n in ((16, 24), (24, 8)))
    mux.add_adapter("a", {"0": first}, alpha=3)
    mux.add_adapter("b", {"0": first, "2": second}, scaling=0.7)
    return model, mux


def by_reference(model: nn.Module, x: Tensor, rows: Any = None) -> Tensor:
    """What a copy with the same adapters answers, computed by the reference.

    Args:
        rows: those of the block around; None = the sticky ones, which the copy has as well.
    """
    twin = copy.deepcopy(model)
    settings = ops.Settings("reference")
    for module in twin.modules():
        if isinstance(module, lora_mux.MuxLinear):
            module.mux_settings = settings
            assert module.mux_router is not None
            module.mux_router.settings = settings
    return twin(x, adapter_names=rows)  # type: ignore[no-any-return]


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


ROWS = ["a", None, ("a", "b"), {"a": 0.4, "b": -1.0}]


@pytest.mark.usefixtures("inference")
class TestModel:
    def test_routes(self) -> None:
        model, mux = blocks()
        x = torch.randn(4, 16)
        with mux.route(ROWS):
            torch.testing.assert_close(model(x), by_reference(model, x, ROWS))
        tokens = torch.randn(4, 5, 16)
        with mux.route(ROWS):
            torch.testing.assert_close(model(tokens), by_reference(model, tokens, ROWS))
        mux.set_adapter({"b": 2.0})
        torch.testing.assert_close(model(x), by_reference(model, x))
        with mux.disable_adapter():
            base = model(x)
        mux.set_adapter(None)
        assert torch.equal(model(x), base)

    def test_one_plan_for_a_forward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, mux = blocks()
        calls = []
        plan = ops.plan
        monkeypatch.setattr(ops, "plan", lambda *a, **k: calls.append(a) or plan(*a, **k))
        with mux.route(ROWS):
            for _ in range(2):
                model(torch.randn(4, 16))
        assert len(calls) == 2

    def test_batch_invariant(self) -> None:
        model, mux = blocks(batch_invariant=True)
        x = torch.randn(4, 16)
        # The base layers are torch's, whose bits may depend on the batch: none here.
        for layer in (model[0], model[2]):
            layer.weight.zero_()
        with mux.route(ROWS):
            whole = model(x)
        for row, entry in enumerate(ROWS):
            with mux.route([entry]):
                assert torch.equal(model(x[row : row + 1])[0], whole[row])

    def test_names_outlived_by_their_adapter_raise_on_the_host(self) -> None:
        model, mux = blocks()
        x = torch.randn(1, 16)
        mux.set_adapter("a")
        model(x)
        mux.remove("a")
        with pytest.raises(lora_mux.LoraMuxError, match="removed"):
            model(x)
        mux.set_adapter("b")
        model(x)

    def test_an_index_tensor_with_check(self) -> None:
        model, mux = blocks()
        index = torch.tensor([[mux.adapters["a"]], [-1]])
        with mux.route(index) as routing:
            model(torch.randn(2, 16))
            routing.check()

    def test_adapters_that_come_and_go(self) -> None:
        """Slots and rank rows are used again; the answers stay those of the reference."""
        model, mux = blocks()
        x = torch.randn(2, 16)
        for step in range(6):
            rank = 1 + 7 * step
            weights = {"2": (torch.randn(rank, 24), torch.randn(8, rank))}
            mux.add_adapter(f"n{step}", weights, scaling=1.0)
            rows = [f"n{step}", ("b", f"n{step}")]
            with mux.route(rows):
                want = by_reference(model, x, rows)
                torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
            if step % 2:
                mux.remove(f"n{step - 1}")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_against_peft(name: str, tmp_path: Path) -> None:
    """A whole model in one mixed batch, each row against PEFT with its adapter alone."""
    peft_oracle = pytest.importorskip("peft_oracle")
    base = peft_oracle.MODELS[name]()
    known = peft_oracle.configs(name)
    wanted = {n: known[n] for n in ("plain", "rslora", "biased", "patterns")}
    oracle = peft_oracle.save_adapters(base, wanted, tmp_path)
    mux = lora_mux.attach(base, backend="triton")
    for adapter in wanted:
        mux.load(adapter, tmp_path / adapter)
    ids = torch.randint(1, 255, (len(wanted) + 1, 3))
    with torch.no_grad(), mux.route([*wanted, None]):
        got = base(input_ids=ids).logits
    for row, adapter in enumerate(wanted):
        oracle.base_model.set_adapter(adapter)
        with torch.no_grad():
            want = oracle(input_ids=ids[row : row + 1]).logits[0]
        assert (got[row] - want).abs().max() < 2e-4
    with torch.no_grad(), oracle.disable_adapter():
        want = oracle(input_ids=ids[-1:]).logits[0]
    assert (got[-1] - want).abs().max() < 2e-4


def capturing(patch: pytest.MonkeyPatch) -> None:
    """Say that a CUDA graph is being captured, to the router and to what makes plans."""
    for module in (ops, dispatch):
        patch.setattr(module, "capturing", lambda device: True)


@pytest.mark.usefixtures("inference")
class TestGraphs:
    """What a CUDA graph needs of the host: here capturing is only said, and replaying is looking.

    tests/support/launches.py replays recorded launches, tests/kernels/test_gpu.py real graphs.
    """

    @pytest.fixture
    def captured(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """capture(model, x) -> the routing that the graph would read."""

        def capture(model: nn.Module, mux: lora_mux.Mux, x: Tensor) -> Routing:
            model(x)
            with monkeypatch.context() as patch:
                capturing(patch)
                model(x)
            return mux._router.captured[-1].routing

        return capture

    def test_its_routing_follows_the_route_in_force(self, captured: Any) -> None:
        model, mux = blocks()
        x = torch.randn(2, 16)
        a, b = mux.adapters.values()
        mux.set_route([{"a": 0.5, "b": 2.0}, None])
        graph = captured(model, mux, x)
        assert graph.index.tolist() == [[a, b], [-1, -1]]
        address = graph.index.data_ptr(), graph.weight.data_ptr()
        mux.set_route(["b", "a"])
        assert graph.index.tolist() == [[b, -1], [a, -1]]
        assert graph.weight[:, 0].tolist() == [1.0, 1.0]
        with mux.disable_adapter():
            assert (graph.index == -1).all()
        assert graph.index.tolist() == [[b, -1], [a, -1]]
        mux.set_adapter("b")  # for the whole batch
        assert graph.index.tolist() == [[b, -1], [b, -1]]
        mux.set_adapter(None)
        assert (graph.index == -1).all()
        assert address == (graph.index.data_ptr(), graph.weight.data_ptr())

    @pytest.mark.parametrize(
        "route",
        [
            lambda mux: mux.route(["a"]),
            lambda mux: mux.route(["a", "b", None]),
            lambda mux: mux.route([("a", "b"), None]),
            lambda mux: mux.route_tokens(["a", "b"]),
        ],
        ids=["fewer rows", "more rows", "more places", "other rows"],
    )
    def test_a_route_that_does_not_fit_is_not_answered(self, route: Any, captured: Any) -> None:
        model, mux = blocks()
        x = torch.randn(2, 16)
        mux.set_route(["a", "b"])
        graph = captured(model, mux, x)
        with route(mux):
            assert not set(graph.index.flatten().tolist()) & {-1, *mux.adapters.values()}
            assert model[0](x, graph).isnan().all()
        assert graph.index.tolist() == [[h] for h in mux.adapters.values()]

    def test_its_pool_stays_in_place(self, captured: Any) -> None:
        model, mux = blocks()
        mux.reserve(adapters=4, rank=5)
        mux.set_route(["a", "b"])
        captured(model, mux, torch.randn(2, 16))
        before = [buffer.data_ptr() for buffer in model.buffers()]

        def add(name: str, rank: int) -> None:
            mux.add_adapter(name, {"0": (torch.ones(rank, 16), torch.ones(24, rank))}, alpha=1)

        add("c", 5)
        mux.remove("a")
        add("d", 4)
        add("e", 5)
        names = list(mux.adapters)
        for name, rank, says in (("f", 5, "4 adapters in 20 rank rows"), ("g", 6, "rank 5")):
            with pytest.raises(lora_mux.errors.PoolCapacityError, match=says):
                add(name, rank)
            assert list(mux.adapters) == names
        with pytest.raises(lora_mux.errors.PoolCapacityError, match="before capturing"):
            mux.reserve(adapters=100, rank=5)
        assert before == [buffer.data_ptr() for buffer in model.buffers()]

    def test_a_layers_pool_stays_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 3), backend="triton")
        layer.reserve(adapters=2, rank=2)
        a = layer.add_adapter("a", torch.ones(2, 4), torch.ones(3, 2), alpha=1)
        capturing(monkeypatch)
        layer(torch.ones(1, 4), Routing(torch.tensor([[a]])))
        monkeypatch.undo()
        layer.add_adapter("b", torch.ones(2, 4), torch.ones(3, 2), alpha=1)
        with pytest.raises(lora_mux.errors.PoolCapacityError, match="rank 1 beside 2 adapters"):
            layer.add_adapter("c", torch.ones(1, 4), torch.ones(3, 1), alpha=1)

    def test_weights_that_need_gradients_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A graph has no backward that would find them."""
        model, mux = blocks()
        index = torch.tensor([[handle] for handle in mux.adapters.values()])
        weights, x = torch.ones(2, 1, requires_grad=True), torch.randn(2, 16)
        with torch.enable_grad(), monkeypatch.context() as patch:
            mux.set_route(index, weights)
            model(x)
            capturing(patch)
            with pytest.raises(lora_mux.errors.RoutingError, match="while a CUDA graph.*detach"):
                model(x)
        mux.set_route(index, weights.detach())  # the way out
        want = model(x)
        capturing(monkeypatch)
        assert torch.equal(model(x), want) and len(mux._router.captured._all) == 1

    def test_capturing_wants_a_run_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, mux = blocks()
        mux.set_route(["a", "b"])
        capturing(monkeypatch)
        with pytest.raises(lora_mux.errors.RoutingError, match="once under this route before"):
            model(torch.randn(2, 16))


def test_fused_is_no_launch_where_B_stands_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """expand alone reads an engine's pool."""
    monkeypatch.setattr(launch, "stream_number", lambda device: 0)
    plan: Any = SimpleNamespace(block_m=config.fused_tile_rows(4), slots=torch.zeros(4, 1))
    rows: Any = SimpleNamespace(B_rows=torch.zeros(2, 8, 16))
    how: Any = None
    assert on_triton.linear(torch.zeros(4, 16), torch.zeros(8, 16), None, rows, plan, how) is None
