"""What the host does before the device does anything: python bench/dispatch.py

Operators: the signature of lora_mux::add_lora_ with nothing behind it, in three forms: a plain
function, an operator of torch.library.Library, and one of torch.library.custom_op.

Eager mode: layers and routes with launches that do nothing (tests/support/fake_driver.py) and a
base layer that does nothing, so that all of the time is Python's, torch's and Triton's. A layer's
is that of a model of 16 minus that of one of 4 layers, a twelfth. A step of training is forward and
backward through one layer, under a route that is in force, minus that of the frozen layer alone,
whose products are computed.

Minima of interleaved runs on the CPU, in microseconds a call. One record is appended to the file.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_mux.ops
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import microseconds

ROWS, WIDTH, ADAPTERS, RANK = 32, 64, 8, 16
# Layers: a run is to be short, so that there are some that no other process interrupts.
FEW, MANY = 4, 16
REPEATED = 3  # calls in a run: the first one meets caches that other calls have filled
TILED = lora_mux.ops.Method("triton", 16)
TRAINED = 4, 64  # adapters of a step of training
LINEAR = nn.functional.linear

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
    """A value for each argument of the schema, but for those of adapters that are trained."""
    given = itertools.takewhile(lambda argument: argument.name != "parameters", schema.arguments)
    types = [str(argument.type) for argument in given]
    return [torch.zeros(4, 4) if "Tensor" in type_ else VALUES[type_] for type_ in types]


def pretend() -> None:
    """From now on the kernels run on the CPU, where launches and base layers do nothing."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import codegen
    import fake_driver
    from lora_mux.kernels import launch, pairs

    fake_driver.install("sm_90", computes=False)
    fake_driver._Launcher.__call__ = lambda *_: None  # type: ignore[method-assign]
    launch.architecture = lambda _: codegen.ARCHITECTURES["sm_90"]  # type: ignore[assignment]
    lora_mux.ops.dispatch._interpreted = lambda: True
    sort = pairs.pairs_by  # of slots that nobody has computed
    pairs.pairs_by = lambda slots, numbers: sort(slots.zero_(), numbers)
    y = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)
    nn.functional.linear = lambda *_: y  # type: ignore[assignment]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)


def factors() -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)


def routed(layers: int) -> tuple[nn.Module, lora_mux.Mux]:
    """A model with adapters, and a route of one for each row."""
    model = nn.Sequential(*(linear() for _ in range(layers)))
    mux = lora_mux.attach(model, backend="triton")
    for name in map(str, range(ADAPTERS)):
        mux.add_adapter(name, {path: factors() for path in mux.targets}, alpha=RANK)
    return model, mux


def in_eager_mode() -> dict[str, Callable[[], object]]:
    """name -> what is timed."""
    x = torch.randn(ROWS, WIDTH).bfloat16()
    names = [str(row % ADAPTERS) for row in range(ROWS)]
    calls: dict[str, Callable[[], object]] = {}
    for layers in (FEW, MANY):
        model, mux = routed(layers)
        base = nn.Sequential(*(linear() for _ in range(layers)))
        mux.set_route(names)
        calls[f"routed {layers}"] = lambda model=model: model(x)
        calls[f"base {layers}"] = lambda base=base: base(x)
    other = routed(1)[1]
    calls["set_route, 32 names"] = lambda: other.set_route(names)
    calls["set_adapter"] = lambda: other.set_adapter("1")
    for fused in (False, True):
        alone, plain = lora_mux.MuxLinear(linear(), backend="triton", fused=fused), linear()
        handles = [alone.add_adapter(n, *factors(), alpha=RANK) for n in map(str, range(ADAPTERS))]
        routing = lora_mux.Routing(torch.tensor(handles).repeat(ROWS // ADAPTERS)[:, None])
        calls[f"alone, fused={fused}"] = lambda layer=alone, rows=routing: layer(x, rows)
        calls[f"alone, base {fused}"] = lambda plain=plain: plain(x)
        calls["plan"] = lambda rows=routing, slots=alone.mux_slots: lora_mux.ops.plan(
            rows, slots, TILED
        )
    return calls


def in_training() -> dict[str, Callable[[], object]]:
    """name -> a forward and backward of one layer."""
    calls: dict[str, Callable[[], object]] = {}
    for adapters in TRAINED:
        rows = max(ROWS, adapters)
        x = torch.randn(rows, WIDTH).bfloat16().requires_grad_()
        dy = torch.randn(rows, WIDTH).bfloat16()
        base = nn.Sequential(linear()).requires_grad_(False)
        model = nn.Sequential(linear()).requires_grad_(False)
        mux = lora_mux.attach(model, backend="triton")
        names = [str(i) for i in range(adapters)]
        for name in names:
            exact = tuple(factor.bfloat16() for factor in factors())
            mux.add_adapter(name, {"0": exact}, alpha=RANK)
        leaves = [x, *(p for name in names for p in mux.train(name).parameters())]
        mux.set_route([names[row % adapters] for row in range(rows)])

        def step(model: nn.Module, leaves: list[Tensor], x: Tensor = x, dy: Tensor = dy) -> None:
            nothing, nn.functional.linear = nn.functional.linear, LINEAR
            with torch.inference_mode(False), torch.enable_grad():
                for leaf in leaves:
                    leaf.grad = None
                model(x).backward(dy)
            nn.functional.linear = nothing

        calls[f"step {adapters}"] = functools.partial(step, model, leaves)
        calls[f"step's base {adapters}"] = functools.partial(step, base, [x])
    return calls


def beyond_the_base(us: dict[str, float]) -> dict[str, float]:
    """What is asked for, of what was timed."""
    layers = MANY - FEW
    routed = (us[f"routed {MANY}"] - us[f"routed {FEW}"]) / layers
    base = (us[f"base {MANY}"] - us[f"base {FEW}"]) / layers
    return {
        "a layer of a routed model": routed - base,
        "its base": base,
        "a plan": us["plan"],
        **{
            f"a layer with a routing handed in, fused={fused}": us[f"alone, fused={fused}"]
            - us[f"alone, base {fused}"]
            for fused in (False, True)
        },
        **{name: us[name] for name in ("set_route, 32 names", "set_adapter")},
        **{
            f"a step of a layer that trains {n} adapters": us[f"step {n}"] - us[f"step's base {n}"]
            for n in TRAINED
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    # Few, so that there are runs that no other process interrupts.
    parser.add_argument("--calls", type=int, default=20, help="in a run (20)")
    parser.add_argument("--runs", type=int, default=500, help="of each form, at most (500)")
    parser.add_argument("--seconds", type=float, default=40.0, help="for eager mode (40)")
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
        pretend()
        made = in_eager_mode()
        with torch.inference_mode(False):
            made |= in_training()
        eager = {name: lambda _, call=call: call() for name, call in made.items()}
        for call in eager.values():
            call(0)
        took = microseconds(eager, REPEATED, torch.device("cpu"), 10**6, seconds=args.seconds)
    record = {
        **provenance(torch.device("cpu")),
        "operator": schema.name,
        "arguments": len(given),
        "calls": args.calls,
        "microseconds": {name: time["min"] / args.calls for name, time in times.items()},
        "eager": beyond_the_base({name: time["min"] for name, time in took.items()}),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for name, us in {**record["microseconds"], **record["eager"]}.items():
        print(f"{name:48} {us:8.2f} us")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
