"""What more adapters than fit into memory cost, against PEFT: python bench/residency.py

A stack of linear layers on the CPU (or --device cuda), adapters in PEFT folders (a few folders
under many names), and pools that hold some of them. Four times are taken: registering; the first
use of an adapter that is not resident, against a plain copy of as many bytes; routes to resident
adapters; and routes that evict another adapter each time. PEFT's load_adapter and set_adapter run
on the same files in the same run. The files are in the page cache. What brings bytes to a GPU ends
when they are there.

Then what registering alone takes, in time and on the host, with as many targets as a 7B Llama has.

Then a big adapter comes into pools that are full of small ones, of which every second one was used
lately, while another thread routes to one of them: how long it takes, and how long a route waits.
"""

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lora_mux
from lora_mux.checkpoints import BaseModel, read_peft_folder
from lora_mux.measure.bench import device
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import wait
from lora_mux.progress import progress_bar

CPU = torch.device("cpu")
# What the record calls its sizes.
SIZES = {
    **{"layers": 64, "width": 1024, "rank": 16, "adapters": 5000, "resident": 32},
    **{"folders": 48, "peft": 48, "crowd": 2000, "big": 256, "targets": 224, "registered": 2000},
}


def stack(layers: int, width: int, place: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    return made.requires_grad_(False).to(place)


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


def row_bytes(width: int) -> int:
    """What a rank row of one layer takes."""
    return 2 * width * 4 + 1


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
    place = args.device
    model = stack(args.layers, args.width, place)
    size = args.rank * args.layers * row_bytes(args.width)
    mux = lora_mux.attach(model, memory=args.resident * size)
    names = [f"a{i}" for i in range(args.adapters)]
    start = time.perf_counter()
    mux.load_many({name: folders[i % len(folders)] for i, name in enumerate(names)})
    registered = time.perf_counter() - start
    source = torch.ones(size, dtype=torch.uint8)
    target = source.to(place, copy=True)
    if place.type == "cuda":
        source = source.pin_memory()
    cold = itertools.cycle(names[: 2 * args.resident])  # twice as many as fit

    def plain_copy() -> None:
        target.copy_(source, non_blocking=True)
        wait(place)

    def brought() -> None:
        routed(mux, next(cold))
        wait(place)

    first = milliseconds(brought, args.resident)  # into free rows
    evicting = milliseconds(brought, 4 * args.resident)
    hot = itertools.cycle([n for n, h in mux.memory().adapters.items() if h.resident][:8])
    return {
        "register all": 1e3 * registered,
        "bytes of an adapter": size,
        "copy of as many bytes": milliseconds(plain_copy, 50),
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
    base = stack(args.targets, 8, CPU)
    folders = save_folders(base, 1, 8, root / "narrow")
    time.sleep(2.1)  # newer files are read twice
    mux = lora_mux.attach(stack(args.targets, 8, args.device), memory="64MiB")
    mux.reserve(args.registered + 1, 1)
    kept = []

    def read(i: int) -> None:
        kept.append(read_peft_folder(folders[i % len(folders)], BaseModel(mux.targets)))

    def load(i: int) -> None:
        mux.load(f"a{i}", folders[i % len(folders)])

    return {
        "registering, reading alone": per_adapter(read, args.registered),
        "registering": per_adapter(load, args.registered),
    }


def crowd(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By setting."""
    rows, big = args.crowd, args.big
    narrow, wide = (1, 16, args.device), (args.layers, args.width, args.device)
    return {
        f"1 layer, {rows} of rank 1, one of {rows // 2}": into_a_crowd(*narrow, rows, 1, rows // 2),
        f"{args.layers} layers, {2 * big} of rank 2, one of {big}": into_a_crowd(
            *wide, 2 * big, 2, big
        ),
    }


def into_a_crowd(
    layers: int, width: int, place: torch.device, small: int, rank: int, big: int
) -> dict[str, float]:
    """Milliseconds until the big adapter is resident, and the longest of a route meanwhile."""
    rows = small * rank
    mux = lora_mux.attach(stack(layers, width, place), memory=rows * layers * row_bytes(width))

    def add(name: str, rank: int) -> None:
        pair = torch.randn(rank, width), torch.randn(width, rank)
        mux.add_adapter(name, {str(i): pair for i in range(layers)}, alpha=1)

    names = [f"small{i}" for i in range(small)]
    for name in progress_bar(names, f"{small} adapters"):
        add(name, rank)
        mux.prefetch([name])
    mux.prefetch(names[::2])
    mux.pin(names[-1])
    add("big", big)
    done, took = threading.Event(), []

    def route() -> None:
        while not done.is_set():
            took.append(milliseconds(lambda: routed(mux, names[-1]), 1)["min"])

    other = threading.Thread(target=route)
    other.start()

    def arrive() -> None:
        mux.prefetch(["big"])
        wait(place)

    arrival = milliseconds(arrive, 1)["min"]
    done.set()
    other.join()
    held = mux.memory().adapters
    gone = sum(not held[name].resident for name in names)
    return {"until it is resident": arrival, "longest route": max(took), "evicted": gone}


def theirs(args: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    base, where = stack(args.layers, args.width, args.device), str(args.device)
    model: Any = peft.PeftModel.from_pretrained(
        base, folders[0], adapter_name="a0", torch_device=where
    )
    numbers = iter(progress_bar(range(1, args.peft), "PEFT"))

    def load() -> None:
        i = next(numbers)
        model.load_adapter(folders[i % len(folders)], f"a{i}", torch_device=where)
        wait(args.device)

    loaded = milliseconds(load, args.peft - 1)
    hot = itertools.cycle([f"a{i}" for i in range(min(8, args.peft))])
    return {
        "load_adapter": loaded,
        "set_adapter": milliseconds(lambda: model.set_adapter(next(hot)), 20),
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "residency.jsonl")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT's, about the base model's missing config
        base = stack(args.layers, args.width, CPU)
        folders = save_folders(base, args.rank, args.folders, Path(root))
        sizes = {key: getattr(args, key) for key in SIZES}
        record = {
            **provenance(args.device),
            "sizes": sizes,
            "milliseconds": {
                "lora_mux": ours(args, folders),
                "PEFT": theirs(args, folders),
                "into a crowd": crowd(args),
            },
            "per adapter": registering(args, Path(root)),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for who, figures in record["milliseconds"].items():
        for what, took in figures.items():
            print(f"{who:12} {what:41} {took}")
    for what, figures in record["per adapter"].items():
        print(f"{what:54} {figures}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
