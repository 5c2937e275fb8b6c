"""What more adapters than fit into memory cost, against PEFT: python bench/residency.py

A stack of linear layers on the CPU, adapters in PEFT folders (a few folders under many names), and
pools that hold some of them. Four times are taken: registering; the first use of an adapter that is
not resident, against a plain copy of as many bytes; routes to resident adapters; and routes that
evict another adapter each time. PEFT's load_adapter and set_adapter run on the same files in the
same run. The files are in the page cache.

Then what registering alone takes, in time and on the host, with as many targets as a 7B Llama has.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lora_mux
from lora_mux.checkpoints import read_peft_folder
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.progress import progress_bar


def stack(layers: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).requires_grad_(False)


def save_folders(base: nn.Sequential, rank: int, count: int, root: Path) -> list[Path]:
    """PEFT's own checkpoints."""
    names = [str(i) for i in range(len(base))]
    config = peft.LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    folders = [root / f"{i}" for i in range(count)]
    for folder in folders:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder)
    return folders


def milliseconds(call: Callable[[], object], times: int) -> dict[str, float]:
    """Minimum and median."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - start))
    took.sort()
    return {"min": took[0], "p50": took[len(took) // 2]}


def routed(mux: lora_mux.Mux, name: str) -> None:
    with mux.route([name]):
        pass


def ours(args: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    model = stack(args.layers, args.width)
    row_bytes = args.layers * (2 * args.width * 4 + 1)
    mux = lora_mux.attach(model, memory=args.resident * args.rank * row_bytes)
    names = [f"a{i}" for i in range(args.adapters)]
    start = time.perf_counter()
    mux.load_many({name: folders[i % len(folders)] for i, name in enumerate(names)})
    registered = time.perf_counter() - start
    size = args.rank * row_bytes
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    cold = itertools.cycle(names[: 2 * args.resident])  # twice as many as fit
    first = milliseconds(lambda: routed(mux, next(cold)), args.resident)  # into free rows
    evicting = milliseconds(lambda: routed(mux, next(cold)), 4 * args.resident)
    hot = itertools.cycle([n for n, h in mux.memory().adapters.items() if h.resident][:8])
    return {
        "register all": 1e3 * registered,
        "bytes of an adapter": size,
        "copy of as many bytes": milliseconds(lambda: target.copy_(source), 50),
        "first use": first,
        "route, evicting each time": evicting,
        "route, resident": milliseconds(lambda: routed(mux, next(hot)), 400),
        "set_adapter, resident": milliseconds(lambda: mux.set_adapter(next(hot)), 400),
    }


def host_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def per_adapter(register: Callable[[int], object], count: int) -> dict[str, float]:
    """Time and host memory of one, after a first one that the others share an outline with."""
    register(0)
    before, start = host_bytes(), time.perf_counter()
    for i in range(1, count + 1):
        register(i)
    took = time.perf_counter() - start
    return {"microseconds": 1e6 * took / count, "bytes": (host_bytes() - before) / count}


def registering(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Many narrow layers: of their values nothing is read."""
    base = stack(args.targets, 8)
    folders = save_folders(base, 1, 8, root / "narrow")
    time.sleep(2.1)  # newer files are read twice
    mux = lora_mux.attach(stack(args.targets, 8), memory="64MiB")
    mux.reserve(args.registered + 1, 1)
    kept = []

    def read(i: int) -> None:
        kept.append(read_peft_folder(folders[i % len(folders)], mux.targets))

    def load(i: int) -> None:
        mux.load(f"a{i}", folders[i % len(folders)])

    return {
        "registering, reading alone": per_adapter(read, args.registered),
        "registering": per_adapter(load, args.registered),
    }


def theirs(args: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    model: Any = peft.PeftModel.from_pretrained(
        stack(args.layers, args.width), folders[0], adapter_name="a0"
    )
    numbers = iter(progress_bar(range(1, args.peft), "PEFT"))

    def load() -> None:
        i = next(numbers)
        model.load_adapter(folders[i % len(folders)], f"a{i}")

    loaded = milliseconds(load, args.peft - 1)
    hot = itertools.cycle([f"a{i}" for i in range(min(8, args.peft))])
    return {
        "load_adapter": loaded,
        "set_adapter": milliseconds(lambda: model.set_adapter(next(hot)), 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    sizes = {"layers": 64, "width": 1024, "rank": 16, "adapters": 5000, "resident": 32}
    sizes |= {"folders": 48, "peft": 48, "targets": 224, "registered": 2000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "residency.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT's, about the base model's missing config
        folders = save_folders(stack(args.layers, args.width), args.rank, args.folders, Path(root))
        sizes = {key: getattr(args, key) for key in sizes}
        record = {
            **provenance(torch.device("cpu")),
            "sizes": sizes,
            "milliseconds": {"lora_mux": ours(args, folders), "PEFT": theirs(args, folders)},
            "per adapter": registering(args, Path(root)),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for who, figures in record["milliseconds"].items():
        for what, took in figures.items():
            print(f"{who:9} {what:28} {took}")
    for what, figures in record["per adapter"].items():
        print(f"{what:28} {figures}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
