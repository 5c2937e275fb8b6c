"""Speed on the CPU, to see a regression: python -m pytest bench --benchmark-columns=min,median

Each case is a group: the base layer, ours, PEFT's mixed batch. Compare the minima, and only within
a run: another run may have had other neighbours. --benchmark-disable runs each once, as a check.
"""

from typing import Any

import pytest
import torch
from torch import nn

import workloads
from providers import Provider, base_alone, ours_as_a_module, peft_mixed

CASES = {
    "64 rows, 1 adapter": {"samples": 64, "adapters": 1},
    "64 rows, 64 adapters": {"samples": 64, "adapters": 64, "popularity": "distinct"},
    "64 rows, 4 of 16": {"samples": 64, "adapters": 16, "selections": 4},
    "1024 rows, 16 adapters": {"samples": 64, "tokens": 16, "adapters": 16},
}
PROVIDERS: dict[str, Provider] = {
    "base": base_alone,
    "lora_mux": ours_as_a_module(),
    "PEFT mixed": peft_mixed,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_layer(case: str, provider: str, benchmark: Any) -> None:
    benchmark.group = case
    shape: dict[str, Any] = CASES[case]
    workload = workloads.Workload("1024", 1024, 1024, dtype="float32", weighted=False, **shape)
    with torch.inference_mode():
        problem = workloads.problem(workload, torch.device("cpu"))
        call = PROVIDERS[provider](problem, lambda: nn.functional.linear(problem.x, problem.W))
        y = benchmark(call)
        assert provider == "base" or problem.error(y) < 1e-5
