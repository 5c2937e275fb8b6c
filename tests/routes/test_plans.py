"""Which layers of which passes share a plan."""

import torch

from lora_mux.ops import Method
from lora_mux.routes.plans import Plans

CPU = torch.device("cpu")
LAYERS = 4, CPU, Method("cpu")


def test_layers_of_a_pass_share_a_plan_if_all_is_alike() -> None:
    plans = Plans()
    made = plans.add(LAYERS, None, None)
    assert plans.find(LAYERS, None) is made
    others = (
        (5, CPU, Method("cpu")),
        (4, torch.device("meta"), Method("cpu")),
        (4, CPU, Method("reference")),
    )
    assert [plans.find(layers, None) for layers in others] == [None] * 3
    plans.clear()
    assert plans.find(LAYERS, None) is None


def test_the_last_case_outlives_its_pass() -> None:
    plans = Plans()
    made = plans.add(LAYERS, "a case", None)
    plans.clear()
    assert plans.find(LAYERS, "another case") is None
    assert plans.find(LAYERS, "a case") is made
    assert plans.find(LAYERS, None) is made  # from now on the plan of this pass as well
    later = plans.add(LAYERS, "another case", None)
    plans.clear()
    assert plans.find(LAYERS, "a case") is None and plans.find(LAYERS, "another case") is later
