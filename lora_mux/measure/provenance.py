"""What a stranger needs to measure a figure again: commit, command, machine and versions."""

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__

ROOT = Path(__file__).parents[2]  # of a clone


def provenance(device: torch.device) -> dict[str, Any]:
    """The fields of a record that do not depend on the workload."""
    return {
        "lora_mux": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "command": " ".join(["python", _script(), *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
    }


def device_name(device: torch.device) -> str:
    """The device's name in records and tuned tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu()} CPU"


def _script() -> str:
    """The script's path from the root of a clone, or its bare name: no path of this machine."""
    script = Path(sys.argv[0]).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """None outside a clone: an installed package must not name the commit of a project around."""
    return _run("git", *arguments) if (ROOT / ".git").exists() else None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
