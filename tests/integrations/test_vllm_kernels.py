"""lora_mux's operators in the layout of vLLM's layers, against the formula; vLLM is not needed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_mux.errors import BackendError, InputError
from lora_mux.integrations.vllm_kernels import MuxOperators
from lora_mux.kernels import launch
from lora_mux.ops import operators

SLOTS, R, K, SIZES = 3, 8, 64, (32, 16, 16)
INDEX = [0, -1, 2, 0, 1, -1, 2]


class Base:
    """What vLLM's wrapper does with a batch, as far as it matters here."""

    def update_metadata(self, index: list[int]) -> None:
        self.token_lora_indices = torch.tensor(index)


class Wrapper(MuxOperators, Base):
    pass


def layer(sizes: tuple[int, ...] = SIZES) -> tuple[list[Tensor], list[Tensor]]:
    """lora_a_stacked and lora_b_stacked of merged layers."""
    A = [torch.randn(SLOTS, 1, R, K) for _ in sizes]
    return A, [torch.randn(SLOTS, 1, size, R) for size in sizes]


def want(y: Tensor, x: Tensor, A: Any, B: Any, scale: float, index: list[int]) -> Tensor:
    out = y.double()
    for row, slot in enumerate(index):
        if slot >= 0:
            parts = [
                b[slot, 0].double() @ a[slot, 0].double() @ x[row].double()
                for a, b in zip(A, B, strict=True)
            ]
            out[row] += scale * torch.cat(parts)
    return out


@pytest.fixture
def wrapper() -> Any:
    made = Wrapper()
    made.update_metadata(INDEX)
    return made


@pytest.mark.parametrize(("sizes", "scale"), [(SIZES, 1.0), ((64,), 0.5)])
def test_rows_have_their_own_slots(wrapper: Any, sizes: tuple[int, ...], scale: float) -> None:
    (A, B), x, y = layer(sizes), torch.randn(len(INDEX), K), torch.randn(len(INDEX), sum(sizes))
    expected, before = want(y, x, A, B, scale, INDEX), y.clone()
    wrapper.add_lora_linear(y, x, A, B, scale, sizes, buffer=None)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(y[1], before[1]) and torch.equal(y[5], before[5])


def test_the_next_batch_has_its_own_plan(wrapper: Any) -> None:
    (A, B), x = layer(), torch.randn(len(INDEX), K)
    for index in (INDEX, INDEX[::-1], [1], [-1, -1]):
        wrapper.update_metadata(index)
        for _ in range(2):  # layers
            y = torch.zeros(len(index), 64)
            wrapper.add_lora_linear(y, x[: len(index)], A, B, 1.0, SIZES)
            expected = want(torch.zeros_like(y), x, A, B, 1.0, index)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_slot_that_gets_another_adapter(wrapper: Any) -> None:
    """vLLM writes over its buffers, between two batches of the same rows."""
    (A, B), (other_A, other_B) = layer(), layer()
    x, y = torch.randn(len(INDEX), K), torch.zeros(len(INDEX), 64)
    wrapper.add_lora_linear(y.clone(), x, A, B, 1.0, SIZES)
    for old, new in zip(A + B, other_A + other_B, strict=True):
        old[0] = new[0]
    expected = want(y, x, A, B, 1.0, INDEX)
    wrapper.add_lora_linear(y, x, A, B, 1.0, SIZES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.interpreter
def test_triton_reads_the_stacks_as_they_are(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no copy of A or of B, in each slice, and a part of y is written in its place."""
    read: list[int] = []
    shrink, expand = launch.shrink, launch.expand

    def spied(h: Tensor, y: Tensor, plan: Any, pool: Any, config: Any) -> Any:
        read.append(pool.B_rows.data_ptr())
        assert y._base is not None
        return expand(h, y, plan, pool, config)

    def shrunk(x: Tensor, h: Tensor, plan: Any, pool: Any, *how: Any) -> Any:
        read.append(pool.A_rows.data_ptr())
        return shrink(x, h, plan, pool, *how)

    monkeypatch.setattr(operators, "_on_triton", lambda *given: True)
    monkeypatch.setattr(launch, "expand", spied)
    monkeypatch.setattr(launch, "shrink", shrunk)
    (A, B), x, y = layer(), torch.randn(len(INDEX), K), torch.randn(len(INDEX), sum(SIZES))
    expected = want(y, x, A, B, 0.5, INDEX)
    wrapper.add_lora_linear(y, x, A, B, 0.5, SIZES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert read == [part.data_ptr() for pair in zip(A, B, strict=True) for part in pair]


def test_a_batch_with_a_dimension_more(wrapper: Any) -> None:
    (A, B), x, y = layer(), torch.randn(1, len(INDEX), K), torch.zeros(1, len(INDEX), 64)
    expected = want(y[0], x[0], A, B, 1.0, INDEX)
    wrapper.add_lora_linear(y, x, A, B, 1.0, SIZES)
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_that_nobody_named(wrapper: Any) -> None:
    (A, B), y = layer(), torch.zeros(len(INDEX) + 1, 64)
    with pytest.raises(InputError, match="the 7 rows .* got 8"):
        wrapper.add_lora_linear(y, torch.randn(len(INDEX) + 1, K), A, B, 1.0, SIZES)
    assert not y.any()


def test_graphs_would_keep_the_rows(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (A, B), y = layer(), torch.zeros(len(INDEX), 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(BackendError, match="--enforce-eager"):
        wrapper.add_lora_linear(y, torch.randn(len(INDEX), K), A, B, 1.0, SIZES)
    assert not y.any()
