"""What launches cost on this GPU: python bench/launches.py [--out FILE]

Kernels that do nothing, in a CUDA graph: one after the other; each a dependent launch, which starts
before the one before has ended (sm_90 and newer); and two side by side on two streams with a third
that waits for both. These three decide between forms of our kernels (kernels/README.md). Behind a
product of cuBLAS as well, since that is where they stand in a model.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lora_mux.measure import timing
from lora_mux.measure.provenance import ROOT, provenance

MANY = 96  # launches in a graph, so that the replay's own cost is a hundredth


@triton.jit
def empty_kernel(DEPENDENT: tl.constexpr):
    """Nothing; DEPENDENT: let the next one start, and wait for the one before."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


def empty(programs: int, dependent: bool = False) -> None:
    """One launch."""
    option = {"launch_pdl": True} if dependent else {}
    empty_kernel[(programs,)](DEPENDENT=dependent, num_warps=4, **option)


def beside(stream: Any, side: Callable[[], object], main: Callable[[], object]) -> None:
    """Both at once, `side` on that stream; what follows waits for both."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        side()
    main()
    current.wait_stream(stream)


def calls(device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (what it does, how often its time is divided)."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    pdl = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    x = torch.randn(32, 4096, device=device).bfloat16()
    W = torch.randn(4096, 4096, device=device).bfloat16()
    y = torch.empty(32, 4096, device=device).bfloat16()

    def product() -> None:
        torch.mm(x, W.t(), out=y)

    def one(dependent: bool = False) -> None:
        empty(processors, dependent)

    def repeat(call: Callable[[], object], count: int) -> Callable[[], object]:
        return lambda: [call() for _ in range(count)]

    found = {"launch": (repeat(one, MANY), MANY)}
    found["fork, two side by side, join, one"] = (
        repeat(lambda: (beside(stream, one, one), one()), MANY // 3),
        MANY // 3,
    )
    found["product (L2 warm)"] = repeat(product, MANY // 4), MANY // 4
    found["product, launch"] = repeat(lambda: (product(), one()), MANY // 4), MANY // 4
    found["product beside a launch, join, launch"] = (
        repeat(lambda: (beside(stream, one, product), one()), MANY // 4),
        MANY // 4,
    )
    if pdl:
        found["dependent launch"] = repeat(lambda: one(True), MANY), MANY
        found["product, dependent launch"] = (
            repeat(lambda: (product(), one(True)), MANY // 4),
            MANY // 4,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "launches.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("launches: torch sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    made = calls(device)
    times = timing.microseconds(
        {name: lambda n, call=call: call() for name, (call, _) in made.items()}, 1, device
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for name, (_, count) in made.items():
            each = {k: v if k == "runs" else v / count for k, v in times[name].items()}
            record = {**provenance(device), "what": name, "microseconds": each}
            print(json.dumps(record), file=file)
            print(f"{name:44} {each['p50']:8.3f} us")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
