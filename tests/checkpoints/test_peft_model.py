"""Adapters in memory: what PEFT lets one set there is checked like a file's."""

import re

import pytest
import torch
from torch import nn

import lora_mux

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("scale", [1e300, float("inf"), float("nan")])
def test_a_scaling_that_fp32_does_not_hold(scale: float) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config, adapter_name="sql")
    layer, x = model.base_model.model[0], torch.randn(3, 8)
    scaling = layer.scaling["sql"]
    layer.set_scale("sql", scale)
    says = re.escape("0.scaling['sql']` must be finite in fp32")
    with pytest.raises(lora_mux.errors.CheckpointError, match=says):
        lora_mux.attach_peft(model)
    layer.scaling["sql"] = 2 * scaling  # set_scale multiplies, and this is finite again
    want = model(x)
    mux = lora_mux.attach_peft(model)
    assert not isinstance(mux.model, peft.PeftModel)
    torch.testing.assert_close(mux.model(x), want)


def test_factors_that_are_integers() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config, adapter_name="sql")
    integers = torch.ones(2, 8, dtype=torch.int8)
    model.base_model.model[0].lora_A["sql"].weight = nn.Parameter(integers, requires_grad=False)
    says = r"adapter 'sql'.*lora_A.weight' must be floating, got torch.int8"
    with pytest.raises(lora_mux.errors.CheckpointError, match=says):
        lora_mux.attach_peft(model)
    assert isinstance(model, peft.PeftModel)
