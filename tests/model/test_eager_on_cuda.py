"""Passes on CUDA that nothing compiles, by fake tensors: what the host reads, and what it asks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from fake_cuda import FakeCuda
from lora_mux.errors import UnknownAdapterError
from lora_mux.kernels import installed

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference() -> Any:
    with torch.no_grad():
        yield


class Seen(FakeCuda):
    """Knows which of our operators met tensors on CUDA."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch)
        patch.setattr(installed, "PROBLEM", "")  # nothing is launched, by any triton
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lora_mux":
            self.calls.append(func._opname)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def small(**how: Any) -> tuple[nn.Sequential, lora_mux.Mux]:
    """On the CPU still. Adapter "a" touches the first layer, "b" both."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).bfloat16()
    mux = lora_mux.attach(model, **how)
    first, second = ((torch.randn(4, 64), torch.randn(n, 4)) for n in (64, 32))
    mux.add_adapter("a", {"0": first}, alpha=4)
    mux.add_adapter("b", {"0": first, "2": second}, alpha=4)
    return model, mux


def x() -> Tensor:
    return torch.empty(3, 64, dtype=torch.bfloat16, device=CUDA)


def test_rows_by_name_are_known_on_the_host(cuda: Seen) -> None:
    model, mux = small()
    with cuda:
        model.to(CUDA)
        with mux.route(["a", None, "a"]):
            y = model(x())
    assert (y.shape, y.dtype, y.device) == ((3, 32), torch.bfloat16, CUDA)
    assert cuda.calls == ["plan", "add_lora_"]  # "a" leaves the second layer alone


def test_rows_on_the_device_may_be_anybody_s(cuda: Seen) -> None:
    """Whatever they are: each layer that has adapters adds, and no other."""
    model, mux = small()
    a, b = mux.adapters.values()
    with cuda:
        model.to(CUDA)
        index = torch.tensor([[a], [-1], [a]]).to(CUDA)
        with mux.route(index):
            assert mux._router.reachable() is None
            model(x())
            assert cuda.calls == ["plan", "add_lora_", "add_lora_"]
            mux.remove("b")
            model(x())
        assert cuda.calls[3:] == ["plan", "add_lora_"]
        assert mux._router.reachable() == frozenset()


def test_a_layer_that_is_handed_rows_of_the_host(cuda: Seen) -> None:
    """They are checked there, which a GPU could not do, and copied."""
    layer = lora_mux.MuxLinear(nn.Linear(64, 32).bfloat16())
    a, gone = (layer.add_adapter(n, torch.randn(4, 64), torch.randn(32, 4), alpha=4) for n in "ab")
    layer.remove_adapter("b")
    with cuda:
        layer.to(CUDA)
        y = layer(x(), lora_mux.Routing(torch.tensor([[a], [-1], [a]])))
        assert (y.shape, y.device) == ((3, 32), CUDA) and cuda.calls == ["plan", "add_lora_"]
        with pytest.raises(UnknownAdapterError, match=rf"`index\[1, 0\]`.*got {gone}"):
            layer(x(), lora_mux.Routing(torch.tensor([[a], [gone], [a]])))
    assert cuda.calls == ["plan", "add_lora_"]


class Seeing(nn.Module):
    """A sentence and a sum of images."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.llm = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        return self.llm(tokens) + self.vision(images).sum(0)  # type: ignore[no-any-return]


def test_rows_of_images_that_only_the_device_knows() -> None:
    """Then nobody knows which adapters may go; with all of them on the host, two of three may."""
    model = Seeing()
    mux = lora_mux.attach(model)
    for name in "abc":
        pair = torch.randn(2, 8), torch.randn(8, 2)
        mux.add_adapter(name, {"llm": pair, "vision": pair}, alpha=2)
    a, b, _ = mux.adapters.values()
    rows, images = torch.tensor([[a], [a]]), torch.tensor([[b], [-1], [b]])
    with mux.route(rows, towers={"vision": images}):
        assert mux._router.reachable() == {a, b}
    with mux.route(rows, towers={"vision": images.to("meta")}):  # as on a GPU
        assert mux._router.reachable() is None
