"""An index with an entry for each token: [samples, tokens, J], or flattened, against each token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from lora_mux.errors import ArgumentTypeError, RoutingError, UnknownAdapterError
from tenants import Model, Row, Tenant, attached, tenant, truth

B, T = 2, 3
Stage = tuple[Model, lora_mux.Mux, dict[str, Tenant], Tensor]


@pytest.fixture
def stage(tmp_path: Any) -> Stage:
    model, mux = attached(rank_rows=16)
    tenants = {n: tenant(tmp_path / n, {"first": 4, "second": 4}, i) for i, n in enumerate("ab")}
    for name, made in tenants.items():
        mux.load(name, made.folder)
    return model, mux, tenants, torch.randn(B, T, 12)


def index_of(mux: lora_mux.Mux) -> Tensor:
    """[B, T, 2]; each token selects another set."""
    a, b = mux.adapters["a"], mux.adapters["b"]
    return torch.tensor([[[a, -1], [b, -1], [-1, -1]], [[a, b], [-1, b], [b, a]]])


WEIGHT = torch.tensor([[[1.0, 0], [2, 0], [0, 0]], [[0.5, -1], [0, 3], [1, 0.25]]])


def selected(tenants: dict[str, Tenant], mux: lora_mux.Mux, weight: Tensor) -> list[Row]:
    names = {handle: name for name, handle in mux.adapters.items()}
    return [
        [(tenants[names[h]], w) for h, w in zip(hs, ws, strict=True) if h >= 0]
        for hs, ws in zip(
            index_of(mux).flatten(0, 1).tolist(), weight.flatten(0, 1).tolist(), strict=True
        )
    ]


def routed(how: str, mux: lora_mux.Mux, model: Model, x: Tensor, weight: Tensor | None) -> Tensor:
    index = index_of(mux)
    if how in ("route_tokens", "flattened", "route"):
        if how == "flattened":
            index = index.flatten(0, 1)
            weight = None if weight is None else weight.flatten(0, 1)
        with (mux.route if how == "route" else mux.route_tokens)(index, weight):
            return model(x)  # type: ignore[no-any-return]
    if how == "call":
        return mux.call(index, weight)(model, x)  # type: ignore[no-any-return]
    mux.set_route(index, weight)
    try:
        return model(x)  # type: ignore[no-any-return]
    finally:
        mux.set_adapter(None)


FORMS = ["route", "route_tokens", "flattened", "call", "set_route"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", FORMS)
def test_each_token(how: str, weighted: bool, stage: Stage) -> None:
    model, mux, tenants, x = stage
    weight = WEIGHT if weighted else torch.ones(B, T, 2)
    got = routed(how, mux, model, x, WEIGHT if weighted else None).detach()
    want = truth(model, x.flatten(0, 1), selected(tenants, mux, weight)).view(B, T, -1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("how", FORMS)
def test_gradients_of_the_weights(how: str, stage: Stage) -> None:
    """Against finite differences of the truth."""
    model, mux, tenants, x = stage
    weight = WEIGHT.clone().requires_grad_()
    routed(how, mux, model, x, weight).sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape

    def value(weight: Tensor) -> float:
        return float(truth(model, x.flatten(0, 1), selected(tenants, mux, weight)).sum())

    step = 1e-5
    for place in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 2, 1)):
        change = torch.zeros_like(WEIGHT, dtype=torch.float64)
        change[place] = step
        slope = (value(WEIGHT.double() + change) - value(WEIGHT.double() - change)) / (2 * step)
        assert abs(float(weight.grad[place]) - slope) <= 1e-3 * max(1.0, abs(slope))


def test_what_is_written_later_changes_nothing(stage: Stage) -> None:
    model, mux, _, x = stage
    index, weight = index_of(mux), WEIGHT.clone()
    with mux.route(index, weight):
        before = model(x)
        index.fill_(-1)
        weight.fill_(7)
        assert torch.equal(model(x), before)


@torch.no_grad()
def test_compiled(stage: Stage) -> None:
    torch._dynamo.reset()
    model, mux, _, x = stage
    run = torch.compile(model, backend="aot_eager")
    for index in (index_of(mux), index_of(mux).roll(1, 1)):
        with mux.route(index, WEIGHT):
            torch.testing.assert_close(run(x), model(x))
    with mux.route(index_of(mux)), pytest.raises(Exception, match="`rows` of shape"):
        run(x.transpose(0, 1).contiguous())


class TestRefusals:
    def test_another_batch(self, stage: Stage) -> None:
        """Also one with equally many tokens in all."""
        model, mux, _, x = stage
        index = index_of(mux)
        batches = {
            "transposed": x.transpose(0, 1),
            "flat": x.reshape(1, B * T, -1),
            "rows": x.reshape(B * T, -1),
            "more samples": torch.cat([x, x]),
            "more tokens": torch.cat([x, x], 1),
        }
        for batch in batches.values():
            with mux.route(index), pytest.raises(RoutingError, match="`rows`"):
                model(batch)
        with mux.route_tokens(index.flatten(0, 1)):  # in which only the order is said
            assert torch.equal(model(batches["flat"]).view(B, T, -1), model(x))

    def test_what_says_how_to_repeat(self, stage: Stage) -> None:
        _, mux, _, _ = stage
        index = index_of(mux)
        acts: list[tuple[str, Callable[[], object]]] = [
            ("expand", lambda: mux.route(index, expand="tile")),
            ("expand", lambda: mux.set_route(index, expand={"tile": 2})),
            ("lengths", lambda: mux.route_tokens(index, lengths=[1] * 6)),
        ]
        for argument, act in acts:
            with pytest.raises(RoutingError, match=rf"`{argument}` must be None if `rows` is \["):
                act()

    def test_weights_of_another_shape(self, stage: Stage) -> None:
        _, mux, _, _ = stage
        index = index_of(mux)
        for weights in (WEIGHT.flatten(0, 1), WEIGHT[..., :1], WEIGHT.transpose(0, 1)):
            with pytest.raises(RoutingError, match=r"`weights` .* \[2, 3, 2\], got \["):
                mux.route(index, weights)
        with pytest.raises(RoutingError, match="`weights` .* got list"):
            mux.route(index, WEIGHT.tolist())
        with pytest.raises(ArgumentTypeError, match="`weight` must have a floating dtype"):
            mux.route(index, WEIGHT.long())
        with pytest.raises(RoutingError, match="must be finite"):
            mux.route(index, WEIGHT * float("nan"))

    def test_handles_and_dimensions(self, stage: Stage) -> None:
        _, mux, _, _ = stage
        with pytest.raises(UnknownAdapterError, match="99"):
            mux.route(torch.full((B, T, 1), 99))
        for index in (torch.tensor(-1), torch.tensor([-1]), torch.full((1, 1, 1, 1), -1)):
            with pytest.raises(RoutingError, match=r"`index` must have shape \[rows, J\]"):
                mux.route(index)
        with pytest.raises(ArgumentTypeError, match="int32 or int64"):
            mux.route(torch.zeros(B, T, 1))
