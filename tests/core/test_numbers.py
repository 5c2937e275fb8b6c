"""Weights and scalings are numbers that fp32 holds, by whatever way they come in."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_mux
from lora_mux.core import check_number

FP32_MAX = torch.finfo(torch.float32).max
# The halfway point to 2**128, which rounds to infinity: the largest float below it is held.
LARGEST = math.nextafter(2.0**128 - 2.0**103, 0)
HELD = [0, -3, 0.5, True + 1, FP32_MAX, -FP32_MAX, LARGEST, -LARGEST, 1e-300, 10**38]
HELD += [Fraction(1, 3), np.float16(7), np.float32(FP32_MAX), np.float64(2.5), np.int64(-4)]
NOT_HELD = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e+300": 1e300,
    "-1e+39": -1e39,
    "3.4028235677973366e+38": math.nextafter(LARGEST, math.inf),
    "a number beyond 1.7e308": 10**400,
    "1e+39": 10**39,
    "5e+38": np.float64(5e38),
}
BEYOND_A_FLOAT = [10**400, -(10**5000), Fraction(10**400, 3)]  # str() refuses the second


@pytest.mark.parametrize("value", HELD, ids=repr)
def test_held(value: Any) -> None:
    number = check_number(value, "weights")
    assert type(number) is float and number == float(value)
    assert torch.tensor(number, dtype=torch.float64).float().isfinite()


@pytest.mark.parametrize("got", NOT_HELD)
def test_not_held(got: str) -> None:
    says = f"`weights[1]` must be finite in fp32 (at most 3.4e38 in size), got {got}"
    with pytest.raises(lora_mux.errors.RoutingError, match=f"^{re.escape(says)}$"):
        check_number(NOT_HELD[got], "weights[1]")


@pytest.mark.parametrize("value", BEYOND_A_FLOAT, ids=["int", "long int", "fraction"])
def test_beyond_a_float(value: Any) -> None:
    with pytest.raises(lora_mux.errors.RoutingError, match=r"got a number beyond 1\.7e308$"):
        check_number(value, "weights")


def test_held_is_what_fp32_holds() -> None:
    """numpy rounds as torch does."""
    for value in (LARGEST, math.nextafter(LARGEST, math.inf)):
        with np.errstate(over="ignore"):
            held = bool(np.isfinite(np.float32(value)))
        assert held == (abs(value) < math.nextafter(LARGEST, math.inf))
        assert held == bool(torch.tensor(value, dtype=torch.float64).float().isfinite())


class Stage:
    """A model with two adapters and a route, and a layer by itself."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        self.mux = lora_mux.attach(self.model)
        for name in ("sql", "french"):
            self.mux.add_adapter(name, {"0": self.pair(8), "1": self.pair(4)}, alpha=2)
        self.layer = lora_mux.MuxLinear(nn.Linear(8, 8))
        self.x = torch.randn(4, 8)

    @staticmethod
    def pair(out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2, 8), torch.ones(out_features, 2)

    def by_tensor(self, value: Any, dtype: torch.dtype) -> torch.Tensor:
        weight = torch.ones(4, 2, dtype=dtype)
        weight[3, 1] = value
        return weight


INDEX = torch.zeros(4, 2, dtype=torch.int64)
# How a number comes in, what the error calls it, and what kind of error it is.
ENTRANCES: dict[str, tuple[Callable[[Stage, Any], object], str, type[Exception]]] = {
    "route": (
        lambda s, v: s.mux.route([None, "sql", "french", {"french": 1.0, "sql": v}]),
        "`rows[3]['sql']`",
        lora_mux.errors.RoutingError,
    ),
    "route_tokens": (
        lambda s, v: s.mux.route_tokens(["sql", {"sql": v}]),
        "`rows[1]['sql']`",
        lora_mux.errors.RoutingError,
    ),
    "set_route": (
        lambda s, v: s.mux.set_route([{"sql": v}]),
        "`rows[0]['sql']`",
        lora_mux.errors.RoutingError,
    ),
    "set_adapter": (
        lambda s, v: s.mux.set_adapter({"sql": 2.0, "french": v}),
        "`adapter['french']`",
        lora_mux.errors.RoutingError,
    ),
    "set_adapter, one weight": (
        lambda s, v: s.mux.set_adapter("sql", weights=v),
        "`weights`",
        lora_mux.errors.RoutingError,
    ),
    "set_adapter, several weights": (
        lambda s, v: s.mux.set_adapter(["sql", "french"], weights=[1.0, v]),
        "`weights[1]`",
        lora_mux.errors.RoutingError,
    ),
    "add_adapter, alpha": (
        lambda s, v: s.mux.add_adapter("new", {"0": s.pair(8)}, alpha=v),
        "`alpha`",
        lora_mux.errors.AdapterError,
    ),
    "add_adapter, scaling": (
        lambda s, v: s.mux.add_adapter("new", {"0": s.pair(8)}, scaling=v),
        "`scaling`",
        lora_mux.errors.AdapterError,
    ),
    "a layer's alpha": (
        lambda s, v: s.layer.add_adapter("new", *s.pair(8), alpha=v),
        "`alpha`",
        lora_mux.errors.AdapterError,
    ),
    "a layer's scaling": (
        lambda s, v: s.layer.add_adapter("new", *s.pair(8), scaling=v),
        "`scaling`",
        lora_mux.errors.AdapterError,
    ),
}


@pytest.mark.parametrize(
    "value",
    [1e300, -1e39, 10**400, math.inf, math.nan],
    ids=["1e300", "-1e39", "int", "inf", "nan"],
)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_numbers_are_refused_by_name(entrance: str, value: Any) -> None:
    stage, (enter, argument, kind) = Stage(), ENTRANCES[entrance]
    stage.mux.set_adapter("french")
    with torch.no_grad():
        before = stage.model(stage.x)
        with pytest.raises(kind, match=re.escape(argument) + " must be finite in fp32"):
            enter(stage, value)
        assert list(stage.mux.adapters) == ["sql", "french"] and not stage.layer.adapters
        assert torch.equal(stage.model(stage.x), before)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e300, torch.float64),
        (-1e39, torch.float64),
        (LARGEST * (1 + 1e-15), torch.float64),
        (math.nan, torch.float64),
        (math.inf, torch.float32),
        (-math.inf, torch.bfloat16),
        (math.nan, torch.float16),
        (math.nan, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_are_refused_by_row_and_place(
    value: float, dtype: torch.dtype, layer_dtype: torch.dtype
) -> None:
    """In a fp64 layer too: a routing does not know the layers that it will meet."""
    stage = Stage()
    stage.model.to(layer_dtype)
    weight = stage.by_tensor(value, dtype)
    says = r"`weight` must be finite in fp32 .*, got .* at \[3, 1\]$"
    with pytest.raises(lora_mux.errors.RoutingError, match=says):
        stage.mux.route(INDEX, weight)
    with pytest.raises(lora_mux.errors.RoutingError, match=says):
        lora_mux.Routing(INDEX, weight.requires_grad_(dtype == torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_weights_are_taken(dtype: torch.dtype) -> None:
    stage = Stage()
    largest = LARGEST if dtype == torch.float64 else torch.finfo(dtype).max
    lora_mux.Routing(INDEX, stage.by_tensor(-largest, dtype))
    with torch.no_grad(), stage.mux.route([{"sql": LARGEST}, None, "french", "sql"]):
        y = stage.model(stage.x)
    with torch.no_grad(), stage.mux.route([None, None, "french", "sql"]):
        want = stage.model(stage.x)
    assert torch.equal(y[1], want[1])
    torch.testing.assert_close(y[2:], want[2:])
