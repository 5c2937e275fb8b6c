"""The oldest and the newest versions that we name: what the pages say, and a part of the tests.

Each pair of torch and its own triton gets an environment from the package index. Where that has
torch for CUDA only, an environment takes ten minutes and 6 GB, which are given back.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from paths import ROOT

SECONDS = 2400  # for an environment, and for the tests in it


@dataclass(frozen=True)
class Versions:
    """What an environment holds."""

    python: str
    torch: str
    triton: str
    transformers: str
    peft: str


RANGE = {
    "oldest": Versions("3.10", "2.6.0", "3.2.0", "5.15.0", "0.21.0"),
    "newest": Versions("3.13", "2.14.1", "3.8.0", "5.24.0", "0.21.2"),
}
# What meets torch, Triton, transformers and PEFT most closely. Tests in Triton's interpreter leave
# themselves out where the kernels cannot run.
PART = (
    *("core", "kernels/test_kernels.py", "ops/test_operators.py", "ops/test_autocast.py"),
    *("checkpoints/test_peft_folder.py", "configs/test_peft_config.py"),
    *("routes/test_passes.py", "layers/test_module.py", "adapters/test_bounded.py"),
    *("model/test_compile.py", "model/test_peft.py", "model/test_peft_conformance.py"),
    *("model/test_attach_peft.py", "model/test_generation.py", "model/test_towers.py"),
    *("model/test_continuous_batching.py", "model/test_continuous_streams.py"),
)


def test_the_pages_name_the_range() -> None:
    for page in ("README.md", "docs/support.md"):
        text = (ROOT / page).read_text("utf-8")
        for name, low in asdict(RANGE["oldest"]).items():
            high = asdict(RANGE["newest"])[name]
            assert re.search(rf"{name} {low} to {high}\b", text, re.IGNORECASE), (page, name)


def test_the_oldest_are_the_bounds_that_a_user_gets() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for name, version in asdict(RANGE["oldest"]).items():
        bound = re.search(rf'{name}>=([\d.]+)[";]|requires-{name} = ">=([\d.]+)"', text)
        assert bound and version.removesuffix(".0") == (bound[1] or bound[2]), name


def test_the_part_is_there() -> None:
    """The long test would find out after minutes."""
    for part in PART:
        assert (ROOT / "tests" / part).exists(), part


def interpreter(version: str) -> str:
    """That Python, or the one that runs the tests where it is not on the path."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    return sys.executable


def run(*command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not tmp_path, three of which pytest keeps."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGE)
def test_the_range(name: str, folder: Path) -> None:
    versions = asdict(RANGE[name])
    venv = run(interpreter(versions.pop("python")), "-m", "venv", "environment", folder=folder)
    assert venv.returncode == 0, venv.stdout
    python = str(folder / "environment" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    wanted = [f"{package}=={version}" for package, version in versions.items()]
    tools = ["hypothesis", "pytest", "rich", "safetensors"]
    installed = run(*pip, *wanted, *tools, folder=folder)
    if "No matching distribution" in installed.stdout:
        pytest.skip(f"the package index has not all of {wanted}")
    assert installed.returncode == 0, installed.stdout
    # A copy, so that the clone stays installed where it is.
    clone = folder / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"))
    installed = run(*pip, "--no-deps", "--editable", str(clone), folder=folder)
    assert installed.returncode == 0, installed.stdout
    told = run(python, "-m", "lora_mux", "info", folder=folder).stdout
    for package, version in versions.items():
        assert re.search(rf"^{package} +{version}\b", told, re.MULTILINE), told
    tests = [f"tests/{part}" for part in PART]
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, folder=clone)
    assert done.returncode == 0, done.stdout[-5000:]
