"""What switching and mixing cost over a whole model, against PEFT: python bench/model.py

A stack of 200 linear layers of width 8 with 64 adapters loaded. Arithmetic costs next to nothing
there, so the times show what a framework does for each layer and adapter. A mixed forward comes
with the names of the one before, as in decoding, or with the same in another order. Minima of
interleaved runs by the host's clock; on a GPU (--device cuda) a forward pass ends when the GPU is
done. Then, without a GPU, the number of graphs that torch.compile makes for new lists of names: it
depends on no device, and PEFT's take 20 s.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lora_mux
from lora_mux.measure.bench import device
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import SECONDS, microseconds, wait


def stack(layers: int, place: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    return made.eval().requires_grad_(False).to(place)


def with_peft(layers: int, adapters: int, place: torch.device) -> Any:
    names = [str(i) for i in range(layers)]
    config = peft.LoraConfig(r=8, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(stack(layers, place), config, "a0")
    for name in (f"a{i}" for i in range(1, adapters)):
        # What add_adapter does in the end. It looks at all modules for each of them before, which
        # takes 49 s here instead of 8.
        model.peft_config[name] = config
        for layer in (model.base_model.model[i] for i in range(layers)):
            layer.update_layer(name, config.r, lora_alpha=config.lora_alpha, config=config)
    return model.eval()


def with_ours(
    layers: int, model: Any, adapters: int, place: torch.device
) -> tuple[nn.Sequential, lora_mux.Mux]:
    """The same adapters, taken from PEFT's model."""
    plain = stack(layers, place)
    mux = lora_mux.attach(plain, targets=[str(i) for i in range(layers)])
    lora = [model.base_model.model[i] for i in range(layers)]
    for name in (f"a{i}" for i in range(adapters)):
        weights = {
            str(i): (layer.lora_A[name].weight.data, layer.lora_B[name].weight.data)
            for i, layer in enumerate(lora)
        }
        mux.add_adapter(name, weights, alpha=8)
    return plain, mux


def milliseconds(
    calls: dict[str, Callable[[], object]], seconds: float, least: int
) -> dict[str, float]:
    """The minimum of each, interleaved, by the host's clock."""
    numbered = {name: lambda n, call=call: call() for name, call in calls.items()}
    times = microseconds(numbered, 1, torch.device("cpu"), seconds=seconds, least=least)
    return {name: time["min"] / 1e3 for name, time in times.items()}


def graphs(model: Callable[..., Any], calls: list[Callable[[Any], object]]) -> int:
    """How many graphs torch.compile makes for these calls of one model."""
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    made = torch.compile(model, backend=backend)
    for call in calls:
        call(made)
    return compiled


def routed(mux: lora_mux.Mux, names: list[str], x: torch.Tensor) -> Callable[[Any], object]:
    """A call of our model in which row i has the adapter names[i]."""

    def call(model: Any) -> None:
        with mux.route(names):
            model(x)

    return call


def count_graphs(adapters: int, lists: list[list[str]], x: torch.Tensor) -> dict[str, int]:
    """Of three layers, which do: only the number counts here."""
    theirs = with_peft(3, adapters, x.device)
    ours, mux = with_ours(3, theirs, adapters, x.device)
    return {
        "lora_mux": graphs(ours, [routed(mux, order, x) for order in lists]),
        "PEFT": graphs(theirs, [lambda m, o=order: m(x, adapter_names=o) for order in lists]),
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the calls of each")
    parser.add_argument("--least", type=int, default=3, help="runs, however long they take")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "model.jsonl")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    torch.set_num_threads(1)
    place = args.device
    theirs = with_peft(args.layers, args.adapters, place)
    plain, mux = with_ours(args.layers, theirs, args.adapters, place)
    names = [f"a{i}" for i in range(args.adapters)]
    x = torch.randn(len(names), 8).to(place)

    def waited(y: torch.Tensor) -> torch.Tensor:
        wait(place)
        return y

    timed = partial(milliseconds, seconds=args.seconds, least=args.least)
    lists = [names[i:] + names[:i] for i in range(5)]
    other = itertools.cycle(lists)

    def mixed(rows: list[str] = names) -> torch.Tensor:
        with mux.route(rows):
            return waited(plain(x))

    def disabled() -> None:
        with mux.disable_adapter():
            pass

    def disabled_by_peft() -> None:
        with theirs.disable_adapter():
            pass

    with torch.inference_mode():
        torch.testing.assert_close(mixed(), theirs(x, adapter_names=names), rtol=1e-3, atol=1e-4)
        ours_ms = timed(
            {
                "set_adapter": lambda: mux.set_adapter("a1"),
                "disable_adapter": disabled,
                "mixed forward": mixed,
                "mixed, other names": lambda: mixed(next(other)),
                "base forward": lambda: (mux.set_adapter(None), waited(plain(x))),
            }
        )
        peft_ms = timed(
            {
                "set_adapter": lambda: theirs.set_adapter("a1"),
                "disable_adapter": disabled_by_peft,
                "mixed forward": lambda: waited(theirs(x, adapter_names=names)),
                "mixed, other names": lambda: waited(theirs(x, adapter_names=next(other))),
            }
        )
        # Above it comes after other calls, as in serving; here after itself, with warm caches.
        again = "set_adapter, again and again"
        ours_ms |= timed({again: lambda: mux.set_adapter("a1")})
        peft_ms |= timed({again: lambda: theirs.set_adapter("a1")})
        compiled = count_graphs(args.adapters, lists, x) if place.type == "cpu" else None
    record = {
        **provenance(place),
        "layers": args.layers,
        "adapters": args.adapters,
        "milliseconds": {"lora_mux": ours_ms, "PEFT": peft_ms},
        "graphs": compiled,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for name, took in peft_ms.items():
        print(
            f"{name:28} {ours_ms[name]:10.4f} ms  PEFT {took:8.1f} ms  {took / ours_ms[name]:9.0f}x"
        )
    print(f"base forward                 {ours_ms['base forward']:10.4f} ms")
    if compiled:
        counts = f"{compiled['lora_mux']}  PEFT {compiled['PEFT']}"
        print(f"graphs for {len(lists)} lists of names: {counts}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
