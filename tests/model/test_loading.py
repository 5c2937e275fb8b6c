"""load_many beside other threads: all or none, and nobody else's work is undone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
from peft_oracle import llama
from tenants import Model, Tenant, attached, check, tenant

X = torch.randn(1, 12)


class Meanwhile(PathLike[str]):
    """A folder; when it is asked for, something else happens first."""

    def __init__(self, folder: Path, act: Callable[[], Any]) -> None:
        self.folder, self.act = folder, act

    def __fspath__(self) -> str:
        self.act()
        return str(self.folder)


@pytest.fixture(params=[True, False], ids=["bounded", "all resident"])
def stage(request: pytest.FixtureRequest) -> tuple[Model, lora_mux.Mux]:
    if request.param:
        return attached(8)
    model = Model()
    return model, lora_mux.attach(model)


@pytest.fixture
def tenants(tmp_path: Path) -> dict[str, Tenant]:
    ranks = {"first": 4, "second": 4}
    return {name: tenant(tmp_path / name, ranks, i) for i, name in enumerate("abc")}


def serves(model: Model, mux: lora_mux.Mux, name: str, want: Tenant) -> None:
    with mux.route([name]):
        check(model, X, [[(want, 1.0)]])


def test_nobody_sees_half_of_them(
    stage: tuple[Model, lora_mux.Mux], tenants: dict[str, Tenant]
) -> None:
    model, mux = stage
    seen: list[list[str]] = []
    last = Meanwhile(tenants["c"].folder, lambda: seen.append(list(mux.adapters)))
    handles = mux.load_many({"a": tenants["a"].folder, "b": tenants["b"].folder, "c": last})
    assert seen and all(names == [] for names in seen)
    assert handles == mux.adapters and list(handles) == ["a", "b", "c"]
    for name in handles:
        serves(model, mux, name, tenants[name])


def test_a_failure_leaves_nothing_and_says_why(
    stage: tuple[Model, lora_mux.Mux], tenants: dict[str, Tenant], tmp_path: Path
) -> None:
    _, mux = stage
    for _ in range(3):
        with pytest.raises(lora_mux.errors.CheckpointError, match="nowhere") as caught:
            mux.load_many({"a": tenants["a"].folder, "c": tmp_path / "nowhere"})
        assert mux.adapters == {} and mux.memory().used == 0 and not mux.memory().replaced
        assert not mux._slots.tenants
        del caught


def test_another_thread_s_adapter_of_the_same_name_stays(
    stage: tuple[Model, lora_mux.Mux], tenants: dict[str, Tenant], tmp_path: Path
) -> None:
    model, mux = stage
    theirs = tenants["b"]

    def load() -> None:
        mux.load("a", theirs.folder, replace=True)

    for folder, error in (
        (tmp_path / "nowhere", lora_mux.errors.CheckpointError),
        (tenants["c"].folder, lora_mux.errors.AdapterError),  # the name is taken by now
    ):
        with pytest.raises(error):
            mux.load_many({"a": tenants["a"].folder, "c": Meanwhile(folder, load)})
        assert list(mux.adapters) == ["a"]
        serves(model, mux, "a", theirs)
        mux.remove("a")
        assert not mux._slots.tenants


def test_a_component_of_a_folder_that_has_none(
    stage: tuple[Model, lora_mux.Mux], tenants: dict[str, Tenant]
) -> None:
    """As files of diffusers have them."""
    _, mux = stage
    says = "`component` must be None for a PEFT checkpoint, got 'unet'"
    with pytest.raises(lora_mux.errors.CheckpointError, match=says):
        mux.load("a", tenants["a"].folder, component="unet")
    assert mux.adapters == {}
    mux.load("a", tenants["a"].folder)


HEAD = {"lm_head": (torch.ones(2, 64), torch.ones(256, 2))}


def test_two_threads_that_bring_the_first_adapters_of_a_head() -> None:
    """Both have seen that the head is not there yet; one lets it join, and the other uses it."""
    model = llama()
    mux = lora_mux.attach(model)
    both, lock = threading.Barrier(2), mux._router.changes
    seen = threading.local()

    class Meeting:
        """The lock of all changes, for which each thread waits once until the other wants it."""

        def __enter__(self) -> None:
            if not hasattr(seen, "met"):
                seen.met = True
                both.wait(20)
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    mux._router.changes = Meeting()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(mux.add_adapter, name, HEAD, scaling=0.5) for name in "ab"]
        handles = {one.result(20) for one in made}
    mux._router.changes = lock
    assert handles == set(mux.adapters.values()) and mux.targets.count("lm_head") == 1
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = model(ids, output_hidden_states=True)
        want = base.logits + 0.5 * 2 * base.hidden_states[-1].sum(-1, keepdim=True)
        for name in "ab":
            with mux.route([name]):
                torch.testing.assert_close(model(ids).logits, want)


def test_a_head_that_would_join_a_captured_model() -> None:
    """A graph calls the layers that were there when it was captured."""
    mux = lora_mux.attach(llama())
    targets = mux.targets
    mux._slots.captured = True  # as a capture on a GPU would leave it
    with pytest.raises(lora_mux.errors.PoolCapacityError, match="'lm_head' must carry.*before cap"):
        mux.add_adapter("a", HEAD, scaling=0.5)
    assert mux.targets == targets and not mux.adapters
