"""The command `lora-mux bench`: what do adapters cost on a layer of your sizes?"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Routing
from ..layers import MuxLinear
from .provenance import device_name
from .timing import SECONDS, Times, microseconds, sets_for_cold_l2

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The sizes to measure unless an option says otherwise.
SIZES: dict[str, Any] = {"in_features": 4096, "out_features": 4096, "rows": [1, 32, 256, 2048]}
QUICK_SIZES: dict[str, Any] = {"in_features": 1024, "out_features": 1024, "rows": [1, 32]}
QUICK_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux bench`."""
    parser.description = (
        "Time one linear layer alone and with adapters, for each number of rows. On a GPU: medians "
        "of CUDA graphs with a cold L2 cache, as in a model. On a CPU: the fastest run."
    )
    add_sizes(parser)
    parser.set_defaults(**dict.fromkeys(SIZES))  # so that `run` sees which were left out
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a first look in seconds: a 1024 x 1024 layer, 1 and 32 rows (sizes that you give "
        "still count)",
    )
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="DEVICE",
        help="cpu, cuda or cuda:INDEX (default: a GPU where there is one)",
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The sizes of a layer and a batch, which `lora-mux tune` takes as well."""

    def add(option: str, metavar: str, default: Any, text: str, **how: Any) -> None:
        parser.add_argument(
            option, type=positive, default=default, metavar=metavar, help=text, **how
        )

    add("--in-features", "K", SIZES["in_features"], "width of the layer's input (4096)")
    add("--out-features", "N", SIZES["out_features"], "width of its output (4096)")
    add("--rows", "M", SIZES["rows"], "rows of each batch to measure (1 32 256 2048)", nargs="+")
    add("--adapters", "S", 8, "different adapters in a batch (8)")
    add("--rank", "R", 16, "rank of each adapter (16)")
    add("--selections", "J", 1, "adapters that each row selects (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the layer (bf16)")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A device whose time `timing` can take."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:INDEX, got {text!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch sees no GPU for {text!r}; cpu works everywhere")
    return found


def run(args: argparse.Namespace) -> int:
    """Time the layer alone and with its adapters, for each number of rows; a row of a table each.

    On a GPU a graph of the whole layer, plan included, with cold caches; on a CPU by minima.
    """
    for name, size in (QUICK_SIZES if args.quick else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    K, N = args.in_features, args.out_features
    adapters = max(args.adapters, args.selections)
    print(
        f"{device_name(args.device)}: {K} -> {N} {args.dtype}, "
        f"{adapters} adapters of rank {args.rank}"
    )
    print(f"each row selects {args.selections}")
    print(f"{'rows':>6} {'layer alone':>14} {'with adapters':>14} {'ratio':>7}")
    statistic = "p50" if args.device.type == "cuda" else "min"
    for rows in args.rows:
        times = _times(args, rows, adapters)
        base, mixed = times["alone"][statistic], times["mixed"][statistic]
        print(f"{rows:6} {base:11.1f} us {mixed:11.1f} us {mixed / base:7.2f}", flush=True)
    return 0


def _times(args: argparse.Namespace, rows: int, adapters: int) -> dict[str, Times]:
    weight_bytes = DTYPES[args.dtype].itemsize * args.in_features * args.out_features
    sets = sets_for_cold_l2(weight_bytes, args.device)
    batches = [_batch(args, rows, adapters, seed) for seed in range(sets)]

    def alone(n: int) -> Tensor:
        layer, x, _ = batches[n]
        y: Tensor = layer(x)
        return y

    def mixed(n: int) -> Tensor:
        layer, x, routing = batches[n]
        y: Tensor = layer(x, routing)
        return y

    seconds = QUICK_SECONDS if args.quick else SECONDS
    with torch.inference_mode():
        return microseconds({"alone": alone, "mixed": mixed}, sets, args.device, seconds=seconds)


def _batch(
    args: argparse.Namespace, rows: int, adapters: int, seed: int
) -> tuple[MuxLinear, Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    K, N, dtype = args.in_features, args.out_features, DTYPES[args.dtype]
    linear = nn.Linear(K, N, bias=False, device=args.device, dtype=dtype).requires_grad_(False)
    layer = MuxLinear(linear)
    layer.reserve(adapters, args.rank)
    handles = [
        layer.add_adapter(
            f"{i}",
            torch.randn(args.rank, K, generator=generator) / K**0.5,
            torch.randn(N, args.rank, generator=generator) / args.rank**0.5,
            scaling=1.0,
        )
        for i in range(adapters)
    ]
    chosen = torch.rand(rows, adapters, generator=generator).topk(args.selections).indices
    index = torch.tensor(handles)[chosen].to(args.device)
    x = torch.randn(rows, K, generator=generator).to(args.device, dtype)
    return layer, x, Routing(index)
