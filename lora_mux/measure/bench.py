"""`lora-mux bench`: what would adapters cost on a layer of mine?"""

import argparse

import torch
from torch import Tensor, nn

from ..core import Routing
from ..layers import MuxLinear
from .provenance import device_name
from .timing import Times, microseconds, sets_for_cold_l2

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lora-mux bench`."""
    add_sizes(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The sizes of a layer and a batch, which `lora-mux tune` takes as well."""
    parser.add_argument("--in-features", type=positive, default=4096, help="K of the layer (4096)")
    parser.add_argument("--out-features", type=positive, default=4096, help="N (4096)")
    rows = [1, 32, 256, 2048]
    parser.add_argument("--rows", type=positive, nargs="+", default=rows, help=f"{rows}")
    parser.add_argument("--adapters", type=positive, default=8, help="in the batch (8)")
    parser.add_argument("--rank", type=positive, default=16, help="of each adapter (16)")
    parser.add_argument("--selections", type=positive, default=1, help="adapters of a row (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(args: argparse.Namespace) -> int:
    """Time the layer alone and with its adapters, for each number of rows; a row of a table each.

    On a GPU a graph of the whole layer, plan included, with cold caches; on a CPU by minima.
    """
    device = torch.device(args.device)
    K, N = args.in_features, args.out_features
    adapters = max(args.adapters, args.selections)
    print(
        f"{device_name(device)}: {K} -> {N} {args.dtype}, {adapters} adapters of rank {args.rank}"
    )
    print(f"each row selects {args.selections}")
    print(f"{'rows':>6} {'layer alone':>14} {'with adapters':>14} {'ratio':>7}")
    statistic = "p50" if device.type == "cuda" else "min"
    for rows in args.rows:
        times = _times(args, rows, adapters, device)
        base, mixed = times["alone"][statistic], times["mixed"][statistic]
        print(f"{rows:6} {base:11.1f} us {mixed:11.1f} us {mixed / base:7.2f}", flush=True)
    return 0


def _times(
    args: argparse.Namespace, rows: int, adapters: int, device: torch.device
) -> dict[str, Times]:
    sets = sets_for_cold_l2(
        DTYPES[args.dtype].itemsize * args.in_features * args.out_features, device
    )
    batches = [_batch(args, rows, adapters, device, seed) for seed in range(sets)]

    def alone(n: int) -> Tensor:
        layer, x, _ = batches[n]
        y: Tensor = layer(x)
        return y

    def mixed(n: int) -> Tensor:
        layer, x, routing = batches[n]
        y: Tensor = layer(x, routing)
        return y

    with torch.inference_mode():
        return microseconds({"alone": alone, "mixed": mixed}, sets, device)


def _batch(
    args: argparse.Namespace, rows: int, adapters: int, device: torch.device, seed: int
) -> tuple[MuxLinear, Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    K, N, dtype = args.in_features, args.out_features, DTYPES[args.dtype]
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
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
    index = torch.tensor(handles)[chosen].to(device)
    x = torch.randn(rows, K, generator=generator).to(device, dtype)
    return layer, x, Routing(index)
