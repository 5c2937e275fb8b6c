"""A model whose answers tell exactly whose adapters they were computed with."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_mux

VALUES = {"a": 1, "b": 2, "c": 4, "d": 6}
X = torch.ones(1, 1)


class Squares(nn.Module):
    """(1 + the values of a row's adapters) squared; a pass torn in two gives no square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(1, 1, bias=False) for _ in range(2))
        nn.init.ones_(self.first.weight)
        nn.init.ones_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]

    def generate(self, x: Tensor, between: Any = None) -> Tensor:
        """Two passes, and `between()` between them."""
        self(x)
        if between is not None:
            between()
        return self(x)  # type: ignore[no-any-return]


def answer(entry: Any) -> float:
    """That of a row which selects None, a name, or several."""
    names = [] if entry is None else [entry] if isinstance(entry, str) else entry
    return float((1 + sum(VALUES[name] for name in names)) ** 2)


def attached(**how: Any) -> tuple[Squares, lora_mux.Mux]:
    model = Squares()
    mux = lora_mux.attach(model, **how)
    one = torch.ones(1, 1)
    for name, value in VALUES.items():
        pair = one, one * value
        mux.add_adapter(name, {"first": pair, "second": pair}, alpha=1)
    return model, mux


class Asked:
    """`who()` runs a pass and says whose answer it is: a name, or None for the base model."""

    def __init__(self, model: Squares) -> None:
        self.model = model

    def __call__(self, run: str = "forward", rows: Any = None) -> str | None:
        passes = self.model if run == "forward" else self.model.generate
        with torch.no_grad():
            got = float(passes(X) if rows is None else passes(X, adapter_names=rows))
        found = [entry for entry in (None, *VALUES) if answer(entry) == got]
        assert len(found) == 1, got
        return found[0]
