"""A MuxLinear with adapters that the oracle knows as well, and named routings for it."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_mux
from oracle import Adapter, assert_close, forward, make_adapter

RELATIVE_NORM = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

ROUTINGS = {
    "single": [[0], [1], [2], [3]],
    "all-equal": [[2], [2], [2], [2]],
    "subsets": [[0, 1, 2], [3, -1, 1], [-1, -1, -1], [2, 3, 0]],
    "all four": [[0, 1, 2, 3]] * 4,
    "padding in front": [[-1, 0], [-1, 1], [2, -1], [-1, -1]],
    "same adapter twice": [[1, 1], [0, -1], [-1, -1], [2, 2]],
    "one row only": [[-1], [-1], [-1], [3]],
}


class LayerCase:
    """A MuxLinear with one adapter per rank, and the same adapters for the oracle."""

    def __init__(
        self,
        ranks: tuple[int, ...] = (1, 5, 64, 24),
        size: tuple[int, int] = (96, 160),
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        **how: Any,
    ) -> None:
        self.linear = nn.Linear(*size, bias=bias).to(dtype)
        self.layer = lora_mux.MuxLinear(self.linear, **how)
        self.adapters: list[Adapter] = []
        self.handles: list[int] = []
        for i, rank in enumerate(ranks):
            adapter = make_adapter(rank, *size, alpha=rank + 3, dtype=dtype)
            self.adapters.append(adapter)
            handle = self.layer.add_adapter(f"a{i}", adapter.A, adapter.B, alpha=rank + 3)
            self.handles.append(handle)

    def x(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.linear.in_features).to(self.linear.weight.dtype)

    def check(self, x: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
        """One row of index (of adapter numbers) per row of x: forward, judged against fp64."""
        handles = torch.tensor([*self.handles, -1])[index]
        y = self.layer(x, lora_mux.Routing(handles, weight))
        strength = torch.ones(index.shape) if weight is None else weight
        rows = [
            [(self.adapters[a], w) for a, w in zip(chosen, ws, strict=True) if a >= 0]
            for chosen, ws in zip(index.tolist(), strength.tolist(), strict=True)
        ]
        flat = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            assert_close(y.reshape(-1, y.shape[-1]), forward(self.linear, flat, rows))
        return y


def check_relative_norm(case: LayerCase, index: Tensor, weight: Tensor | None) -> None:
    """A batch against fp64, by the norm of its error."""
    rows, J = index.shape
    x = case.x(rows)
    with torch.no_grad():
        y = case.layer(x, lora_mux.Routing(torch.tensor([*case.handles, -1])[index], weight))
        strength = torch.ones(rows, J) if weight is None else weight
        chosen = [
            [(case.adapters[a], float(w)) for a, w in zip(r, ws, strict=True) if a >= 0]
            for r, ws in zip(index.tolist(), strength, strict=True)
        ]
        truth = forward(case.linear, x, chosen)
        assert y.shape == truth.shape and y.dtype == x.dtype
        # Terms may cancel (a single output, weights of both signs): the largest sets the scale.
        base = forward(case.linear, x, [[]] * rows)
        terms = [
            base,
            *(forward(case.linear, x, [c[j : j + 1] for c in chosen]) - base for j in range(J)),
        ]
        # So may the products of B with h, which a CPU with bf16 instructions rounds: as large as
        # they would be with signs by chance.
        squares = torch.zeros_like(truth)
        for m, adapters in enumerate(chosen):
            for a, w in adapters:
                h = a.A.double() @ x[m].double()
                squares[m] += (w * a.scaling) ** 2 * (a.B.double().square() @ h.square())
        scale = max(truth.norm(), squares.sum().sqrt(), *(term.norm() for term in terms))
        assert (y.double() - truth).norm() <= RELATIVE_NORM[x.dtype] * scale
