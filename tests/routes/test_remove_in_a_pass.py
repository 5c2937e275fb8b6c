"""An adapter that goes in the middle of a forward pass: the pass finishes with it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.errors import UnknownAdapterError
from oracle import forward
from tenants import SIZES, Tenant, tenant


class Pooled(nn.Module):
    """Its second layer sees one row for each sample, its first one each token."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.first = nn.Linear(*SIZES["first"])
        self.second = nn.Linear(*SIZES["second"])
        self.pooled = pooled
        self.between: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.between()
        return self.second(h.mean(1) if self.pooled else h)  # type: ignore[no-any-return]

    def truth(self, x: Tensor, rows: list[Tenant | None]) -> Tensor:
        made = []
        for sample, row in zip(x, rows, strict=True):
            parts = {p: [] if row is None else [(row.parts[p], 1.0)] for p in SIZES}
            with torch.no_grad():
                h = torch.tanh(forward(self.first, sample, [parts["first"]] * len(sample)))
                h = h.mean(0, keepdim=True) if self.pooled else h
                made.append(forward(self.second, h, [parts["second"]] * len(h)))
        stacked = torch.stack(made)
        return stacked[:, 0] if self.pooled else stacked


def in_another_thread(act: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed[0]


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("what", ["remove", "replace", "remove and refill"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("memory", [None, "64KiB"])
def test_the_pass_finishes(
    memory: str | None, pooled: bool, what: str, sticky: bool, tmp_path: Any
) -> None:
    tenants = {n: tenant(tmp_path / n, {"first": 4, "second": 4}, i) for i, n in enumerate("abc")}
    model, x = Pooled(pooled), torch.randn(2, 3, 12)
    mux = lora_mux.attach(model, memory=memory)
    mux.load("a", tenants["a"].folder)

    def act() -> None:
        model.between = lambda: None
        if what == "replace":
            mux.load("a", tenants["b"].folder, replace=True)
            return
        mux.remove("a")
        if what == "remove and refill":  # no new adapter may get the slot or the rank rows
            for name in "bc":
                mux.load(name, tenants[name].folder)
                mux.prefetch([name])

    model.between = lambda: in_another_thread(act)
    want = model.truth(x, [tenants["a"], tenants["a"] if sticky else None])
    with torch.no_grad():
        if sticky:
            mux.set_adapter("a")
            got = model(x)
        else:
            with mux.route(["a", None]):
                got = model(x)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    # Afterwards it is gone.
    if what == "replace":
        mux.set_adapter("a")
        torch.testing.assert_close(
            model(x).double(), model.truth(x, [tenants["b"]] * 2), rtol=0, atol=1e-5
        )
        return
    if sticky:
        with pytest.raises(UnknownAdapterError):
            model(x)
    mux.set_adapter(None)
    with pytest.raises(UnknownAdapterError):
        mux.route(["a", None])
    assert mux.memory().used == sum(a.bytes for a in mux.memory().adapters.values())


def test_the_backward_finishes_too(tmp_path: Any) -> None:
    made = tenant(tmp_path / "a", {"first": 4, "second": 4}, 1)
    model, x = Pooled(True), torch.randn(2, 3, 12, requires_grad=True)
    mux = lora_mux.attach(model)
    grads = []
    for removed in (False, True):
        mux.load("a", made.folder)
        with mux.route(["a", None]):
            y = model(x)
        mux.remove("a")
        if removed:
            mux.load("b", made.folder)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(grads[1], grads[0])
