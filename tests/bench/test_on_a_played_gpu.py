"""The benchmarks and `lora-mux tune` from end to end, as on a GPU: see support/cuda_clock.py."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft  # noqa: F401  # which looks for a real GPU when it is first imported
import pytest
import torch

import model
import residency
import run
import train
from cuda_clock import play_cuda
from lora_mux import ops
from lora_mux.cli import main as command_line
from lora_mux.kernels import launch
from lora_mux.measure import bench, problem, timing, tune

GPU = torch.device("cuda")


def test_what_syncs_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails would spoil those that follow."""
    cuda = play_cuda(monkeypatch)
    calls = {"good": lambda n: cuda.append(f"good {n}"), "waits": lambda n: cuda.sync()}
    times = timing.microseconds(calls, 2, GPU, runs=3)
    assert times["good"].keys() == times["waits"].keys() and times["good"]["runs"] == 3
    assert (times["good"]["syncs"], times["waits"]["syncs"]) == (False, True)
    assert cuda.mode == "default"
    # The stream that captures waits for the one that made the buffers; twice through all sets.
    assert cuda[:5] == ["wait", "good 0", "good 1", "good 0", "good 1"]
    assert cuda.count("capture") == 1 and cuda.count("replay") == 1 + 3
    assert cuda.count("sleep") == 2 * (1 + 3)
    assert cuda.count("sync") == 2 * 2 + 1 + 2 * (1 + 3)


def test_another_error_is_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = play_cuda(monkeypatch)

    def broken() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timing.syncs(broken)
    assert cuda.mode == "default"


def test_sets_make_the_cache_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    play_cuda(monkeypatch, l2=50_000_000)
    few, many = timing.sets_for_cold_l2(60_000_000, GPU), timing.sets_for_cold_l2(5_000_000, GPU)
    assert (few, many, timing.sets_for_cold_l2(10, GPU)) == (2, 20, 64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs and sets, and kernels in the interpreter, also for "auto"."""
    few = partial(timing.microseconds, runs=3)
    for module in (bench, problem, timing):
        monkeypatch.setattr(
            module, "microseconds", lambda c, s, d, runs=3, **_: few(c, min(s, 2), d)
        )
    monkeypatch.setattr(timing, "MOST_SETS", 2)
    monkeypatch.setattr(ops.dispatch, "_runs_triton", lambda *_: True)
    monkeypatch.setattr(launch, "device_name", lambda device: "a played GPU")


@pytest.mark.interpreter
def test_run(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = play_cuda(monkeypatch, run)
    monkeypatch.setattr(run, "os", SimpleNamespace(environ={}, devnull="/dev/null"))
    monkeypatch.setattr(run, "ceilings", lambda device: {"launch_us": 1.0})
    out = tmp_path / "tiny.jsonl"
    assert run.main(["--tiny", "--out", str(out)]) == 0
    assert run.main(["--tiny", "--compile"]) == 0
    head, *records = (json.loads(line) for line in out.read_text().splitlines())
    assert head["ceilings"] == {"launch_us": 1.0} and head["speed"]
    timed = {r["provider"]: r for r in records if "microseconds" in r and r["what"] == "layer"}
    assert timed.keys() >= {"base", "lora_mux", "lora_mux fused", "PEFT mixed", "masked"}
    assert not any(r["microseconds"]["syncs"] for r in timed.values()) and "capture" in cuda


@pytest.mark.interpreter
def test_tune_and_bench(
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    play_cuda(monkeypatch, tune, bench)
    monkeypatch.setattr(tune, "CHOICES", {"block_n": (64,)})
    monkeypatch.setattr(tune, "FUSED_CHOICES", {})
    sizes = ["--in-features", "64", "--out-features", "48", "--rank", "8", "--adapters", "2"]
    shape = [*sizes, "--rows", "5", "--dtype", "fp16"]
    out = tmp_path / "tuned.json"
    assert command_line(["tune", *shape, "--rounds", "1", "--out", str(out)]) == 0
    table: Any = json.loads(out.read_text())
    assert table["record"]["device"] == "a played GPU"
    assert len(table["entries"]) == len(table["fused"]) == 1
    assert command_line(["bench", *shape, "--device", "cuda"]) == 0
    assert "with adapters" in capsys.readouterr().out


def test_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock is not read before the device is done with a forward."""
    cuda = play_cuda(monkeypatch, model, bench)
    monkeypatch.setattr(model, "microseconds", partial(timing.microseconds, runs=3))
    out = tmp_path / "model.jsonl"
    sizes = ["--layers", "2", "--adapters", "3"]
    assert model.main([*sizes, "--device", "cuda", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["device"] == "a played GPU" and record["graphs"] is None
    # A first look at the answer, then three rounds: two mixed forwards of ours and of PEFT's, and
    # the base.
    assert cuda == (1 + 3 * 5) * ["synchronize"]


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock waits for the GPU, and the GPU's is read where its queue is full."""
    cuda = play_cuda(monkeypatch, train, bench)
    out = tmp_path / "train.jsonl"
    sizes = ["--width", "32", "--rows", "6", "--cells", "5", "--dtype", "bfloat16"]
    few = ["--runs", "3", "--seconds", "0", "--device", "cuda"]
    assert train.main([*sizes, *few, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["device"] == "a played GPU"
    found = record["providers"]
    assert found.keys() == {*train.PROVIDERS, "PEFT 16", "batched"}
    for of in found.values():
        assert (of["microseconds"]["runs"], of["device"]["runs"]) == (3, 3)
        assert of["device"]["min"] > 0 and not of["device"]["syncs"]
    assert found["PEFT"]["error"] < found["PEFT 16"]["error"]
    assert cuda == len(found) * 3 * ["synchronize"] + len(found) * 3 * ["sleep"]


def test_residency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = play_cuda(monkeypatch, residency, bench)
    out = tmp_path / "residency.jsonl"
    sizes = ["--layers", "2", "--width", "16", "--adapters", "9", "--resident", "2"]
    files = ["--folders", "2", "--peft", "3", "--targets", "3", "--registered", "9"]
    crowds = ["--crowd", "20", "--big", "4"]
    assert residency.main([*sizes, *files, *crowds, "--device", "cuda", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["device"] == "a played GPU"
    # What brings bytes: first uses, evictions, plain copies, PEFT's loads, and two big adapters.
    assert cuda == (2 + 4 * 2 + 50 + 2 + 2) * ["synchronize"]
