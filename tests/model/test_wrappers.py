"""attach, Mux.of and detach where the model is wrapped, nested or attached already."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.errors import ArgumentTypeError, DetachedError, TargetError
from lora_mux.model import top
from tenants import Model, Tenant, check, tenant


class Outer(nn.Module):
    """A model that holds another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))  # type: ignore[no-any-return]


@pytest.fixture
def made(tmp_path: Any) -> Tenant:
    return tenant(tmp_path / "a", {"first": 4, "second": 4}, 1)


@pytest.fixture
def group() -> Any:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "compile": (compiled, "_orig_mod"),
    "DataParallel": (nn.DataParallel, "module"),
    "DistributedDataParallel": (nn.parallel.DistributedDataParallel, "module"),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_a_wrapper_is_attached(
    name: str, ran: bool, made: Tenant, group: Any
) -> None:
    torch._dynamo.reset()
    wrap, inside = WRAPPERS[name]
    model, x = Model(), torch.randn(2, 12)
    wrapper = wrap(model)
    if ran:  # a graph without adapters is there already
        torch.testing.assert_close(wrapper(x), model(x))
    mux = lora_mux.attach(wrapper)
    assert mux.model is model is getattr(wrapper, inside)
    mux.load("a", made.folder)
    for run in (wrap(model), wrapper):  # wrapped afterwards, or before
        with torch.no_grad(), mux.route(["a", None]):
            got = run(x)
            check(model, x, [[(made, 1.0)], []])
            torch.testing.assert_close(got, model(x))
        with torch.no_grad():
            torch.testing.assert_close(run(x, adapter_names=["a", None]), got)
    assert lora_mux.Mux.of(wrapper) is mux is lora_mux.Mux.of(model)
    with pytest.raises(TargetError, match="attached already"):
        lora_mux.attach(wrapper)
    lora_mux.detach(wrapper)
    check(model, x, [[], []])


def test_a_compiled_model_may_be_attached_in_place(made: Tenant) -> None:
    """nn.Module.compile() is no wrapper."""
    torch._dynamo.reset()
    model, x = Model(), torch.randn(2, 12)
    model.compile(backend="eager")
    mux = lora_mux.attach(model)
    mux.load("a", made.folder)
    with mux.route(["a", None]):
        check(model, x, [[(made, 1.0)], []])


@pytest.mark.parametrize("copied", [False, True])
def test_a_model_that_is_attached_already(copied: bool, made: Tenant) -> None:
    model, x = Model(), torch.randn(2, 12)
    mux = lora_mux.attach(model)
    mux.load("a", made.folder)
    again = copy.deepcopy(model) if copied else model
    with pytest.raises(TargetError, match=r"attached already, .* Mux\.of\(model\)"):
        lora_mux.attach(again)
    # Both ways out.
    found = lora_mux.Mux.of(again)
    assert (found is mux) == (not copied) and found.model is again
    with found.route(["a", None]):
        check(again, x, [[(made, 1.0)], []])
    lora_mux.detach(again)
    lora_mux.attach(again).load("a", made.folder)
    with lora_mux.Mux.of(again).route([None, "a"]):
        check(again, x, [[], [(made, 1.0)]])


def test_a_model_inside_an_attached_one_and_around_one(made: Tenant) -> None:
    outer = Outer(Model())
    mux = lora_mux.attach(outer)
    for inner in (outer.inner, outer.head):
        with pytest.raises(TargetError, match="belongs to an attached model around it"):
            lora_mux.attach(inner)
        with pytest.raises(TargetError, match="must be attached, got a plain"):
            lora_mux.Mux.of(inner)
    mux.detach()
    mux = lora_mux.attach(outer.inner)
    with pytest.raises(TargetError, match="holds an attached model, 'inner'"):
        lora_mux.attach(outer)
    mux.load("a", made.folder)
    x = torch.randn(2, 12)
    with mux.route(["a", None]):  # and its own Mux serves it there
        check(outer.inner, x, [[(made, 1.0)], []])
        torch.testing.assert_close(outer(x), outer.head(outer.inner(x)))


def test_a_layer_that_stands_alone() -> None:
    model = Model()
    model.first = lora_mux.MuxLinear(model.first)
    with pytest.raises(TargetError, match="a MuxLinear, 'first', which stands alone"):
        lora_mux.attach(model)


def test_plain_models_and_other_things() -> None:
    for act in (lora_mux.Mux.of, lora_mux.detach):
        with pytest.raises(TargetError, match=r"got a plain Model; call attach\(model\)"):
            act(Model())
        with pytest.raises(ArgumentTypeError, match="`model` must be an nn.Module, got dict"):
            act({})  # type: ignore[arg-type]


class TestDetached:
    def test_what_was_made_before(self, made: Tenant) -> None:
        """It raises, also while the model has another Mux."""
        model, x = Model(), torch.randn(1, 12)
        mux = lora_mux.attach(model)
        handle = mux.load("a", made.folder)
        index = torch.tensor([[handle]])
        blocks = [
            mux.route(["a"]),
            mux.route_tokens(["a"]),
            mux.route(index),
            mux.disable_adapter(),
        ]
        lora_mux.detach(model)
        lora_mux.attach(model).load("a", made.folder)
        for block in blocks:
            with pytest.raises(DetachedError), block:
                pytest.fail("entered")
        for act in (
            lambda: mux.route(["a"]),
            lambda: mux.set_adapter("a"),
            lambda: mux.disable_adapter(),
            lambda: mux.model,
            lambda: mux.detach(),
        ):
            with pytest.raises(DetachedError):
                act()
        check(model, x, [[]])

    def test_handles_mean_nothing_in_the_next_mux(self, made: Tenant, tmp_path: Any) -> None:
        """Those of adapters that were there, that were gone, and of a Mux before that."""
        other = tenant(tmp_path / "b", {"first": 4, "second": 4}, 2)
        model, x = Model(), torch.randn(1, 12)
        old = []
        for _ in range(3):
            mux = lora_mux.attach(model)
            old += [mux.load(name, made.folder) for name in "abc"]
            mux.remove("b")
            old.append(mux.load("d", made.folder))
            mux.remove("c")  # a slot that is free when the Mux goes
            mux.detach()
        assert len(set(old)) == len(old)
        mux = lora_mux.attach(model)
        new = [mux.load(name, other.folder) for name in "abcdef"]
        assert not set(new) & set(old)
        for handle in old:
            with pytest.raises(lora_mux.errors.UnknownAdapterError):
                mux.route(torch.tensor([[handle]]))
            with pytest.raises(lora_mux.errors.UnknownAdapterError):
                model.first(x, lora_mux.Routing(torch.tensor([[handle]])))
        with mux.route(torch.tensor([[new[0]]])):
            check(model, x, [[(other, 1.0)]])

    def test_handles_of_a_copy_that_was_made_before(self, made: Tenant, tmp_path: Any) -> None:
        other = tenant(tmp_path / "b", {"first": 4, "second": 4}, 2)
        model, x = Model(), torch.randn(1, 12)
        handle = lora_mux.attach(model).load("a", made.folder)
        twin = copy.deepcopy(model)
        lora_mux.detach(model)
        index = torch.tensor([[handle]])
        with lora_mux.Mux.of(twin).route(index):  # of the copy, whose adapter it is as well
            check(twin, x, [[(made, 1.0)]])
        lora_mux.detach(twin)
        mux = lora_mux.attach(twin)
        mux.load("b", other.folder)
        with pytest.raises(lora_mux.errors.UnknownAdapterError):
            mux.route(index)


def test_a_pass_asks_for_no_compiler_that_nobody_has_imported(
    made: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes seconds; torch does it as soon as something is compiled."""
    monkeypatch.setattr(top, "_UNTRACED", {})
    monkeypatch.setattr(torch.compiler, "disable", lambda *_: pytest.fail("asks for a compiler"))
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    mux = lora_mux.attach(model := Model())
    mux.load("a", made.folder)
    with mux.route(["a", None]):
        check(model, torch.randn(2, 12), [[(made, 1.0)], []])
