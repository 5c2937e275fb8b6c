"""What happens to adapters between a forward pass and its backward: right gradients, or an error.

A backward reads the rank rows as they are when it runs. Nobody need be trained for that: x has a
gradient that goes through every adapter of the batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trained_layers import BACKENDS, Layers

import lora_mux
from lora_mux.errors import PoolCapacityError, TrainingError

ROWS = ["a", ("b", "a"), "b"]
WAYS = ["model", "a layer alone", "its features alone", "handed in", "checkpointed"]
UNLIKE = "a is frozen", "b is removed", "b is replaced"  # another plan
CHANGED, LEFT = "those of the forward pass", "stay until backward"


def step(layers: Layers, name: str, **options: Any) -> None:
    """Train an adapter, and serve what it has learnt."""
    trained = layers.mux.train(name, **options)
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(2.0)
        layers.run([name], torch.randn(1, 24))


def replace(layers: Layers, name: str) -> None:
    """With one of the same shapes, in the same slot if that is free."""
    layers.mux.remove(name)
    layers.mux.add_adapter(name, layers.drawn({"b": 7, "c": 3}[name]), alpha=8)


def publish(layers: Layers, name: str) -> None:
    for p in layers.mux.trained[name].parameters():
        p.data.mul_(2.0)
    layers.mux.publish(name)


def fused(layers: Layers, name: str) -> None:
    parameters = list(layers.mux.trained[name].parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(parameters, lr=0.1, fused=True).step()
    with torch.no_grad():
        layers.run([name], torch.randn(1, 24))


# What happens, and what a backward through rows of "a", which is trained, and "b" must do.
ACTS: dict[str, tuple[Callable[[Layers], object], bool]] = {
    "nothing": (lambda layers: None, False),
    "b learns": (lambda layers: step(layers, "b"), True),
    "a learns": (lambda layers: step(layers, "a"), True),
    "a learns, fused": (lambda layers: fused(layers, "a"), True),
    "a is published": (lambda layers: publish(layers, "a"), True),
    "a is frozen": (lambda layers: layers.mux.freeze("a"), False),
    "b is removed": (lambda layers: layers.mux.remove("b"), False),
    "b is replaced": (lambda layers: replace(layers, "b"), False),
    "c learns": (lambda layers: step(layers, "c"), False),
    "c is replaced": (lambda layers: replace(layers, "c"), False),
    "c is trained, and frozen": (lambda layers: (step(layers, "c"), layers.mux.freeze("c")), False),
    "d comes": (lambda layers: layers.mux.add_adapter("d", layers.drawn(40), alpha=8), False),
}


def forward(layers: Layers, way: str, x: Tensor) -> Tensor:
    if way == "handed in":
        a, b = (layers.mux.adapters[name] for name in "ab")
        index = torch.tensor([[a, -1], [b, a], [b, -1]])
        y: Tensor = layers.model[0](x, lora_mux.Routing(index))
        return y
    if way == "a layer alone":
        with layers.mux.route(ROWS):
            y = layers.model[0](x)
        return y
    if way == "checkpointed":
        first = layers.model[0]
        whole = first.forward
        first.forward = lambda x: torch.utils.checkpoint.checkpoint(whole, x, use_reentrant=False)
        try:
            return layers.run(ROWS, x)
        finally:
            del first.forward
    kept: list[Tensor] = []
    hook = layers.model[1].register_forward_hook(lambda module, args, y: kept.append(y))
    y = layers.run(ROWS, x)
    hook.remove()
    return y if way == "model" else kept.pop()


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        *((way, "auto") for way in WAYS),
        ("model", "reference"),
        ("handed in", "reference"),
        pytest.param("model", "triton", marks=pytest.mark.interpreter),
    ],
)
@pytest.mark.parametrize("act", ACTS)
def test_a_backward_is_right_or_refused(act: str, way: str, backend: Any) -> None:
    change, refused = ACTS[act]
    if way == "checkpointed" and act in UNLIKE:
        pytest.skip("torch asks for layers that run the same again")
    layers = Layers(backend=backend)
    layers.mux.train("a")
    x = torch.randn(3, 24, requires_grad=True)
    forward(layers, way, x).square().sum().backward()
    want, x.grad = x.grad, None
    y = forward(layers, way, x)
    change(layers)
    # Nobody keeps adapters but a pass for its output.
    leaves = act in ("b is removed", "b is replaced") and way not in ("model", "checkpointed")
    if refused or leaves:
        message = f"{CHANGED}|{LEFT}" if leaves else CHANGED
        with pytest.raises(TrainingError, match=message):
            y.square().sum().backward()
        assert x.grad is None
        return
    y.square().sum().backward()
    assert want is not None and x.grad is not None and torch.equal(x.grad, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nobody_was_trained(backend: str) -> None:
    """Where there are no kernels, autograd then has copies."""
    layers = Layers(backend=backend)
    x = torch.randn(3, 24, requires_grad=True)
    layers.run(ROWS, x).square().sum().backward()
    want, x.grad = x.grad, None
    y = layers.run(ROWS, x)
    replace(layers, "c")
    y.square().sum().backward()
    assert want is not None and x.grad is not None and torch.equal(x.grad, want)
    x.grad = None
    y = layers.run(ROWS, x)
    layers.mux.train("b", weights=layers.drawn(7))
    layers.run(["c"], torch.randn(1, 24))
    if backend == "triton":
        with pytest.raises(TrainingError, match=CHANGED):
            y.square().sum().backward()
        return
    y.square().sum().backward()
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["model", "a layer alone"])
def test_rank_rows_that_slide(way: str, backend: Any) -> None:
    """With memory=, to make room. They do not under a pass whose output is kept."""
    layers = Layers(backend=backend, memory="20KiB")  # 39 rank rows
    for name, r in (("gap", 10), ("large", 30)):
        layers.mux.add_adapter(name, layers.drawn(r), alpha=8)
    for name in ("gap", "b"):
        layers.mux.prefetch([name])
        layers.mux.pin(name)
    layers.mux.create("learns", r=1, alpha=1)
    layers.mux.train("learns")
    x = torch.randn(2, 24, requires_grad=True)
    with layers.mux.route(["b", "learns"]):
        layers.model(x).square().sum().backward()
        want, x.grad = x.grad, None
        y = layers.model(x) if way == "model" else layers.model[0](x)
    layers.mux.remove("gap")
    if way == "model":
        with pytest.raises(PoolCapacityError):
            layers.mux.prefetch(["large"])
        y.square().sum().backward()
        assert want is not None and x.grad is not None and torch.equal(x.grad, want)
        return
    before = layers.model[0].mux_pool.spans.copy()
    layers.mux.prefetch(["large"])
    assert before.items() - layers.model[0].mux_pool.spans.items()
    with pytest.raises(TrainingError, match=LEFT):
        y.square().sum().backward()


@pytest.mark.usefixtures("no_old_graphs")
def test_compiled() -> None:
    """By torch's own counters. A graph has the parameters of all adapters that are trained."""
    refused = {name for name, (_, refused) in ACTS.items() if refused} | {"c learns"}
    left = "b is removed", "b is replaced", "c is trained, and frozen"  # by who has no pass
    for act in [name for name in ACTS if name not in left]:
        torch._dynamo.reset()
        layers = Layers()
        step(layers, "a"), step(layers, "c")
        run = torch.compile(layers.model, backend="aot_eager", fullgraph=True)
        x = torch.randn(3, 24, requires_grad=True)
        found = []
        for change in (lambda layers: None, ACTS[act][0]):
            x.grad = None
            with layers.mux.route(ROWS):
                y = run(x)
            change(layers)
            if act in refused and found:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.square().sum().backward()
                break
            y.square().sum().backward()
            found.append(x.grad)
        else:
            assert torch.equal(*found), act
