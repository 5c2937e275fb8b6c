"""Gradients under checkpointing, which runs layers again when their route may be gone."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_mux
from peft_oracle import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # transformers'

MODES = {"reentrant": True, "non-reentrant": False}
Where = Literal["inside", "outside", "under another route", "two passes"]


def attached_llama() -> tuple[Any, lora_mux.Mux]:
    model = llama().train()
    mux = lora_mux.attach(model)
    for rank, name in enumerate("abc", 2):
        weights = {}
        for path in mux.targets:
            layer = model.get_submodule(path)
            A = torch.randn(rank, layer.in_features) / layer.in_features**0.5
            weights[path] = (A, torch.randn(layer.out_features, rank))
        mux.add_adapter(name, weights, alpha=rank)
    return model, mux


def gradients(
    model: Any, mux: lora_mux.Mux, mode: str | None, where: Where, weight: Tensor | None = None
) -> list[Tensor]:
    """The gradients of one training step, as a trainer takes it."""
    model.zero_grad()
    if mode is None:
        model.gradient_checkpointing_disable()
    else:
        how = {"use_reentrant": MODES[mode]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    a, b, c = mux.adapters.values()
    ids = torch.arange(2, 23).reshape(3, 7)
    with mux.route(torch.tensor([[a, -1], [-1, -1], [b, c]]), weight):
        loss = model(ids).logits.square().mean()
        if where == "inside":
            loss.backward()
    if where == "two passes":
        with mux.route(["c", "a"]):
            loss = loss + model(ids[:2]).logits.square().mean()
        loss = loss + model(ids[:2]).logits.square().mean()
    if where == "under another route":
        with mux.route(["c"]):
            loss.backward()
    elif where != "inside":
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["inside", "outside", "under another route", "two passes"])
def test_gradients_of_parameters(where: Where, mode: str) -> None:
    """Reentrant checkpointing loses them silently when the layers forget their route."""
    model, mux = attached_llama()
    want = gradients(model, mux, None, where)
    got = gradients(model, mux, mode, where)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    mux.set_adapter(None)
    base = gradients(model, mux, None, "outside", torch.zeros(3, 2))
    assert any(not torch.allclose(x, y) for x, y in zip(base, want, strict=True))


def test_gradients_of_a_router_network() -> None:
    model, mux = attached_llama()
    gate = torch.zeros(3, 2, requires_grad=True)
    found = []
    for mode in (None, "non-reentrant"):
        gate.grad = None
        gradients(model, mux, mode, "outside", gate.sigmoid())
        assert gate.grad is not None
        found.append(gate.grad)
    torch.testing.assert_close(*found)
    assert bool((found[0][0, 0] != 0) & (found[0][1] == 0).all())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(model, mux, "reentrant", "outside", gate.sigmoid())


class Segmented(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.segment, x, use_reentrant=True)  # type: ignore[no-any-return]

    def segment(self, x: Tensor) -> Tensor:
        if self.fails and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("in the middle of the backward")
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("mode", "kept"), [("non-reentrant", False), ("reentrant", True)])
def test_a_checkpoint_around_the_whole_model(mode: str, kept: bool) -> None:
    """A reentrant one hides its output from us, so that the route has to stay in force."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    mux = lora_mux.attach(model)
    mux.add_adapter("a", {"0": (torch.ones(1, 8), torch.ones(8, 1))}, alpha=1)
    x = torch.randn(2, 8, requires_grad=True)
    with mux.route(["a", None]):
        (want,) = torch.autograd.grad(model(x).sum(), x)
        y = checkpoint(model, x, use_reentrant=MODES[mode])
    mux.set_route(["a", None] if kept else [None, "a"])
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want)


def test_a_backward_that_fails_leaves_no_route_behind() -> None:
    model = Segmented()
    mux = lora_mux.attach(model)
    mux.add_adapter("a", {"layer": (torch.ones(1, 8), torch.ones(8, 1))}, alpha=1)
    x = torch.randn(2, 8, requires_grad=True)
    base = model(x)
    model.fails = True
    with mux.route(["a", None]):
        y = model(x)
    with pytest.raises(RuntimeError, match="middle"):
        y.sum().backward()
    assert torch.equal(model.layer(x), base) and torch.equal(model(x), base)


@dataclass
class Output:
    answer: Tensor


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: y, lambda y: y),
        (lambda y: (None, [y]), lambda y: y[1][0]),
        (lambda y: {"y": y}, lambda y: y["y"]),
        (Output, lambda y: y.answer),
    ],
    ids=["tensor", "tuple", "mapping", "dataclass"],
)
def test_outputs_of_every_kind(wrap: Any, unwrap: Any) -> None:
    class Wrapped(Segmented):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    model = Wrapped()
    mux = lora_mux.attach(model)
    mux.add_adapter("a", {"layer": (torch.ones(1, 8), torch.ones(8, 1))}, alpha=1)
    x = torch.randn(2, 8, requires_grad=True)
    with mux.route(["a", None]):
        y = unwrap(model(x))
        (want,) = torch.autograd.grad(model.layer(x).sum(), x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want)


def test_hooks_do_not_pile_up_on_what_the_model_returns_unchanged() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer.weight

    model = Returns()
    lora_mux.attach(model)
    for _ in range(3):
        model(torch.ones(1, 2))
    assert not model.layer.weight._backward_hooks
