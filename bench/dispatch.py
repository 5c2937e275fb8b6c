"""What it costs to get into an operator, in microseconds a call: python bench/dispatch.py

The same signature as lora_mux::add_lora_, with nothing in it: a plain function, an operator made
by torch.library.Library, one made by torch.library.custom_op. Minima of interleaved runs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_mux.ops import operators

CALLS = 2000


def nothing(
    y: Tensor,
    x: Tensor,
    A_rows: Tensor,
    B_rows: Tensor,
    constant: Tensor | None,
    offset: Tensor,
    rank: Tensor,
    scaling: Tensor,
    slots: Tensor,
    strength: Tensor,
    union: Tensor,
    length: Tensor,
    place: Tensor,
    state: Tensor,
    max_rank: int,
    batch_invariant: bool = False,
    triton: bool | None = None,
) -> None:
    return None


def main() -> None:
    library: Any = torch.library.Library("lora_mux_bench", "DEF")
    library.define(
        f"nothing(Tensor(a!) y, Tensor x, {operators.POOL}{operators.PLAN}{operators.HOW}) -> ()"
    )
    library.impl("nothing", nothing, "CompositeExplicitAutograd")
    custom = torch.library.custom_op("lora_mux_bench::custom", mutates_args=("y",))(nothing)
    tensors = [torch.zeros(4, 4) for _ in range(14)]
    ways: dict[str, Callable[..., Any]] = {
        "plain function": nothing,
        "Library.define + impl": torch.ops.lora_mux_bench.nothing,
        "custom_op": custom,
    }
    best = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode():
        for _ in range(20):
            for name, call in ways.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(*tensors, 16, False, True)
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
    for name, seconds in best.items():
        print(f"{name:24} {1e6 * seconds:6.2f} us")


if __name__ == "__main__":
    main()
