"""Adapters with random weights in chosen layers, and each sample of a batch alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lora_mux


def add_adapters(
    model: nn.Module,
    mux: lora_mux.Mux,
    names: str = "ab",
    touches: Callable[[str], bool] = lambda path: True,
    size: float = 0.3,
) -> None:
    """Adapters that touch every target whose path is chosen."""
    for name in names:
        generator = torch.Generator().manual_seed(ord(name[0]))
        weights = {}
        for path, layer in model.named_modules():
            if isinstance(layer, lora_mux.MuxLinear):
                A = torch.randn(4, layer.mux_pool.in_features, generator=generator) * size
                B = torch.randn(layer.mux_pool.out_features, 4, generator=generator) * size
                if touches(path):
                    weights[path] = A, B
        mux.add_adapter(name, weights, alpha=4)


def with_adapter(mux: lora_mux.Mux, adapter: Any, compute: Callable[[], Any]) -> Any:
    """What is computed if all rows have the same adapters."""
    mux.set_adapter(adapter)
    try:
        return compute()
    finally:
        mux.set_adapter(None)


def assert_equal(got: Tensor, want: Tensor) -> None:
    """They differ by rounding only, and are not all the same number."""
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def differ(x: Tensor, y: Tensor) -> bool:
    """Whether two outputs differ by more than rounding, so that a test can tell them apart."""
    return bool((x - y).abs().max() > 1e-3 * y.abs().max())


def sample(batch: Mapping[str, Any], i: int) -> dict[str, Any]:
    """One sample of a batch."""
    return {name: value[i : i + 1] for name, value in batch.items()}
