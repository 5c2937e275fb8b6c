"""A script in two processes over gloo on this machine: what starts them, and what they share."""

import datetime
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def answers_of_two(script: ModuleType, folder: Path, seconds: float) -> list[Any]:
    """What each of two processes that run a script has saved.

    Args:
        script: takes RANK, a file that both share, and the file that it is to save.
        folder: for these files.
        seconds: what each process may take.
    """
    command = [sys.executable, str(script.__file__)]
    started = [
        subprocess.Popen(
            [*command, str(rank), folder / "store", folder / f"{rank}.pt"],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def join(rank: int, store: str) -> None:
    """In a script: be one of the two."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )


def data(rank: int) -> Tensor:
    """[3, 6], another batch in each process."""
    g = torch.Generator().manual_seed(10 + rank)
    return torch.randn(3, 6, generator=g, dtype=torch.float64)
