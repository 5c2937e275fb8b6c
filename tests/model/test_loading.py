"""load_many beside other threads: all or none, and nobody else's work is undone."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
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
