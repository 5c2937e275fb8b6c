"""What calling an operator costs before it does anything: python bench/dispatch.py

The signature of lora_mux::add_lora_ with nothing behind it, in three forms: a plain function, an
operator of torch.library.Library, and one of torch.library.custom_op. Minima of interleaved runs on
the CPU, in microseconds a call.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_mux.ops  # noqa: F401  # defines the operators
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import microseconds

OPERATOR = torch.ops.lora_mux.add_lora_.default
# What an argument of each type is given.
VALUES: dict[str, Any] = {"int": 16, "bool": False, "Optional[bool]": True}


def nothing(*arguments: Any) -> None:
    return None


def forms(schema: Any, library: Any) -> dict[str, Callable[..., Any]]:
    """name -> a callable with that schema which does nothing; they live as long as the library."""
    signature = str(schema).removeprefix(schema.name)
    library.define(f"nothing{signature}")
    library.impl("nothing", nothing, "CompositeExplicitAutograd")
    custom = torch.library.custom_op(
        "lora_mux_bench::custom", nothing, mutates_args=("y",), schema=signature
    )
    return {
        "plain function": nothing,
        "torch.library.Library": torch.ops.lora_mux_bench.nothing,
        "torch.library.custom_op": custom,
    }


def arguments(schema: Any) -> list[Any]:
    """A value for each argument of the schema."""
    types = [str(argument.type) for argument in schema.arguments]
    return [torch.zeros(4, 4) if "Tensor" in type_ else VALUES[type_] for type_ in types]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    # Few, so that there are runs that no other process interrupts.
    parser.add_argument("--calls", type=int, default=20, help="in a run (20)")
    parser.add_argument("--runs", type=int, default=500, help="of each form, at most (500)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "dispatch.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    schema = OPERATOR._schema
    given = arguments(schema)

    def run_of(call: Callable[..., Any]) -> Callable[[int], None]:
        def run(n: int) -> None:
            for _ in range(args.calls):
                call(*given)

        return run

    library: Any = torch.library.Library("lora_mux_bench", "FRAGMENT")
    runs = {name: run_of(call) for name, call in forms(schema, library).items()}
    with torch.inference_mode():
        times = microseconds(runs, 1, torch.device("cpu"), args.runs)
    record = {
        **provenance(torch.device("cpu")),
        "operator": schema.name,
        "arguments": len(given),
        "calls": args.calls,
        "microseconds": {name: time["min"] / args.calls for name, time in times.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for name, took in record["microseconds"].items():
        print(f"{name:24} {took:8.2f} us")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
