"""Mixtures of experts: a router and its experts that learn together, against torch by hand."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux

K, H, N = 6, 8, 5
RANKS, ALPHAS = (2, 5, 3, 1), (4, 5, 6, 2)
SIZES = {"0": (K, H), "2": (H, N)}
BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
Factors = Mapping[str, tuple[Tensor, Tensor]]


def base(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, H), nn.Tanh(), nn.Linear(H, N, bias=False))
    return model.to(dtype).requires_grad_(False)


def gate(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(K, 4).to(dtype)


def factors(i: int, dtype: torch.dtype) -> Factors:
    g = torch.Generator().manual_seed(5 + i)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {p: (draw(RANKS[i], k) / 2, draw(n, RANKS[i]) / 2) for p, (k, n) in SIZES.items()}


def data(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [2, 7, K], and what the model should answer."""
    g = torch.Generator().manual_seed(100 + seed)
    draw = lambda n: torch.randn(2, 7, n, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(K), draw(N)


class Ours:
    """Four experts of a small model that are trained."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        self.model = base(dtype)
        self.mux = lora_mux.attach(self.model, **options)
        for i in range(4):
            self.mux.add_adapter(f"e{i}", factors(i, dtype), alpha=ALPHAS[i])
        self.handles = torch.tensor([self.mux.adapters[f"e{i}"] for i in range(4)])
        self.trained = [self.mux.train(f"e{i}") for i in range(4)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for t in self.trained for p in t.parameters()]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        handles = torch.where(index < 0, -1, self.handles[index.clamp(min=0)])
        with self.mux.route_tokens(handles, weight):
            y: Tensor = self.model(x)
        return y


class ByHand:
    """The same in plain torch: every expert for every token, and then those that are chosen."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = base(dtype)
        self.experts = [
            {p: tuple(f.clone().requires_grad_() for f in pair) for p, pair in parts.items()}
            for parts in (factors(i, dtype) for i in range(4))
        ]

    def of_expert(self, i: int) -> list[Tensor]:
        return [f for pair in self.experts[i].values() for f in pair]

    @property
    def parameters(self) -> list[Tensor]:
        return [f for i in range(4) for f in self.of_expert(i)]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        for path in SIZES:
            y = self.model.get_submodule(path)(x)
            for i, parts in enumerate(self.experts):
                A, B = parts[path]
                share = torch.where(index == i, weight, 0.0).sum(-1, keepdim=True)
                y = y + share * (ALPHAS[i] / RANKS[i]) * (x @ A.T @ B.T)
            x = torch.tanh(y) if path == "0" else y
        return x


Model = Ours | ByHand


def top_two(gate: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, index = gate(x).topk(2)
    return index, scores.softmax(-1)


def learn(
    model: Model, dtype: torch.dtype, make: Callable[[Any], torch.optim.Optimizer]
) -> tuple[list[float], list[Tensor]]:
    """20 steps of gate and experts; the losses, and what was learnt."""
    chooses = gate(dtype)
    parameters = [*model.parameters, *chooses.parameters()]
    optimizer, losses = make(parameters), []
    for step in range(20):
        x, want = data(dtype, step % 3)
        optimizer.zero_grad()
        index, weight = top_two(chooses, x)
        loss = (model(x, index, weight) - want).square().mean()
        loss.backward()
        if isinstance(model, ByHand):  # an expert that no token has chosen keeps still
            for i in {0, 1, 2, 3} - set(index.flatten().tolist()):
                for p in model.of_expert(i):
                    p.grad = None
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def furthest(have: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest value."""
    pairs = zip(have, want, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_of_four_experts_in_fp64(
    backend: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    losses, weights = learn(Ours(torch.float64, backend=backend), torch.float64, make)
    want_losses, want = learn(ByHand(torch.float64), torch.float64, make)
    assert want_losses[-1] < 0.8 * want_losses[0]
    assert max(abs(a - b) for a, b in zip(losses, want_losses, strict=True)) < 1e-12
    assert furthest(weights, want) < 1e-10


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_of_four_experts_in_fp32(backend: str) -> None:
    """As far from fp64 as torch by hand is in fp32, give or take a factor of 4."""
    _, want = learn(ByHand(torch.float64), torch.float64, sgd)
    _, theirs = learn(ByHand(torch.float32), torch.float32, sgd)
    _, ours = learn(Ours(torch.float32, backend=backend), torch.float32, sgd)
    assert furthest(ours, want) < 4 * furthest(theirs, want) < 1e-3


def compare(
    backend: str, index: Tensor, weight: Tensor, shape: tuple[int, ...] = (2, 7)
) -> tuple[Tensor, Tensor]:
    """Value and gradients against those by hand; returns y and the gradient of the weights."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if backend == "triton" else {"rtol": 0, "atol": 1e-11}
    x, upstream = (t[: shape[0], : shape[1]] for t in data(dtype))
    found = []
    for model in (Ours(dtype, backend=backend), ByHand(dtype)):
        given, strength = x.clone().requires_grad_(), weight.to(dtype).requires_grad_()
        y = model(given, index, strength)
        y.backward(upstream)
        gradients = [given.grad, strength.grad]
        for p in model.parameters:
            # By hand, an expert that nobody has chosen has zeros.
            gradients.append(p.grad if p.grad is not None and p.grad.abs().sum() else None)
        found.append([y.detach(), *gradients])
    for have, want in zip(*found, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, **tolerance)
    y, _, of_weight, *_ = found[0]
    return y, of_weight


@pytest.mark.parametrize("backend", BACKENDS)
class TestRouting:
    @pytest.mark.parametrize("J", [1, 2, 3, 4])
    def test_experts_for_each_token(self, backend: str, J: int) -> None:
        g = torch.Generator().manual_seed(J)
        index = torch.stack([torch.randperm(4, generator=g)[:J] for _ in range(14)]).view(2, 7, J)
        compare(backend, index, torch.randn(2, 7, J, generator=g))

    def test_flattened(self, backend: str) -> None:
        g = torch.Generator().manual_seed(9)
        index, weight = torch.randint(4, (14, 1), generator=g), torch.randn(14, 1, generator=g)
        ours, x = Ours(torch.float32, backend=backend), data(torch.float32)[0]
        whole = ours(x, index.view(2, 7, 1), weight.view(2, 7, 1))
        assert torch.equal(ours(x, index, weight), whole)

    def test_weights_of_0_learn(self, backend: str) -> None:
        """An expert that adds nothing learns nothing, and its weight does."""
        index = torch.tensor([0, 1]).expand(2, 7, 2)
        _, gradient = compare(backend, index, torch.tensor([0.0, 0.7]).expand(2, 7, 2).clone())
        assert (gradient.abs() > 1e-4).all()

    def test_all_weights_0(self, backend: str) -> None:
        """The first step of a gate that begins with 0: its gradient is not 0."""
        index = torch.tensor([2, 3]).expand(2, 7, 2)
        y, gradient = compare(backend, index, torch.zeros(2, 7, 2))
        dtype = y.dtype
        torch.testing.assert_close(y, base(dtype)(data(dtype)[0]))
        assert (gradient.abs() > 1e-4).any()

    def test_an_expert_twice_in_a_row(self, backend: str) -> None:
        """Both places count, and both weights have the same gradient."""
        index = torch.tensor([[3, 3, 1]]).expand(2, 7, 3)
        g = torch.Generator().manual_seed(4)
        _, gradient = compare(backend, index, torch.randn(2, 7, 3, generator=g))
        torch.testing.assert_close(gradient[..., 0], gradient[..., 1])
        assert not torch.allclose(gradient[..., 0], gradient[..., 2])

    def test_places_without_an_expert(self, backend: str) -> None:
        """The gradient there is 0; tokens without any expert are the base model's."""
        index = torch.tensor([[2, -1], [-1, -1], [-1, 0], [1, 3], [-1, -1], [0, 1], [2, -1]])
        index = index.expand(2, 7, 2)
        g = torch.Generator().manual_seed(6)
        y, gradient = compare(backend, index, torch.randn(2, 7, 2, generator=g))
        assert (gradient[index < 0] == 0).all()
        bare = (index < 0).all(-1)
        want = base(y.dtype)(data(y.dtype)[0])[bare]
        torch.testing.assert_close(y[bare], want, rtol=1e-5, atol=1e-6)

    def test_nobody_reads_the_weight_of_a_place_without_an_expert(self, backend: str) -> None:
        index = torch.tensor([[2, -1]]).expand(2, 7, 2)
        found = []
        for unused in (0.0, 1e30):
            ours, x = Ours(torch.float32, backend=backend), data(torch.float32)[0]
            weight = torch.tensor([0.5, unused]).expand(2, 7, 2).clone().requires_grad_()
            y = ours(x, index, weight)
            y.square().sum().backward()
            found.append([y, weight.grad, *(p.grad for p in ours.trained[2].parameters())])
        for have, want in zip(*found, strict=True):
            assert torch.equal(have, want)

    def test_one_choice_for_each_sample(self, backend: str) -> None:
        """X-LoRA's coarse form: a line of the index for each sample, through mux.route."""
        dtype = torch.float32
        ours, (x, upstream) = Ours(dtype, backend=backend), data(dtype)
        index, weight = torch.arange(4).expand(2, 4), torch.randn(2, 4, requires_grad=True)
        with ours.mux.route(ours.handles[index], weight):
            y = ours.model(x)
        y.backward(upstream)
        spread = weight.detach()[:, None].expand(2, 7, 4).clone().requires_grad_()
        by_hand = ByHand(dtype)
        want = by_hand(x, index[:, None].expand(2, 7, 4), spread)
        want.backward(upstream)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        assert weight.grad is not None and spread.grad is not None
        torch.testing.assert_close(weight.grad, spread.grad.sum(1), rtol=1e-4, atol=1e-4)
        for p, q in zip(ours.parameters, by_hand.parameters, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_layer_chooses_for_itself(backend: str) -> None:
    """MixLoRA's form: a routing that is handed to the layer, with a gate's weights."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    ours, by_hand = Ours(dtype, backend=backend), ByHand(dtype)
    x, upstream = (t.flatten(0, 1) for t in data(dtype))
    g = torch.Generator().manual_seed(8)
    indices = [torch.randint(3, (14, 2), generator=g) for _ in SIZES]
    found = []
    for model in (ours, by_hand):
        chooses, h = gate(dtype), x
        for (path, _), index in zip(SIZES.items(), indices, strict=True):
            weight, layer = chooses(x).gather(1, index), model.model.get_submodule(path)
            if isinstance(model, Ours):
                y = layer(h, lora_mux.Routing(ours.handles[index], weight))
            else:
                y = layer(h)
                for i in range(4):
                    A, B = by_hand.experts[i][path]
                    share = torch.where(index == i, weight, 0.0).sum(1, keepdim=True)
                    y = y + share * (ALPHAS[i] / RANKS[i]) * (h @ A.T @ B.T)
            h = torch.tanh(y) if path == "0" else y
        h.backward(upstream)
        found.append([h, *(p.grad for p in chooses.parameters())])
        found[-1] += [p.grad for p in model.parameters[:12]]
    tolerance = 1e-4 if backend == "triton" else 1e-11
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    assert all(p.grad is None or not p.grad.any() for p in ours.trained[3].parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_against_finite_differences(backend: str) -> None:
    """Of x, of the weights and of the experts' parameters.

    Not by gradcheck, which changes .data between a forward pass and its backward.
    """
    ours = Ours(torch.float64, backend=backend)
    x = data(torch.float64)[0][:1, :3].clone().requires_grad_()
    index = torch.tensor([[[0, 1], [2, -1], [1, 1]]])
    weight = torch.tensor([[[0.3, -1.2], [0.0, 2.0], [0.5, 0.7]]], dtype=torch.float64)
    leaves = [x, weight.requires_grad_(), *(p for t in ours.trained[:3] for p in t.parameters())]
    upstream = torch.randn(ours(x, index, weight).shape, dtype=torch.float64)

    def answer() -> Tensor:
        y: Tensor = (ours(x, index, weight) * upstream).sum()
        return y

    gradients = torch.autograd.grad(answer(), leaves)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            for place in itertools.product(*map(range, leaf.shape)):
                ends = []
                for shift in (1e-6, -2e-6):
                    leaf[place] += shift
                    ends.append(float(answer()))
                leaf[place] += 1e-6
                assert abs((ends[0] - ends[1]) / 2e-6 - float(gradient[place])) < 1e-6


def test_experts_of_which_some_are_frozen() -> None:
    """Trained and serving ones in one token; those that are served keep what they are."""
    ours = Ours(torch.float64)
    ours.mux.freeze("e1"), ours.mux.freeze("e3")
    by_hand = ByHand(torch.float64)
    x, upstream = data(torch.float64)
    index = torch.tensor([0, 1, 3]).expand(2, 7, 3)
    found = []
    for model in (ours, by_hand):
        weight = torch.full((2, 7, 3), 0.4, dtype=torch.float64, requires_grad=True)
        y = model(x, index, weight)
        y.backward(upstream)
        found.append([y, weight.grad])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)
    for p, q in zip(ours.trained[0].parameters(), by_hand.parameters[:4], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11)
    assert all(p.grad is None for i in (1, 2, 3) for p in ours.trained[i].parameters())
