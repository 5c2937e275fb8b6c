"""What a plan of any form can do beside adding the adapters' part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.ops import dispatch
from lora_mux.ops.forms import Method
from oracle import Adapter, assert_close, forward


@pytest.mark.parametrize(
    "form", ["reference", "cpu", "operators", pytest.param("triton", marks=pytest.mark.interpreter)]
)
def test_other_strengths(form: Any) -> None:
    """As a split layer puts in, whose gradients are sums over processes."""
    layer = lora_mux.MuxLinear(nn.Linear(16, 12, bias=False))
    adapters = [Adapter(torch.randn(r, 16), torch.randn(12, r), 0.5) for r in (2, 5)]
    a, b = (layer.add_adapter(f"{i}", one.A, one.B, scaling=0.5) for i, one in enumerate(adapters))
    routing = lora_mux.Routing(torch.tensor([[a, b], [-1, -1], [b, -1]]))
    x, nothing = torch.randn(3, 16), torch.zeros(3, 12)
    first, second = adapters
    with torch.no_grad():
        plan = dispatch.plan(routing, layer.mux_slots, Method(form, 0 if form == "cpu" else 16))
        assert plan is not None
        layer.weight.zero_()

        def added(strength: Tensor) -> Tensor:
            made = plan.with_strength(strength)
            assert made.strength is strength  # by values: unused places of Triton's may be NaN
            return made.add(nothing.clone(), x, layer.mux_pool, owned=False)

        for times in (1.0, -3.0):
            rows = [[(first, times), (second, times)], [], [(second, times)]]
            assert_close(added(times * plan.strength), forward(layer, x, rows))
