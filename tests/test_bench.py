"""The benchmark scripts run; what they time on a CPU is no speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.interpreter
def test_smoke_writes_a_record(tmp_path: Path) -> None:
    out = tmp_path / "smoke.jsonl"
    command = [sys.executable, "bench/run.py", "--smoke", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["gate"] == "passed" and 0 < record["error"] < 1.2e-2
    assert set(record["microseconds"]) == {"base", "plan", "pair", "layer"}
    assert all(t["p20"] <= t["p50"] <= t["p80"] for t in record["microseconds"].values())
    assert record.keys() >= {"commit", "dirty", "command", "device", "driver", "torch", "triton"}
    assert "not a speed" in record["device"]


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr
