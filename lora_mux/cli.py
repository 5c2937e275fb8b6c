"""The command line: lora-mux info, demo, bench, tune."""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, demo, ops
from .errors import LoraMuxError
from .measure import bench, tune

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2: the arguments or the installation are wrong)."""
    parser = argparse.ArgumentParser(
        prog="lora-mux",
        description="A different mix of LoRA adapters in every row of a batch.",
        epilog="`lora-mux COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lora-mux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="show versions, devices, and the backend that would run",
        description="Show versions, devices, and the backend that would run, and why.",
    )
    demo.add_arguments(
        commands.add_parser("demo", help="run one batch of a real model and compare it with PEFT")
    )
    bench.add_arguments(
        commands.add_parser("bench", help="time a layer of your sizes with and without adapters")
    )
    tune.add_arguments(
        commands.add_parser("tune", help="find the kernels' best tiles for your GPU and layer")
    )
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    try:
        return {"demo": demo.run, "bench": bench.run, "tune": tune.run}[args.command](args)
    except LoraMuxError as error:
        print(f"lora-mux {args.command}: {error}", file=sys.stderr)
        return 2


def info() -> str:
    """What is installed here, which backend `backend="auto"` would use, and why."""
    lines = [f"lora-mux      {__version__}", f"python        {platform.python_version()}"]
    lines += [f"{name:13} {_version(name)}" for name in PACKAGES]
    lines += [f"device        {device}" for device in _devices()]
    lines += [f"backend       {ops.backend_reason()}"]
    return "\n".join(lines)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed, version unknown"


def _devices() -> list[str]:
    cpu = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [cpu, *gpus]
