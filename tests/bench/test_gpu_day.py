"""bench/gpu_day.py: its steps, what it keeps of them, and what it reports."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import gpu_day
import model
import plot
import residency
import run
import train
import workloads
from cuda_clock import play_cuda
from gpu_day import Step
from lora_mux.measure import bench
from paths import ROOT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Stands for Python: of the scripts, those of the questions write what an H100 answered.
PLAYED = f"""#!{sys.executable}
import os, shutil, sys
given = dict(zip(sys.argv, sys.argv[1:] + [""]))
if "bench/plot.py" in given:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
print("played:", *sys.argv[1:3])
if "--headline" in given and "--out" in given:
    shutil.copy("bench/results/h100-headline.jsonl", given["--out"])
if given.get("-m") == "lora_mux":
    open(given["--out"], "a").write(" a table")
if given.get("--out", "").endswith("tuned.jsonl"):
    print("tuned by" + open(os.environ["LORA_MUX_TUNED"]).read())
"""


def test_the_day_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played, out = tmp_path / "python", tmp_path / "day"
    played.write_text(PLAYED)
    played.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(played))
    assert gpu_day.main(["--out", str(out)]) == 0
    told = capsys.readouterr().out
    for name in (
        "tests",
        "launches",
        "compile",
        "headline",
        "tune-4096x6144",
        "tuned",
        "model",
        "train",
    ):
        assert f"| {name} | well |" in told
    assert "    played: bench/model.py --device" in told
    assert (out / "tuned.log").read_text().endswith("tuned by" + 4 * " a table" + "\n")
    records = plot.read(ROOT / "bench/results/h100-headline.jsonl")
    assert told.count(plot.headline_table(records)) == told.count(plot.gpu_table(records)) == 2
    assert "lost to masked" in told and "![tuned](tuned.png)" in told
    assert (out / "headline.png").stat().st_size > 10_000

    # Elsewhere, and without what draws: what has ended well is kept, and is in the report.
    monkeypatch.setattr(gpu_day, "is_missing", lambda name: name == "matplotlib")
    played.write_text("#!/bin/false")
    assert gpu_day.main(["--out", str(out), "--steps", "plots"]) == 0
    told = capsys.readouterr().out
    assert "| tuned | well |" in told and "| plots | left out: matplotlib is not" in told


def test_it_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = python("print('fine')")
    mended = tmp_path / "mended"
    broken = python(f"import os, sys; sys.exit(0 if os.path.exists({str(mended)!r}) else 'oh no')")
    steps = [
        Step("tests", [good]),
        Step("memcheck", [["no-such-tool"]], needs="no-such-tool"),
        Step("headline", [good, broken]),
    ]
    monkeypatch.setattr(gpu_day, "steps", lambda out: iter(steps))
    out = tmp_path / "day"
    assert gpu_day.main(["--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert "| tests | well |" in told and "| headline | with 1 |" in told
    assert "| memcheck | left out: no-such-tool is not installed |" in told and "oh no" in told
    assert "fine" in (out / "headline.log").read_text()

    mended.touch()
    (out / "tests.log").unlink()
    assert gpu_day.main(["--out", str(out)]) == 0
    assert not (out / "tests.log").exists()  # it had ended well
    assert "| headline | well |" in (out / "report.md").read_text()


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """With all that it started, as compute-sanitizer starts the tests."""
    number = tmp_path / "number"
    code = "import subprocess, time; print('begun', flush=True); "
    code += f"open({str(number)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); "
    forever = Step("headline", [python(code + "time.sleep(60)")])
    done = gpu_day.run_step(forever, tmp_path, seconds=2.0)
    assert done.ended == "after too long" and done.seconds < 30
    assert "begun" in gpu_day.report(tmp_path, [done])
    end = time.monotonic() + 10
    while is_running(int(number.read_text())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(int(number.read_text()))


def test_an_interrupt_ends_what_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [tmp_path / "one", tmp_path / "other"]
    steps = [
        Step(path.name, [["bash", "-c", f"echo $$ > {path}; exec sleep 60"]], times=False)
        for path in numbers
    ]
    monkeypatch.setattr(gpu_day, "steps", lambda out: iter(steps))

    def interrupt() -> None:
        while not all(path.exists() and path.read_text().strip() for path in numbers):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        gpu_day.main(["--out", str(tmp_path / "day")])
    assert time.monotonic() - start < 30
    assert not any(is_running(int(path.read_text())) for path in numbers)


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_report_says_who_lost(tmp_path: Path) -> None:
    workload = workloads.Workload("8B o", 4096, 4096, 32, 8)
    head = {"device": "a GPU", "workload": vars(workload), "what": "layer"}
    common = {**head, "gate": "passed", "error": 1e-3}
    took = {"base": 10.0, "lora_mux": 15.0, "lora_mux fused": 11.0, "vLLM": 10.5, "SGLang": 20.0}
    records = [{**common, "provider": n, "microseconds": {"p50": t}} for n, t in took.items()]
    records.append({**common, "provider": "masked", "gate": "failed", "error": 0.5})
    # Of a layer whose base did not fit into memory there are no shares.
    large = vars(workloads.Workload("large", 1 << 20, 1 << 20, 1, 1))
    records.append({**records[1], "workload": large})
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "headline.jsonl").write_text(text)
    told = gpu_day.report(tmp_path, [])
    assert "lora_mux fused 11.0 us, lost to vLLM 10.5 us, base 10.0" in told
    assert "WRONG: masked at 8B o, 32 rows" in told
    assert "1048576" not in told
    assert "| 4096 x 4096 | 32 | 8 | 16 | 1 | 10.0 | 1.50 | 1.10 |  | 1.05 |" in told


def test_commands_of_the_day_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the parsers of the scripts that they call."""
    play_cuda(monkeypatch, bench)
    found = list(gpu_day.steps(tmp_path))
    names = [step.name for step in found]
    assert names[4:10] == ["compile-train", "launches", "headline", "subsets", "train", "model"]
    for step in found:
        for command in step.commands:
            if "bench/run.py" in command:
                run.arguments(command[command.index("bench/run.py") + 1 :])
            for name, script in (("train", train), ("model", model), ("residency", residency)):
                if f"bench/{name}.py" in command:
                    script.arguments(command[command.index(f"bench/{name}.py") + 1 :])
        assert step.commands and step.name
