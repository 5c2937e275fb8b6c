"""Mixes by name: what they are, when they are made, and what a stranger's name can do."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
from adapter_folders import delta, save
from lora_mux.errors import AdapterError, CheckpointError, RoutingError
from lora_mux.integrations import named_mixes
from lora_mux.integrations.named_mixes import NamedMixes, _remove

RANKS = {"sql": 2, "french": 3, "legal": 1}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for seed, (name, rank) in enumerate(RANKS.items()):
        save(folder / name, rank, seed)
    return folder


@pytest.fixture
def mixes(adapters: Path, tmp_path: Path) -> NamedMixes:
    return NamedMixes(adapters, tmp_path / "cache")


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that were composed."""
    rows: list[Any] = []

    def counting(folders: Any, row: Any, folder: Any, **more: Any) -> Path:
        rows.append(row)
        return lora_mux.compose(folders, row, folder, **more)

    monkeypatch.setattr(named_mixes, "compose", counting)
    return rows


def made(mixes: NamedMixes, name: str) -> Path:
    folder = mixes.folder(name)
    assert folder is not None
    return folder


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sql", {"sql": 1.0}),
        ("sql+0.4*french", {"sql": 1.0, "french": 0.4}),
        ("-10*legal+0.01*sql+french", {"legal": -10.0, "sql": 0.01, "french": 1.0}),
    ],
)
def test_a_mix(mixes: NamedMixes, adapters: Path, name: str, row: dict[str, float]) -> None:
    folder = mixes.folder(name, "the/base")
    assert folder is not None and folder.parent == mixes.cache
    for layer in ("one", "two"):
        want = sum(weight * delta(adapters / one, layer) for one, weight in row.items())
        torch.testing.assert_close(delta(folder, layer), want, rtol=1e-6, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"


def test_a_mix_is_made_once(mixes: NamedMixes, composed: list[Any], adapters: Path) -> None:
    first = made(mixes, "sql+0.4*french")
    assert made(mixes, "sql+0.4*french") == made(mixes, "0.40*french+1*sql") == first
    assert NamedMixes(adapters, mixes.cache).folder("sql+0.4*french") == first  # after a restart
    assert len(composed) == 1
    others = {made(mixes, "sql+0.5*french"), made(mixes, "sql"), mixes.folder("sql", "a base")}
    assert len(others - {first}) == 3 and len(composed) == 4


def test_a_changed_adapter_gives_another_folder(mixes: NamedMixes, adapters: Path) -> None:
    """Also if its size and the time of its change are those of the old one."""
    old, file = made(mixes, "sql"), adapters / "sql" / "adapter_model.safetensors"
    before, status = delta(old, "one"), file.stat()
    save(adapters / "new", RANKS["sql"], 9)
    file.write_bytes((adapters / "new" / file.name).read_bytes())  # the same inode
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    new = made(mixes, "sql")
    assert new != old and torch.equal(delta(old, "one"), before)
    want = delta(adapters / "sql", "one")
    torch.testing.assert_close(delta(new, "one"), want, rtol=1e-6, atol=1e-5)


def test_an_adapter_that_changes_while_it_is_composed(
    mixes: NamedMixes, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*given: Any, **more: Any) -> Path:
        folder = lora_mux.compose(*given, **more)
        save(adapters / "french", RANKS["french"], 9)
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(named_mixes, "compose", changing)
        with pytest.raises(CheckpointError, match=r"\['french', 'sql'\] must stay as they are"):
            mixes.folder("sql+french")
    assert not list(mixes.cache.iterdir())
    want = delta(adapters / "sql", "one") + delta(adapters / "french", "one")
    got = delta(made(mixes, "sql+french"), "one")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def test_two_servers_may_share_a_cache(
    mixes: NamedMixes, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, first = NamedMixes(adapters, mixes.cache), []

    def overtaken(*given: Any, **more: Any) -> Path:
        monkeypatch.undo()
        first.append(made(other, "sql"))
        return lora_mux.compose(*given, **more)

    monkeypatch.setattr(named_mixes, "compose", overtaken)
    assert [made(mixes, "sql")] == first == list(mixes.cache.iterdir())


def test_a_cache_that_cannot_be_written(mixes: NamedMixes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, target: Path) -> Path:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(PermissionError):
        mixes.folder("sql")
    assert not list(mixes.cache.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        *("frnech", "sql+frnech", "__base__", "", "sql french", "sql++french", "nan*sql"),
        *("../adapters/sql", ".", "..", "/etc", "sql/", "s" * 300, "s" * 5000, "sql\0", "meta-x/y"),
    ],
)
def test_names_that_are_not_ours(mixes: NamedMixes, name: str) -> None:
    assert mixes.folder(name) is None


def test_only_adapters_of_the_folder(adapters: Path, tmp_path: Path) -> None:
    """A link may rename one of them; it leads nowhere else."""
    save(tmp_path / "elsewhere", 1, 0)
    save(adapters / "sql" / "inner", 1, 0)
    (adapters / "latest").symlink_to("sql")
    (adapters / "out").symlink_to(tmp_path / "elsewhere")
    (adapters / "deep").symlink_to("sql/inner")
    (adapters / "loop").symlink_to("loop")
    (adapters / "self").symlink_to(".")
    (adapters / "empty").mkdir()
    (adapters / "file").write_text("")
    (tmp_path / "link").symlink_to(adapters)
    mixes = NamedMixes(tmp_path / "link", tmp_path / "cache")
    assert [mixes.folder(n) for n in ("out", "deep", "loop", "self", "empty", "file")] == [None] * 6
    latest = delta(made(mixes, "latest"), "one")
    torch.testing.assert_close(latest, delta(adapters / "sql", "one"), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("weight", ["0.123", "10.01", "-11", "1e30", "1e-3"])
def test_weights_that_are_not_allowed(mixes: NamedMixes, weight: str) -> None:
    with pytest.raises(RoutingError, match="at most 2 decimals, from -10 to 10, got .* for 'sql'"):
        mixes.folder(f"french+{weight}*sql")
    assert not list(mixes.cache.iterdir())


def test_a_mix_of_nothing(mixes: NamedMixes) -> None:
    with pytest.raises(AdapterError, match="other than 0"):
        mixes.folder("0*sql")


def test_an_adapter_without_weights(mixes: NamedMixes, adapters: Path) -> None:
    (adapters / "sql" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="must hold adapter_model.safetensors"):
        mixes.folder("sql+french")
    assert not list(mixes.cache.iterdir())


def test_a_mix_of_too_many(mixes: NamedMixes, adapters: Path) -> None:
    names = [f"a{i}" for i in range(17)]
    for name in names:
        save(adapters / name, 1, 0)
    assert made(mixes, "+".join(names[:16]))
    with pytest.raises(RoutingError, match="at most 16 adapters, got 17"):
        mixes.folder("+".join(names))


def test_names_have_an_end(adapters: Path, tmp_path: Path) -> None:
    """Another spelling is another name for the engine, which keeps them all."""
    mixes = NamedMixes(adapters, tmp_path / "cache", most=2)
    first = made(mixes, "sql+french")
    assert made(mixes, "french+sql") == first
    with pytest.raises(RoutingError, match="at most 2 mixes, .* LORA_MUX_MIXES"):
        mixes.folder("1*sql+french")
    assert made(mixes, "sql+french") == made(mixes, "french+sql") == first
    assert mixes.folder("nobody") is None


def test_the_cache_has_an_end(adapters: Path, tmp_path: Path) -> None:
    """Mixes of an earlier day count, since nobody knows whether another server uses them."""
    first = made(NamedMixes(adapters, tmp_path), "sql")
    place = len([entry for entry in os.listdir(tmp_path) if not entry.startswith(".")])
    (tmp_path / ".making-of-a-server-that-was-killed").mkdir()
    mixes = NamedMixes(adapters, tmp_path, most=place + 1)
    made(mixes, "french")
    with pytest.raises(RoutingError, match=f"got one more than {place + 1} mixes in the cache"):
        mixes.folder("legal")
    assert made(mixes, "sql") == first


def test_a_folder_of_its_own(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    mixes = NamedMixes(adapters)
    assert mixes.folder("nobody") is None and not os.listdir(tmp_path / "tmp")
    folder = made(mixes, "sql")
    assert os.listdir(tmp_path / "tmp") == [folder.parent.name]
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    _remove(folder.parent, os.getpid() + 1)  # as a fork would at its exit
    assert folder.is_dir()
    del mixes
    gc.collect()
    assert not os.listdir(tmp_path / "tmp")


def test_no_folder_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`adapters` must be an existing folder"):
        NamedMixes(tmp_path / "missing")
