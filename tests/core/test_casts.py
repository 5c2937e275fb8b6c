"""Layers that are cast to a smaller dtype, in which an adapter that was finite is infinite."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lora_mux
from oracle import Adapter, assert_close, forward, make_adapter

BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
# What is too large, by where it stands, and the dtype that does not hold it.
TOO_LARGE = {
    "A": ("A", 1e5, torch.float16),
    "B": ("B", -1e5, torch.float16),
    "bias": ("bias", 1e5, torch.float16),
    "in bf16": ("B", 3.4e38, torch.bfloat16),
}


def cast(layer: nn.Module, dtype: torch.dtype) -> list[str]:
    """The warnings of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.to(dtype)
    return [str(warning.message) for warning in caught]


def test_a_layer_without_adapters_has_nothing_that_overflows() -> None:
    layer = lora_mux.MuxLinear(nn.Linear(16, 12))
    assert cast(layer, torch.float16) == []
    assert layer(torch.ones(1, 16, dtype=torch.float16)).shape == (1, 12)


@pytest.mark.parametrize("rows_of_each", [1, 30])
@pytest.mark.parametrize("name", TOO_LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("quiet")
def test_an_adapter_that_overflows_reaches_no_other_row(
    backend: Any, name: str, rows_of_each: int
) -> None:
    factor, value, dtype = TOO_LARGE[name]
    linear = nn.Linear(16, 12)
    layer = lora_mux.MuxLinear(linear, backend=backend)
    good = make_adapter(3, 16, 12, 3, dtype)
    given = {"A": torch.randn(2, 16), "B": torch.randn(12, 2), "bias": torch.randn(12)}
    given[factor].view(-1)[3] = value
    handles = [layer.add_adapter("good", good.A, good.B, scaling=1)]
    handles.append(layer.add_adapter("huge", **given, scaling=1))
    assert cast(layer, dtype) == [
        f"1 of 2 adapters of a layer hold values that {dtype} does not; rows that select them are "
        "NaN until they are loaded again"
    ]
    index = torch.tensor([[handles[0]], [-1], [handles[1]]]).repeat(rows_of_each, 1)
    x = torch.randn(len(index), 16).to(dtype)
    with torch.no_grad():
        y = layer(x, lora_mux.Routing(index))
        chosen = [[(Adapter(good.A, good.B, 1.0), 1.0)], [], []] * rows_of_each
        truth, own = forward(linear, x, chosen), index[:, 0] == handles[1]
        assert y[own].isnan().all()
        assert_close(y[~own], truth[~own])
        assert torch.equal(y[1::3], linear(x)[1::3])
        layer.remove_adapter("huge")
        again = layer.add_adapter("huge", torch.zeros(2, 16), torch.ones(12, 2), scaling=1)
        y = layer(x, lora_mux.Routing(torch.where(index == handles[1], again, index)))
        assert_close(y, truth)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_casts_that_hold_everything_warn_of_nothing(start: torch.dtype, end: torch.dtype) -> None:
    layer = lora_mux.MuxLinear(nn.Linear(16, 12).to(start))
    handle = layer.add_adapter("a", torch.full((2, 16), 6e4), torch.zeros(12, 2), scaling=1)
    layer.reserve(adapters=4, rank=8)
    assert not cast(layer, end)
    with torch.no_grad():
        y = layer(torch.ones(1, 16).to(end), lora_mux.Routing(torch.tensor([[handle]])))
        assert torch.equal(y, nn.functional.linear(torch.ones(1, 16).to(end), *layer.parameters()))
