"""Adapters that are trained in mixed batches, against PEFT that trains each alone."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_mux
from peft_oracle import llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS, ALPHAS, RATES = (4, 8, 16, 7), (8, 8, 32, 7), (1e-2, 3e-3, 1e-3, 5e-3)
STEPS = 20
Weights = Mapping[str, tuple[Tensor, Tensor]]


def base(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return llama().to(dtype).requires_grad_(False)


@functools.cache
def initial(i: int) -> Weights:
    g = torch.Generator().manual_seed(5 + i)
    layers = {
        path: (layer.in_features, layer.out_features)
        for path, layer in base().named_modules()
        if path.rsplit(".", 1)[-1] in TARGETS
    }
    r = RANKS[i]
    return {
        path: (torch.randn(r, K, generator=g) / K**0.5, torch.randn(N, r, generator=g) * 0.02)
        for path, (K, N) in layers.items()
    }


def batches(steps: int = STEPS) -> list[list[Tensor]]:
    """For each step what each tenant learns from: tokens from another part of the vocabulary."""
    g = torch.Generator().manual_seed(1)
    draw = lambda i: torch.randint(20 * i, 20 * i + 40, (2, 12), generator=g)  # noqa: E731
    return [[draw(i) for i in range(4)] for _ in range(steps)]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(predicted, ids[:, 1:].reshape(-1))


Make = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "adamw for each": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "fused adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9, weight_decay=0.01),
    "fused sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9, fused=True),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
}


def alone(
    i: int, make: Make, dtype: torch.dtype = torch.float32, steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """PEFT's losses and weights, under the keys of its files."""
    config = peft.LoraConfig(r=RANKS[i], lora_alpha=ALPHAS[i], target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT asks transformers for
        model: Any = peft.get_peft_model(base(dtype), config)
    trained = {}
    for path, pair in initial(i).items():
        layer = model.base_model.model.get_submodule(path)
        for side, values in zip(("lora_A", "lora_B"), pair, strict=True):
            parameter = getattr(layer, side)["default"].weight
            parameter.data = values.to(dtype, copy=True)
            trained[f"base_model.model.{path}.{side}.weight"] = parameter
    optimizer, losses = make(trained.values(), RATES[i]), []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = loss_of(model(batch[i]).logits, batch[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: p.detach() for key, p in trained.items()}


class Tenants:
    """Four adapters of a model that are trained."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = base(dtype)
        self.mux = lora_mux.attach(self.model, targets=TARGETS, **options)
        for i in range(4):
            values = {p: (A.to(dtype), B.to(dtype)) for p, (A, B) in initial(i).items()}
            self.mux.add_adapter(f"t{i}", values, alpha=ALPHAS[i])
        self.trained = [self.mux.train(f"t{i}") for i in range(4)]

    def step(self, batch: list[Tensor], seed: int) -> list[Tensor]:
        """The losses of one mixed batch, after their backward."""
        ids, owner = torch.cat(batch), torch.arange(4).repeat_interleave(2)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        ids, owner = ids[order], owner[order]
        with self.mux.route([f"t{i}" for i in owner.tolist()]):
            logits = self.model(ids).logits
            losses = [loss_of(logits[owner == i], ids[owner == i]) for i in range(4)]
            torch.stack(losses).sum().backward()
        return losses

    def learn(self, make: Make, steps: int = STEPS) -> list[list[float]]:
        optimizers = [make(t.parameters(), RATES[i]) for i, t in enumerate(self.trained)]
        found: list[list[float]] = [[] for _ in range(4)]
        for seed, batch in enumerate(batches(steps)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for losses, loss in zip(found, self.step(batch, seed), strict=True):
                losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.step()
        return found


def distance(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the norm of each tensor."""
    assert list(have) == list(want)
    return max(float((have[k] - w).norm() / w.norm()) for k, w in want.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_peft_trains_each_alone(name: str) -> None:
    make = OPTIMIZERS[name]
    tenants = Tenants()
    losses = tenants.learn(make)
    for i in range(4):
        want_losses, want = alone(i, make)
        assert max(abs(a - b) for a, b in zip(losses[i], want_losses, strict=True)) < 1e-5
        assert min(want_losses[-3:]) < want_losses[0] - 1e-3
        have = tenants.trained[i].state_dict()
        if distance(have, want) > 1e-5:
            # Where a gradient is 0 but for rounding, Adam steps either way: PEFT's own weights are
            # farther from those of fp64 then.
            _, exact = alone(i, make, torch.float64)
            errors = [distance({k: v.double() for k, v in w.items()}, exact) for w in (have, want)]
            assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exactly_in_fp64(backend: str) -> None:
    make = OPTIMIZERS["adamw"]
    tenants = Tenants(torch.float64, backend=backend)
    losses = tenants.learn(make, 6)
    for i in range(4):
        want_losses, want = alone(i, make, torch.float64, 6)
        assert max(abs(a - b) for a, b in zip(losses[i], want_losses, strict=True)) < 1e-12
        assert distance(tenants.trained[i].state_dict(), want) < 1e-9


def test_two_runs_are_equal() -> None:
    found = []
    for _ in range(2):
        tenants = Tenants()
        tenants.learn(OPTIMIZERS["adamw"], 3)
        found.append([p.detach() for t in tenants.trained for p in t.parameters()])
    assert all(map(torch.equal, *found))
