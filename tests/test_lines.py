"""Every line of the package is executed by some test, or named here with a reason.

The long test runs all ordinary ones once under coverage.py, with their subprocesses and with the
kernels in Triton's interpreter: python -m pytest tests/test_lines.py --slow
"""

import os
import subprocess
import sys
from pathlib import Path

import coverage
import pytest

from paths import ROOT

SOURCES = "lora_mux", "kernels/src"
# By file, lines that no ordinary test executes, and why.
NEVER: dict[str, dict[str, str]] = {
    "lora_mux/routes/scopes.py": {
        "at -= 2": "of two such lines one is for Python 3.12, the other for 3.13"
    }
}


def not_executed(data: Path) -> dict[str, list[str]]:
    """By file, the lines that are in no process's record."""
    measured = coverage.Coverage(str(data), config_file=str(ROOT / "pyproject.toml"))
    measured.combine([str(data.parent)])
    found: dict[str, list[str]] = {}
    for file in sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        *_, missing, _ = measured.analysis2(str(file))
        found[file.relative_to(ROOT).as_posix()] = [lines[n - 1].strip() for n in missing]
    return found


@pytest.mark.slow
def test_every_line_is_executed(tmp_path: Path) -> None:
    data, tests = tmp_path / "data", ["pytest", "-q", "-n", "2", "--dist", "loadscope"]
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "coverage", "run", "-m", *tests],
        cwd=ROOT,
        env={**mine, "COVERAGE_FILE": str(data), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    missed = {(file, line) for file, lines in not_executed(data).items() for line in lines}
    named = {(file, line) for file, lines in NEVER.items() for line in lines}
    assert missed - named == set(), "no test executes them"
    assert named - missed == set(), "needs no reason: a test executes it"


def test_lines_that_are_named_exist() -> None:
    """The long test takes too long for every run; that its list is of today is cheap to see."""
    for file, reasons in NEVER.items():
        lines = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        assert reasons.keys() <= set(lines), f"{file}: {reasons.keys() - set(lines)}"
