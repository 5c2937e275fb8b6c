"""Records name what is known of a machine, and None for what is not."""

import platform
from pathlib import Path

import pytest
import torch

from lora_mux import __version__
from lora_mux.measure import provenance

CPU = torch.device("cpu")


def test_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(provenance.ROOT / "bench" / "run.py"), "--smoke"])
    record = provenance.provenance(CPU)
    assert len(record["commit"]) == 40 and record["command"] == "python bench/run.py --smoke"
    assert record["lora_mux"] == __version__ and record["torch"] == torch.__version__


def test_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clone, no program to ask, no package but ours, and a system without /proc."""
    root = tmp_path / "site-packages"
    root.mkdir()

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    def unknown(package: str) -> str:
        raise provenance.PackageNotFoundError(package)

    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.setattr(provenance, "version", unknown)
    monkeypatch.setattr(provenance.subprocess, "run", missing)
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "secret" / "lora-mux"), "bench"])
    record = provenance.provenance(CPU)
    assert record["device"] == f"{platform.machine()} CPU" and record["command"] == (
        "python lora-mux bench"
    )
    unknowns = "commit", "driver", "triton", "peft"
    assert [record[name] for name in unknowns] == [None] * 4 and record["dirty"] is False
