"""Repositories of the hub, from its local cache: no test touches a network."""

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

import lora_mux
from peft_oracle import peft, save_adapters

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hub's cache with user/sql in it, at two commits; returns PEFT's model of the newer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--user--sql"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for commit, rank in ((OLDER, 2), (COMMIT, 3)):
        config = peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False)
        model = save_adapters(base, {"sql": config}, tmp_path / "saved")
        shutil.copytree(tmp_path / "saved" / "sql", repository / "snapshots" / commit)
    return model


def fresh(model: Any) -> tuple[nn.Module, lora_mux.Mux]:
    plain: nn.Module = copy.deepcopy(model).unload()
    return plain, lora_mux.attach(plain)


@torch.no_grad()
def test_a_repository(cached: Any) -> None:
    model, mux = fresh(cached)
    mux.load("sql", "user/sql")
    mux.set_adapter("sql")
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), cached(x))


def test_a_revision(cached: Any) -> None:
    model, mux = fresh(cached)
    mux.load("new", "user/sql", revision="main")
    mux.load("old", "user/sql", revision=OLDER)
    layer: Any = model[0]  # type: ignore[index]
    assert layer.mux_pool.rank[:2].tolist() == [3, 2]


def test_only_known_files_are_asked_for(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **how: Any) -> str:
        asked.update(how, repository=repository)
        return "saved/sql"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fresh(cached)[1].load("sql", "user/sql", revision="v1")
    files = [
        *("adapter_config.json", "adapter_model.safetensors"),
        "pytorch_lora_weights.safetensors",
    ]
    assert asked == {"repository": "user/sql", "revision": "v1", "allow_patterns": files}


@torch.no_grad()
def test_a_subfolder_whose_files_are_links_as_in_the_cache(cached: Any, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--user--sql"
    (repository / "blobs").mkdir()
    below = repository / "snapshots" / COMMIT / "runs" / "last"
    below.mkdir(parents=True)
    for file in (tmp_path / "saved" / "sql").glob("adapter_*"):
        shutil.copy(file, repository / "blobs" / f"hash of {file.name}")
        (below / file.name).symlink_to(f"../../../../blobs/hash of {file.name}")
    model, mux = fresh(cached)
    mux.load("here", tmp_path / "saved", subfolder="sql")
    mux.load("there", "user/sql", subfolder="runs/last")
    x = torch.randn(3, 8)
    for name in ("here", "there"):
        mux.set_adapter(name)
        torch.testing.assert_close(model(x), cached(x))
    for subfolder in ("../sql", "/sql"):
        with pytest.raises(lora_mux.errors.CheckpointError, match="`subfolder` must be a path in"):
            mux.load("out", "user/sql", subfolder=subfolder)


def raising(error: Exception) -> Any:
    def download(*arguments: Any, **how: Any) -> str:
        raise error

    return download


def never(*arguments: Any, **how: Any) -> str:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize("folder", ["saved/sql", "saved/none", "./user/sql", "sql", "/user/sql"])
def test_paths_never_reach_the_hub(
    folder: str, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    mux = fresh(cached)[1]
    if folder == "saved/sql":
        mux.load("sql", folder)
        return
    with pytest.raises(lora_mux.errors.CheckpointError, match="existing folder"):
        mux.load("sql", folder)


def test_refusals(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mux = fresh(cached)[1]
    with pytest.raises(
        lora_mux.errors.CheckpointError, match="repository of the hub, got 'user/x'"
    ):
        mux.load("sql", "user/x")
    with pytest.raises(lora_mux.errors.CheckpointError, match="`revision` must be None"):
        mux.load("sql", "saved/sql", revision="main")
    for error in (RuntimeError("no route"), KeyError("x"), TimeoutError("late " * 1000)):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        with pytest.raises(lora_mux.errors.CheckpointError, match="got 'user/sql': ") as caught:
            mux.load("sql", "user/sql")
        assert len(str(caught.value)) < 500
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name)
    )
    with pytest.raises(lora_mux.errors.CheckpointError, match=r"pip install 'lora-mux\[hub\]'"):
        mux.load("sql", "user/sql")
    assert not mux.adapters
