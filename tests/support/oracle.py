"""The formula in fp64, row by row and adapter by adapter; it knows nothing of lora_mux."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """One adapter as its owner sees it."""

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None  # of DoRA


def make_adapter(
    rank: int, in_features: int, out_features: int, alpha: float, dtype: torch.dtype
) -> Adapter:
    """An adapter whose delta is about as large as the base's answer."""
    A = torch.randn(rank, in_features) / in_features**0.5
    B = torch.randn(out_features, rank) / rank**0.5
    return Adapter(A.to(dtype), B.to(dtype), alpha / rank)


def forward(
    linear: nn.Linear, x: Tensor, rows: Sequence[Sequence[tuple[Adapter, float]]]
) -> Tensor:
    """y [M, N] in fp64; `rows` holds each row's adapters with their weights."""
    own = x.double() @ linear.weight.detach().double().T
    y = own.clone()
    if linear.bias is not None:
        y = y + linear.bias.detach().double()
    for m, selected in enumerate(rows):
        for adapter, weight in selected:
            low = adapter.A.double() @ x[m].double()
            delta = adapter.B.double() @ low
            if adapter.bias is not None:
                delta = delta + adapter.bias.double()
            delta = adapter.scaling * delta
            if adapter.magnitude is not None:
                g = magnitude_by_norm(linear, adapter)
                delta = (g - 1) * own[m] + g * delta
            y[m] += weight * delta
    return y


def magnitude_by_norm(linear: nn.Linear, adapter: Adapter) -> Tensor:
    """g [N] of an adapter of DoRA, as the paper has it."""
    assert adapter.magnitude is not None
    whole = linear.weight.detach().double()
    whole = whole + adapter.scaling * adapter.B.double() @ adapter.A.double()
    return adapter.magnitude.double() / whole.norm(dim=1)


# The largest error allowed, in units of eps(dtype) * max|y|. In half precision 1.0 is one rounding
# of a base that is itself rounded. In fp32 up to 4,096 products are summed; PEFT's error is 6.
BUDGET = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def assert_close(got: Tensor, truth: Tensor) -> None:
    """`got` is within the budget of its dtype of an fp64 truth."""
    if not got.numel():
        assert got.shape == truth.shape
        return
    unit = torch.finfo(got.dtype).eps * truth.abs().max().item()
    error = (got.double() - truth).abs().max().item() / unit
    assert error <= BUDGET[got.dtype], f"{error:.2f} units of eps * max|y|"
