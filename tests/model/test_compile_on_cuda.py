"""Attached models under torch.compile and torch.export on CUDA, by fake tensors: one graph each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from fake_cuda import FakeCuda
from lora_mux.core import LoraWeights, Pool
from lora_mux.kernels import installed
from lora_mux.ops import dispatch
from peft_oracle import llama

# torch 2.6 leaves models of fake tensors untraced; for it there are the tests on the CPU.
traces_fakes = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)
pytestmark = [
    pytest.mark.skipif(not traces_fakes, reason="needs torch 2.7"),
    pytest.mark.usefixtures("no_old_graphs"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(installed, "PROBLEM", "")  # nothing is launched, by any triton
    return FakeCuda(monkeypatch)


class Graphs(list[Any]):
    """What torch.compile makes of a model, without computing it."""

    def compile(self, run: Any) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            self.append(graph)
            return graph.forward

        return torch.compile(run, fullgraph=True, backend=backend)

    def calls(self) -> list[str]:
        """The operators of ours in the only graph."""
        (graph,) = self
        targets = [str(node.target) for node in graph.graph.nodes]
        return [name.removeprefix("lora_mux.") for name in targets if "lora_mux." in name]

    def devices(self) -> set[torch.device]:
        """Where the inputs of the only graph are."""
        (graph,) = self
        values = (n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder")
        return {value.device for value in values if isinstance(value, Tensor)}


def weights(model: nn.Module, mux: lora_mux.Mux) -> dict[str, tuple[Tensor, Tensor]]:
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in mux.targets}
    return {
        path: (torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4))
        for path, layer in layers.items()
    }


def small(**how: Any) -> tuple[nn.Sequential, lora_mux.Mux]:
    """On the CPU still."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).bfloat16()
    mux = lora_mux.attach(model, **how)
    for name in "ab":
        mux.add_adapter(name, weights(model, mux), alpha=4)
    return model, mux


def batch() -> Tensor:
    return torch.empty(3, 64, dtype=torch.bfloat16, device=CUDA)


@pytest.mark.parametrize(
    ("fused", "operators"), [("auto", ["add_lora_"]), (False, ["add_lora_"]), (True, ["linear"])]
)
@torch.no_grad()
def test_one_graph_for_every_route(fused: Any, operators: list[str], cuda: FakeCuda) -> None:
    """The first pass of the model is a compiled one; nothing that it needs is on the host."""
    model, mux = small(fused=fused)
    graphs = Graphs()
    run = graphs.compile(model)
    with cuda:
        model.to(CUDA)
        x = batch()
        for rows in (["a", None, ("a", "b")], [{"b": 0.5}, "a", None], [None] * 3):
            with mux.route(rows):
                y = cuda.call(run, x)
        for adapter in ("a", ["b", "a"], None):
            mux.set_adapter(adapter)
            y = cuda.call(run, x)
    assert (y.shape, y.dtype, y.device) == ((3, 32), torch.bfloat16, CUDA)
    assert graphs.calls() == ["rows_now", "plan", *operators * 2]
    assert graphs.devices() == {CUDA}


@torch.no_grad()
def test_before_there_are_rows(cuda: FakeCuda) -> None:
    model, mux = small()
    graphs = Graphs()
    with cuda:
        model.to(CUDA)
        cuda.call(graphs.compile(model), batch())
    assert graphs.devices() == {CUDA}


@torch.no_grad()
def test_a_model_that_was_on_cuda_before(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # They wait, and take fake tensors for meta ones.
    monkeypatch.setattr(LoraWeights, "check_values", lambda *_: None)
    monkeypatch.setattr(Pool, "check_fit", lambda *_: None)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).bfloat16()
    graphs = Graphs()
    with cuda:
        model.to(CUDA)
        mux = lora_mux.attach(model)
        run, x = graphs.compile(model), batch()
        mux.add_adapter("a", weights(model, mux), alpha=4)
        for rows in (["a", None, "a"], [None] * 3):
            with mux.route(rows):
                cuda.call(run, x)
    assert graphs.calls() == ["rows_now", "plan", "add_lora_", "add_lora_"]
    assert graphs.devices() == {CUDA}


@torch.no_grad()
def test_a_language_model(cuda: FakeCuda) -> None:
    model = llama().bfloat16()
    mux = lora_mux.attach(model)
    mux.add_adapter("a", weights(model, mux), alpha=4)
    graphs = Graphs()
    run = graphs.compile(model)
    with cuda:
        model.to(CUDA)
        ids = torch.zeros(3, 5, dtype=torch.long, device=CUDA)
        for rows in (["a", None, "a"], [{"a": 0.5}, None, None]):
            with mux.route(rows):
                logits = cuda.call(run, ids).logits
    assert logits.shape == (3, 5, 256) and logits.device == CUDA
    assert graphs.calls() == ["rows_now", "plan", *["add_lora_"] * len(mux.targets)]


@torch.no_grad()
def test_where_triton_is_too_old(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.6: the operators compute by the reference."""
    monkeypatch.setattr(installed, "PROBLEM", "3.6 or newer, got 3.2.0")
    monkeypatch.setattr(dispatch, "_TOLD", set())
    model, mux = small()
    graphs = Graphs()
    with cuda:
        model.to(CUDA)
        with mux.route(["a", None, "b"]):
            with pytest.warns(UserWarning, match="the kernels need triton 3.6 or newer, got 3.2.0"):
                cuda.call(graphs.compile(model), batch())
    assert graphs.calls() == ["rows_now", "plan", "add_lora_", "add_lora_"]
    (graph,) = graphs
    plan = next(n for n in graph.graph.nodes if str(n.target) == "lora_mux.plan")
    assert plan.args[-1] is False, "not on triton"


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_one_graph_of_a_layer_by_itself(fused: bool, cuda: FakeCuda) -> None:
    layer = lora_mux.MuxLinear(nn.Linear(64, 32).bfloat16(), fused=fused)
    handle = layer.add_adapter("a", torch.randn(4, 64), torch.randn(32, 4), alpha=4)
    graphs = Graphs()
    run = graphs.compile(layer)
    with cuda:
        layer.to(CUDA)
        for index in ([[handle], [-1], [handle]], [[-1]] * 3):
            cuda.call(run, batch(), lora_mux.Routing(torch.tensor(index).to(CUDA)))
    assert graphs.calls() == ["plan", "linear" if fused else "add_lora_"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_graph_with_gradients(cuda: FakeCuda) -> None:
    """Its forward: autograd asks for the streams of a GPU that is there."""
    model, mux = small(fused=True)
    graphs = Graphs()
    index, weight = torch.tensor([[0, 1]] * 3), torch.ones(3, 2, requires_grad=True)
    with cuda:
        model.to(CUDA)
        with mux.route(index, weight):
            y = cuda.call(graphs.compile(model), batch().requires_grad_())
    assert y.requires_grad
    assert graphs.calls() == ["rows_now", "plan", "add_lora"] * 2


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(strict: bool, cuda: FakeCuda) -> None:
    model, mux = small()
    with cuda:
        model.to(CUDA)
        x = batch()
        with mux.route(["a", None, ("a", "b")]):
            program = cuda.call(lambda: torch.export.export(model, (x,), strict=strict))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("lora_mux.add_lora" in name for name in names) == 2
    assert sum("lora_mux.plan" in name for name in names) == 1
