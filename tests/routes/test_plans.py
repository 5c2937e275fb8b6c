"""Which layers of which passes share a plan."""

import torch

from lora_mux.ops import Method
from lora_mux.routes.passes import Planned
from lora_mux.routes.plans import SharedPlans

CPU = torch.device("cpu")
LAYERS = 4, CPU, Method("cpu")


def test_layers_of_a_pass_share_a_plan_if_all_is_alike() -> None:
    plans, of_pass = SharedPlans(), list[Planned]()
    made = plans.add(of_pass, LAYERS, None, None)
    assert plans.find(of_pass, LAYERS, None) is made
    others = (
        (5, CPU, Method("cpu")),
        (4, torch.device("meta"), Method("cpu")),
        (4, CPU, Method("reference")),
    )
    assert [plans.find(of_pass, layers, None) for layers in others] == [None] * 3
    assert plans.find([], LAYERS, None) is None


def test_the_last_case_outlives_its_pass() -> None:
    plans, later = SharedPlans(), list[Planned]()
    made = plans.add([], LAYERS, "a case", None)
    assert plans.find(later, LAYERS, "another case") is None
    assert plans.find(later, LAYERS, None) is None
    assert plans.find(later, LAYERS, "a case") is made
    assert plans.find(later, LAYERS, None) is made  # from now on the plan of this pass as well
    other = plans.add(later, LAYERS, "another case", None)
    assert plans.find([], LAYERS, "a case") is None
    assert plans.find([], LAYERS, "another case") is other
