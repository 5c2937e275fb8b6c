"""A copy of an attached model is an attached model of its own, whatever the first one is doing."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_mux
from peft_oracle import llama
from tenants import Model, Tenant, check, tenant


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}
X = torch.linspace(-1, 1, 24).reshape(2, 12)


@pytest.fixture
def tenants(tmp_path: Any) -> dict[str, Tenant]:
    ranks = {"first": 4, "second": 4}
    return {name: tenant(tmp_path / name, ranks, seed) for seed, name in enumerate("abc")}


def attached(tenants: dict[str, Tenant], memory: str | None) -> tuple[Model, lora_mux.Mux]:
    model = Model()
    mux = lora_mux.attach(model, memory=memory)
    mux.load("a", tenants["a"].folder)
    parts = tenants["b"].parts.values()
    scaling = next(iter(parts)).scaling
    mux.add_adapter("b", tenants["b"].pairs, scaling=scaling)
    return model, mux


def check_independent(twin: Any, model: Any, mux: lora_mux.Mux, tenants: dict[str, Tenant]) -> None:
    """Whatever is done with one leaves the other as it is; the twin is used up."""
    a, b, c = ([(tenants[name], 1.0)] for name in "abc")
    its = lora_mux.Mux.of(twin)
    assert its is not mux and its.model is twin and mux.model is model
    with its.route(["a", "b"]):
        check(twin, X, [a, b])
        check(model, X, [[], []])
    with mux.route(["b", None]):
        check(model, X, [b, []])
        check(twin, X, [[], []])
        with its.route([None, "a"]):
            check(model, X, [b, []])
            check(twin, X, [[], a])
    mine = mux.load("c", tenants["c"].folder)
    its.load("a", tenants["c"].folder, replace=True)
    assert list(its.adapters) == ["a", "b"] and list(mux.adapters) == ["a", "b", "c"]
    with pytest.raises(lora_mux.errors.UnknownAdapterError):
        its.set_adapter("c")
    mux.set_adapter("c")
    its.set_adapter("a")
    check(model, X, [c, c])
    check(twin, X, [c, c])
    mux.remove("c")
    its.remove("b")
    mux.set_adapter("b")
    check(model, X, [b, b])
    check(twin, X, [c, c])
    its.set_adapter(None)
    its.detach()
    check(twin, X, [[], []])
    check(model, X, [b, b])
    mux.set_adapter(None)
    with torch.no_grad():
        model.first.weight.mul_(2)
        check(model, X, [[], []])
        model.first.weight.div_(2)
    assert mine not in mux.adapters.values()


@pytest.mark.parametrize("memory", [None, "64KiB"])
@pytest.mark.parametrize("way", WAYS)
class TestEachWay:
    def test_plain(self, way: str, memory: str | None, tenants: dict[str, Tenant]) -> None:
        model, mux = attached(tenants, memory)
        check_independent(WAYS[way](model), model, mux, tenants)

    def test_a_copy_of_a_copy_outlives_both(
        self, way: str, memory: str | None, tenants: dict[str, Tenant]
    ) -> None:
        model, mux = attached(tenants, memory)
        last = WAYS[way](WAYS[way](model))
        mux.detach()
        del model, mux
        with lora_mux.Mux.of(last).route(["a", "b"]):
            check(last, X, [[(tenants["a"], 1.0)], [(tenants["b"], 1.0)]])

    def test_in_a_block(self, way: str, memory: str | None, tenants: dict[str, Tenant]) -> None:
        """The block is of the first model; the sticky rows are of both."""
        model, mux = attached(tenants, memory)
        a, b = ([(tenants[name], 1.0)] for name in "ab")
        mux.set_adapter("b")
        with mux.route(["a", None]):
            twin = WAYS[way](model)
            check(twin, X, [b, b])
            check(model, X, [a, []])
        check(twin, X, [b, b])
        mux.set_adapter(None)
        check(twin, X, [b, b])
        lora_mux.Mux.of(twin).set_adapter(None)
        check_independent(twin, model, mux, tenants)

    def test_in_a_pass(self, way: str, memory: str | None, tenants: dict[str, Tenant]) -> None:
        model, mux = attached(tenants, memory)
        twins = []

        def hook(*_: object) -> None:
            while hooks:
                hooks.pop().remove()  # which the copy would have as well
                twins.append(WAYS[way](model))

        hooks = [model.first.register_forward_hook(hook)]
        a, b = ([(tenants[name], 1.0)] for name in "ab")
        with mux.route(["a", "b"]):
            check(model, X, [a, b])
        check_independent(twins[0], model, mux, tenants)

    def test_with_its_mux(self, way: str, memory: str | None, tenants: dict[str, Tenant]) -> None:
        """Copied together, they belong together."""
        model, mux = attached(tenants, memory)
        for twin, its in (
            WAYS[way]((model, mux)),
            reversed(WAYS[way]((mux, model))),
            WAYS[way]({"model": model, "mux": mux}).values(),
        ):
            assert lora_mux.Mux.of(twin) is its and its.model is twin
            check_independent(twin, model, mux, tenants)
        alone = WAYS[way](mux)
        check_independent(alone.model, model, mux, tenants)

    def test_inside_a_larger_model(
        self, way: str, memory: str | None, tenants: dict[str, Tenant]
    ) -> None:
        model, mux = attached(tenants, memory)
        twin = WAYS[way](nn.Sequential(model, nn.Identity()))
        check_independent(twin[0], model, mux, tenants)


def test_a_loaded_adapter_that_is_not_resident(tenants: dict[str, Tenant]) -> None:
    """Its values are read from the file by whoever needs them."""
    model, mux = attached(tenants, "2KiB")
    mux.load("c", tenants["c"].folder)
    with pytest.raises(lora_mux.errors.PoolCapacityError):
        mux.prefetch(["a", "b", "c"])
    twin = copy.deepcopy(model)
    its = lora_mux.Mux.of(twin)
    for name in "abcab":
        with its.route([name, None]):
            check(twin, X, [[(tenants[name], 1.0)], []])
    with mux.route(["c", None]):
        check(model, X, [[(tenants["c"], 1.0)], []])


@pytest.mark.parametrize("way", WAYS)
def test_pools_that_a_graph_reads(way: str, tenants: dict[str, Tenant]) -> None:
    """No graph reads those of a copy, which may grow."""
    model, mux = attached(tenants, None)
    mux._slots.captured = True  # as a capture on a GPU would leave it
    twin = WAYS[way](model)
    with pytest.raises(lora_mux.errors.PoolCapacityError):
        for i in range(30):
            mux.load(f"more {i}", tenants["c"].folder)
    its = lora_mux.Mux.of(twin)
    for i in range(30):
        its.load(f"more {i}", tenants["c"].folder)
    with its.route(["more 29", "b"]):
        check(twin, X, [[(tenants["c"], 1.0)], [(tenants["b"], 1.0)]])


def test_while_another_thread_generates() -> None:
    model = llama()
    mux = lora_mux.attach(model, ["q_proj", "v_proj"])
    for name in "ab":
        pairs = {}
        for path in mux.targets:
            layer: Any = model.get_submodule(path)
            pairs[path] = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        mux.add_adapter(name, pairs, scaling=0.5)
    ids = torch.tensor([[5, 17, 99], [201, 4, 8]])
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    want = {
        rows: model.generate(ids, adapter_names=list(rows), **how)
        for rows in (("a", "b"), ("b", None))
    }
    step, copied, results = threading.Event(), threading.Event(), []

    def pause(*_: object) -> None:
        step.set()
        assert copied.wait(10)

    def run() -> None:
        results.append(model.generate(ids, adapter_names=["a", "b"], **how))

    hook = model.model.layers[1].register_forward_hook(pause)
    thread = threading.Thread(target=run)
    thread.start()
    assert step.wait(10)
    twin = copy.deepcopy(model)
    copied.set()
    twin.model.layers[1]._forward_hooks.clear()
    got = twin.generate(ids, adapter_names=["b", None], **how)
    its = lora_mux.Mux.of(twin)
    its.remove("a")
    its.detach()
    thread.join()
    hook.remove()
    assert torch.equal(got, want["b", None]) and torch.equal(results[0], want["a", "b"])
    assert torch.equal(model.generate(ids, adapter_names=["a", "b"], **how), want["a", "b"])
    assert "generate" not in vars(twin) and type(twin.generate.__self__) is type(twin)


def test_inside_inference_mode() -> None:
    """Where tensors count no changes, and a copy has others than its original."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2))
        mux = lora_mux.attach(model)
        for step in range(3):
            mux.add_adapter(f"a{step}", {"0": (torch.ones(9, 2), torch.ones(2, 9))}, alpha=9)
            twin = copy.deepcopy(model)
            for each in (model, twin, pickle.loads(pickle.dumps(twin)), twin.double()):
                x = torch.ones(1, 2, dtype=each[0].weight.dtype)
                with lora_mux.Mux.of(each).route([f"a{step}"]):
                    change = each(x) - each[0].mux_base(x)
                torch.testing.assert_close(change, torch.full_like(change, 18.0))
