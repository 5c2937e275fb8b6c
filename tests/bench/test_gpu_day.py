"""bench/gpu_day.py: its steps, what it keeps of them, and what it reports."""

import json
import sys
from pathlib import Path

import pytest

import gpu_day
import run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_it_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = python("print('fine')")
    mended = tmp_path / "mended"
    broken = python(f"import os, sys; sys.exit(0 if os.path.exists({str(mended)!r}) else 'oh no')")
    steps = {"tests": [good], "memcheck": [["no-such-tool"]], "headline": [good, broken]}
    monkeypatch.setattr(gpu_day, "steps", lambda out: iter(steps.items()))
    out = tmp_path / "day"
    assert gpu_day.main(["--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert "| tests | well |" in told and "| headline | with 1 |" in told
    assert "| memcheck | left out: no-such-tool is not installed |" in told and "oh no" in told
    assert (out / "headline.log").read_text().startswith("fine")

    mended.touch()
    (out / "tests.log").unlink()
    assert gpu_day.main(["--out", str(out)]) == 0
    assert not (out / "tests.log").exists()  # it had ended well
    assert "| headline | well |" in (out / "report.md").read_text()


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    forever = python("import time; print('begun', flush=True); time.sleep(60)")
    done = gpu_day.run_step("headline", [forever], tmp_path, seconds=2.0)
    assert done.ended == "after too long" and done.seconds < 30
    assert "begun" in gpu_day.report(tmp_path, [done])


def test_the_report_says_who_lost(tmp_path: Path) -> None:
    workload = dict(site="8B o", samples=32, tokens=1, adapters=8, ranks=[16], selections=1)
    common = {"workload": workload, "what": "layer", "gate": "passed", "error": 1e-3}
    took = {"base": 10.0, "lora_mux": 15.0, "lora_mux fused": 11.0, "vLLM": 10.5, "SGLang": 20.0}
    records = [{**common, "provider": n, "microseconds": {"p50": t}} for n, t in took.items()]
    records.append({**common, "provider": "masked", "gate": "failed", "error": 0.5})
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "headline.jsonl").write_text(text)
    told = gpu_day.report(tmp_path, [])
    assert "lora_mux fused 11.0 us, lost to vLLM 10.5 us, base 10.0" in told
    assert "WRONG: masked at 8B o, 32 rows" in told


def test_commands_of_the_day_are_understood(tmp_path: Path) -> None:
    """By the parsers of the scripts that they call."""
    for name, commands in gpu_day.steps(tmp_path):
        for command in commands:
            if "bench/run.py" in command:
                run.arguments(command[command.index("bench/run.py") + 1 :])
        assert commands and name
