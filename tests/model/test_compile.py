"""Whole attached models under torch.compile and torch.export: one graph for every routing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_mux
from lora_mux import ops
from lora_mux.routes.compiled import ROUTERS
from peft_oracle import llama

pytestmark = pytest.mark.usefixtures("no_old_graphs")

OLD = torch.__version__.startswith("2.6.")
strict_export = pytest.mark.skipif(OLD, reason="dynamo of torch 2.6 does not say that it exports")
whole_llama = pytest.mark.skipif(OLD, reason="torch 2.6 does not trace transformers' own wrapper")

ROUTES: dict[str, Any] = {
    "subsets": ["a", None, ("a", "b", "c")],
    "weights": [{"b": -0.5}, {"c": 0.0, "a": 2.0}, "b"],
    "base": [None, None, None],
}
KEPT: dict[str, Any] = {"one": "a", "several": ["c", "a"], "none": None}


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def add(mux: lora_mux.Mux, model: nn.Module, names: str = "abc") -> list[int]:
    handles = []
    for rank, name in enumerate(names, 2):
        weights = {}
        for path in mux.targets:
            layer: Any = model.get_submodule(path)
            A = torch.randn(rank, layer.in_features) / layer.in_features**0.5
            weights[path] = (A, torch.randn(layer.out_features, rank))
        handles.append(mux.add_adapter(name, weights, alpha=rank))
    return handles


def attached_llama() -> tuple[Any, lora_mux.Mux]:
    model = llama()
    del model.model.layers[1:]
    mux = lora_mux.attach(model)
    mux.reserve(adapters=4, rank=8)
    add(mux, model)
    return model, mux


def every_route(mux: lora_mux.Mux) -> Iterator[tuple[str, Any]]:
    """Blocks with each route of ROUTES and KEPT in force, then none, then disabled ones."""
    for name, rows in ROUTES.items():
        yield name, mux.route(rows)
    for name, adapter in KEPT.items():
        mux.set_adapter(adapter)
        yield name, contextlib.nullcontext()
    yield "disabled", disabled(mux)


@contextlib.contextmanager
def disabled(mux: lora_mux.Mux) -> Iterator[None]:
    with mux.route(ROUTES["subsets"]), mux.disable_adapter():
        yield


def compiled(run: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return torch.compile(run, fullgraph=True, backend="aot_eager", **how)


def small() -> tuple[nn.Module, lora_mux.Mux, list[int]]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    mux = lora_mux.attach(model)
    return model, mux, add(mux, model)


@whole_llama
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_one_graph_for_every_route_of_a_language_model(dynamic: bool) -> None:
    model, mux = attached_llama()
    ids = torch.randint(2, 250, (3, 7))
    run = compiled(model, dynamic=dynamic)
    cold = True
    answers = []
    for name, block in every_route(mux):
        with block:
            got = run(ids).logits
            assert torch.equal(run(ids).logits, got)
            if cold:
                first, cold = graphs(), False
            assert graphs() == first, name
            torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-5, msg=name)
            answers.append(got)
    base = answers[2]
    assert torch.equal(base, answers[5]) and torch.equal(base, answers[6])
    assert all(not torch.equal(base, answers[i]) for i in (0, 1, 3, 4))
    if dynamic:
        longer = torch.randint(2, 250, (3, 9))
        torch.testing.assert_close(run(longer).logits, model(longer).logits, rtol=0, atol=1e-5)
        assert graphs() == first


@torch.no_grad()
def test_the_first_graph_has_the_sticky_rows_that_were_chosen_before_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mux = lora_mux.attach(model)
    add(mux, model)
    x = torch.randn(3, 8)
    mux.set_adapter("b")
    want = model(x)
    mux.set_adapter("a")
    assert not torch.allclose(model(x), want)
    mux.set_adapter("b")
    with torch.enable_grad():  # so that the graph computes with the rows that it is given
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)


def test_the_model_inside_a_compiled_function() -> None:
    """Then the model's hooks are part of the graph."""
    model, mux, _ = small()
    run = compiled(lambda x: model(x).relu())
    x = torch.randn(3, 8)
    for name, block in every_route(mux):
        with block:
            torch.testing.assert_close(run(x), model(x).relu(), msg=name)
    assert graphs() == 1


@torch.no_grad()
def test_loading_and_removing_adapters_makes_no_graph() -> None:
    model, mux, _ = small()
    mux.reserve(adapters=8, rank=8)
    run, x = compiled(model), torch.randn(2, 8)
    with mux.route(["a", "b"]):
        run(x)
    before = graphs()
    mux.remove("b")
    add(mux, model, "defg")
    with mux.route(["g", ("a", "d")]):
        torch.testing.assert_close(run(x), model(x))
    assert graphs() == before


@torch.no_grad()
def test_other_kinds_of_routes() -> None:
    model, mux, handles = small()
    run, x = compiled(model, dynamic=False), torch.randn(2, 3, 8)
    twice = torch.cat([x, x])
    kinds: list[tuple[Callable[[], contextlib.AbstractContextManager[Any]], Tensor]] = [
        (lambda: mux.route_tokens(["a", None, "b", "c", None, "a"]), x),
        (lambda: mux.route(["a", None], expand="tile"), twice),
        (lambda: mux.route(["a", None], expand="interleave"), twice),
        (
            lambda: mux.route(["a", None], expand={"interleave": 2, "tile": 2}),
            twice.repeat(2, 1, 1),
        ),
        (lambda: mux.route(torch.tensor([handles[:2], [-1, -1]]), torch.rand(2, 2)), x),
    ]
    seen = []
    for block, batch in kinds:
        with block():
            got = run(batch)
            torch.testing.assert_close(got, model(batch))
            seen.append(got)
    assert not torch.equal(seen[1], seen[2])


class TestRowsOfAGraph:
    """What a graph asks for, which was made for rows of one kind: [rows, places], repeated or not.

    Another task of its thread may have opened another block since.
    """

    def ask(
        self,
        mux: lora_mux.Mux,
        rows: int = 2,
        places: int = 1,
        kind: str = "samples",
        more: str = "",
    ) -> Any:
        (number,) = (n for n, router in ROUTERS.items() if router is mux._router)
        index, weight = torch.full((rows, places), -9), torch.zeros(rows, places)
        return torch.ops.lora_mux.rows_now(index, weight, number, kind, more, False)

    def refused(self, mux: lora_mux.Mux, **kind: Any) -> None:
        with pytest.raises(lora_mux.errors.RoutingBusyError, match="another task has changed them"):
            self.ask(mux, **kind)

    def test_they_fit_or_are_refused(self) -> None:
        _, mux, (a, b, _) = small()
        with mux.route(["a", {"b": 0.5}]):
            index, weight = self.ask(mux)
            assert index.tolist() == [[a], [b]] and weight.tolist() == [[1.0], [0.5]]
            assert self.ask(mux, places=3)[0].tolist() == [[a, -1, -1], [b, -1, -1]]
            self.refused(mux, rows=3)
            self.refused(mux, kind="tokens")
            self.refused(mux, kind="first")
        with mux.route([("a", "b"), None]):
            assert self.ask(mux, places=2)[0].tolist() == [[a, b], [-1, -1]]
            self.refused(mux, places=1)
        with mux.route_tokens(["a", "b"]):
            assert self.ask(mux, kind="tokens")[0].tolist() == [[a], [b]]
            self.refused(mux)

    @pytest.mark.parametrize(
        ("expand", "said"), [("tile", "tile"), ({"tile": 3, "interleave": 2}, "tile3interleave2")]
    )
    def test_repeated_samples(self, expand: Any, said: str) -> None:
        _, mux, (a, b, _) = small()
        with mux.route(["a", "b"], expand=expand):
            assert self.ask(mux, more=said)[0].tolist() == [[a], [b]]
            self.refused(mux, more="interleave")

    def test_of_all_rows_alike(self) -> None:
        _, mux, (a, *_) = small()
        for kind in ("samples", "tokens", "first"):
            mux.set_adapter("a")
            assert self.ask(mux, 3, 2, kind)[0].tolist() == [[a, -1]] * 3
            mux.set_adapter(None)
            assert self.ask(mux, 3, 2, kind)[0].tolist() == [[-1, -1]] * 3

    def test_where_nobody_can_be_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The model is gone, or a CUDA graph is captured, which keeps what it is given."""
        _, mux, _ = small()
        given = torch.tensor([[5], [6]]), torch.tensor([[0.5], [0.25]])
        with mux.route(["a", "b"]):
            gone = torch.ops.lora_mux.rows_now(*given, 10**9, "samples", "", False)
            monkeypatch.setattr(ops, "capturing", lambda device: True)
            (number,) = (n for n, router in ROUTERS.items() if router is mux._router)
            captured = torch.ops.lora_mux.rows_now(*given, number, "samples", "", False)
        for made in (gone, captured):
            for one, other in zip(made, given, strict=True):
                assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


@torch.no_grad()
def test_a_wrong_batch_raises_compiled_too() -> None:
    model, mux, _ = small()
    run = compiled(model)
    with mux.route(["a", None, "b"]):
        run(torch.randn(3, 9, 8))
        with pytest.raises(lora_mux.errors.RoutingError, match="one entry per sample.*4.*, got 3"):
            model(torch.randn(4, 9, 8))
        with pytest.raises(Exception, match="one entry per sample"):
            run(torch.randn(4, 9, 8))
        torch.testing.assert_close(run(X := torch.randn(3, 9, 8)), model(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_gradients_to_inputs_and_weights() -> None:
    model, mux, handles = small()
    index = torch.tensor([handles[:2], [handles[2], -1]])
    x = torch.randn(2, 8, requires_grad=True)
    weights = torch.rand(2, 2, requires_grad=True)
    run = compiled(model)
    gradients = []
    for of in (model, run):
        with mux.route(index, weights):
            gradients.append(torch.autograd.grad(of(x).square().sum(), (x, weights)))
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
        assert bool((want != 0).any())


@whole_llama
@torch.no_grad()
def test_static_cache_and_compiled_forward() -> None:
    """generate() with one graph for prefill and one for decode, whatever is routed."""
    model, mux = attached_llama()
    ids = torch.randint(2, 250, (3, 6))
    settings = {"max_new_tokens": 5, "do_sample": False}
    eager = model.forward
    run = compiled(eager, dynamic=False)
    made = []
    for rows in ROUTES.values():
        with mux.route(rows):
            want = model.generate(ids, **settings)
            model.forward = run
            got = model.generate(ids, cache_implementation="static", **settings)
            del model.forward
        assert torch.equal(got, want)
        made.append(graphs())
    assert made == made[:1] * len(made)


class Served(nn.Module):
    """A model whose routing is an input."""

    def __init__(self, model: nn.Module, mux: lora_mux.Mux) -> None:
        super().__init__()
        self.model, self.mux = model, mux

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Any:
        with self.mux.route(index, weight):
            return self.model(x)


@torch.no_grad()
def test_one_graph_for_every_routing_of_a_layer_by_itself() -> None:
    layer = lora_mux.MuxLinear(nn.Linear(8, 4))
    a, b = (layer.add_adapter(n, torch.randn(2, 8), torch.randn(4, 2), alpha=2) for n in "ab")
    made, x = compiled(layer), torch.randn(3, 8)
    indices = [[[a], [-1], [b]], [[b], [b], [a]]]
    routings = [lora_mux.Routing(torch.tensor(index)) for index in indices]
    for routing in routings * 2:
        torch.testing.assert_close(made(x, routing), layer(x, routing))
        routing.check()
    layer.remove_adapter("a")
    assert made(x, routings[0]).isnan().any(1).tolist() == [True, False, False]
    assert graphs() == 1
    with pytest.raises(lora_mux.LoraMuxError, match="1 of 3 rows .* NaN: 0"):
        routings[0].check()


@torch.no_grad()
def test_export_with_the_routing_as_an_input() -> None:
    model, mux, handles = small()
    served, x = Served(model, mux), torch.randn(3, 8)
    indices = [
        torch.tensor([[a, -1], [-1, -1], [b, c]])
        for a, b, c in (handles, [handles[1], handles[0], handles[2]])
    ]
    weight = torch.rand(3, 2)
    program = torch.export.export(served, (x, indices[0], weight), strict=False).module()
    for index in indices:
        torch.testing.assert_close(program(x, index, weight), served(x, index, weight))
    assert mux.active_adapters == []


class Handed(nn.Module):
    """A layer that is handed its routing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Any:
        return self.layer(x, lora_mux.Routing(index, weight))


@pytest.mark.parametrize(
    "how", [{}, pytest.param({"backend": "triton"}, marks=pytest.mark.interpreter)], ids=str
)
@pytest.mark.parametrize("attached", [False, True])
@torch.no_grad()
def test_export_of_a_layer_with_the_routing_as_an_input(
    attached: bool, how: dict[str, Any]
) -> None:
    """By itself, and in a model of which it does not see the rows."""
    linear = nn.Linear(16, 8).half()
    pairs = [(torch.randn(3, 16) / 4, torch.randn(8, 3) / 4) for _ in range(2)]
    if attached:
        model: Any = nn.Sequential(linear)
        mux = lora_mux.attach(model, **how)
        layer = model[0]
        a, b = (mux.add_adapter(n, {"0": p}, alpha=3) for n, p in zip("ab", pairs, strict=True))
    else:
        layer = lora_mux.MuxLinear(linear, **how)
        a, b = (layer.add_adapter(n, *p, alpha=3) for n, p in zip("ab", pairs, strict=True))
    x, handed = torch.randn(3, 16).half(), Handed(layer)
    indices = [torch.tensor(index) for index in ([[a, -1], [-1, -1], [b, a]], [[b, a]] * 3)]
    weight = torch.rand(3, 2)
    program = torch.export.export(handed, (x, indices[0], weight), strict=False)
    names = [str(node.target) for node in program.graph.nodes if "lora_mux" in str(node.target)]
    assert names == ["lora_mux.plan.default", "lora_mux.add_lora_.default"]
    for index in indices:
        got, want = program.module()(x, index, weight), handed(x, index, weight)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))
        assert not torch.equal(want[0], linear(x)[0])


@pytest.mark.filterwarnings("ignore:Unable to find the path of the module")  # torch 2.6
def test_rows_that_are_given_with_a_call_are_no_input_of_an_exported_model() -> None:
    model, _, _ = small()

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return model(x, adapter_names=["a", None, "b"])

    with pytest.raises(lora_mux.errors.RoutingError, match="inside `with mux.route"):
        torch.export.export(Calling(), (torch.randn(3, 8),), strict=False)


@torch.no_grad()
def test_export_leaves_nothing_of_its_trace_behind() -> None:
    model, mux, handles = small()
    x, index = torch.randn(3, 8), torch.tensor([[handles[0]], [-1], [handles[1]]])
    torch.export.export(Served(model, mux), (x, index, torch.rand(3, 1)), strict=False)
    torch.testing.assert_close(compiled(model)(x), model(x))


@torch.no_grad()
def test_export_with_sizes_that_change() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    mux = lora_mux.attach(model, batch_invariant=True)  # one size of tiles for every batch
    a, b, _ = add(mux, model)
    served = Served(model, mux)

    def batch(samples: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor([[a, b], [-1, -1]]).repeat(samples // 2, 1)
        return torch.randn(samples, tokens, 8), index, torch.rand(index.shape)

    samples, tokens = torch.export.Dim("samples", min=2), torch.export.Dim("tokens", min=2)
    dynamic = {0: samples, 1: tokens}, {0: samples}, {0: samples}
    program = torch.export.export(served, batch(4, 3), strict=False, dynamic_shapes=dynamic)
    for inputs in (batch(4, 3), batch(2, 50), batch(20, 7)):
        torch.testing.assert_close(program.module()(*inputs), served(*inputs))
    assert all(isinstance(size, int) for size in mux._router.view.cell.route.routing.index.shape)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=strict_export)])
@torch.no_grad()
def test_export_keeps_the_route_in_force(strict: bool) -> None:
    model, mux, _ = small()
    x = torch.randn(3, 8)
    with mux.route(ROUTES["subsets"]) as routing:
        want = model(x)
        program = torch.export.export(model, (x,), strict=strict).module()
        routing.check()  # the trace left nothing behind to check
    torch.testing.assert_close(program(x), want)
    assert not torch.equal(model(x), want)
