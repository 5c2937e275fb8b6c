"""Two small layers whose adapters are trained, and the backends that they run on."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux

Weights = Mapping[str, tuple[Tensor, Tensor]]


class Layers:
    """Two small layers and three adapters, of which some are trained; all weights are drawn."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(3)
        layers = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20, bias=False)
        self.model = nn.Sequential(*layers).to(dtype).requires_grad_(False)
        self.mux = lora_mux.attach(self.model, **options)
        for name, r in (("a", 4), ("b", 7), ("c", 3)):
            self.mux.add_adapter(name, self.drawn(r), alpha=8)

    def drawn(self, r: int) -> Weights:
        sizes = {"0": (24, 32), "2": (32, 20)}
        return {p: (torch.randn(r, K) / 4, torch.randn(N, r) / 4) for p, (K, N) in sizes.items()}

    def run(self, rows: Any, x: Tensor) -> Tensor:
        with self.mux.route(rows):
            y: Tensor = self.model(x)
        return y


BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
