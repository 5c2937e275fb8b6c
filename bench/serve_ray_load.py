"""Load on examples/serve_ray, against one adapter per batch: python bench/serve_ray_load.py

The same replica answers the same requests in two ways, which take turns. Once the adapters are in
the payload, so that a batch has any of them. Then the adapter is also Ray's multiplexed_model_id,
by which Ray Serve splits a batch. Both are measured on the example's replica, which gathers a batch
until the model is free, and on one that leaves this to Ray, as Ray's documentation shows it.

Clients are closed loops: each sends its next request when it has an answer. A run counts only if
each of its answers is PEFT's for that request alone.

Writes bench/results/serve-ray-cpu.jsonl, one line for each run. `--draw` only draws what is there,
as docs/images/serve-ray-cpu.png, and prints the table of docs/serve_ray.md.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import plot
from lora_mux.measure.provenance import ROOT, provenance

RECORD, PICTURE = "bench/results/serve-ray-cpu.jsonl", "docs/images/serve-ray-cpu.png"
PAYLOAD, BY_MODEL = "adapters in the payload", "one adapter per batch"
COLOURS = {PAYLOAD: "#d1495b", BY_MODEL: "#777777"}
GATHERING = "by the replica", "by Ray"
ADAPTERS = 8, 32
SETTINGS = [(n, gathering, way) for n in ADAPTERS for gathering in GATHERING for way in COLOURS]
CLIENTS, REQUESTS, DISTINCT, TOKENS, REPETITIONS = 16, 160, 32, 8, 3
RANKS = (4, 8, 16)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
Setting = tuple[int, str, str]
Record = dict[str, Any]


def make(folder: Path) -> dict[int, list[str]]:
    """A model and its adapters, drawn at random; what PEFT answers if so many are in use."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from serve_openai import demo

    torch.manual_seed(0)
    demo.make(folder, steps=0)  # for its tokenizer
    config = AutoConfig.from_pretrained(folder / "base", **SIZES, num_attention_heads=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    for i in range(max(ADAPTERS)):
        rank = RANKS[i % len(RANKS)]
        lora = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=demo.TARGETS, init_lora_weights=False
        )
        if i == 0:
            model = peft.get_peft_model(model, lora, "a0")
        else:
            model.add_adapter(f"a{i}", lora)
    model.save_pretrained(folder)  # folder/NAME
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def answer(request: dict[str, Any]) -> str:
        model.set_adapter(request["adapters"])
        ids = tokenizer(request["text"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    answers = {count: [answer(request) for request in requests(count)] for count in ADAPTERS}
    assert all(len({*texts}) > DISTINCT // 2 for texts in answers.values())  # they tell whose
    return answers


def requests(adapters: int) -> list[dict[str, Any]]:
    """Those that differ."""
    return [
        {"text": f"question {i}", "adapters": f"a{i % adapters}", "tokens": TOKENS}
        for i in range(DISTINCT)
    ]


def load(handle: Any, adapters: int, way: str, answers: list[str]) -> Record:
    """One run."""
    asked, before = requests(adapters), handle.stats.remote().result()
    left = iter(random.Random(0).sample([*range(DISTINCT)] * (REQUESTS // DISTINCT), REQUESTS))
    lock, took, wrong = threading.Lock(), list[float](), list[int]()

    def client() -> None:
        while True:
            with lock:
                i = next(left, None)
            if i is None:
                return
            chosen = handle
            if way == BY_MODEL:
                chosen = handle.options(multiplexed_model_id=asked[i]["adapters"])
            start = time.perf_counter()
            answer = chosen.remote(asked[i]).result(timeout_s=60)
            took.append(time.perf_counter() - start)
            if answer != answers[i]:
                wrong.append(i)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - start
    assert len(took) == REQUESTS and not wrong, (
        f"{len(wrong)} of {len(took)} answers are not PEFT's"
    )
    after = handle.stats.remote().result()
    batches = after["batches"] - before["batches"]
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    return {
        "requests_per_second": REQUESTS / seconds,
        "p50": 1e3 * cuts[49],  # milliseconds
        "p99": 1e3 * cuts[98],
        "mean_batch": (after["requests"] - before["requests"]) / batches,
    }


def measure() -> Iterator[Record]:
    """All runs."""
    sys.path.append(str(ROOT / "examples"))
    from serve_ray.loopback import start  # before ray

    # isort: split
    import ray
    from ray import serve
    from serve_ray.replicas import Mixed

    class ByRay(Mixed.func_or_class):  # type: ignore[misc]
        """Requests do not wait until the model is free, and Ray makes batches of them meanwhile."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._idle.clear = lambda: None

    known = {
        **provenance(torch.device("cpu")),
        **{package: version(package) for package in ("ray", "transformers")},
        "model": {**SIZES, "ranks": RANKS},
        "load": {"clients": CLIENTS, "requests": REQUESTS, "tokens": TOKENS},
    }
    with tempfile.TemporaryDirectory(prefix="load") as name:
        folder = Path(name)
        answers = make(folder)
        start(len(GATHERING), log_to_driver=False, object_store_memory=100_000_000)
        try:
            handles = {}
            for gathering, kind in zip(GATHERING, (Mixed, Mixed.options(ByRay)), strict=True):
                served = kind.bind(str(folder / "base"), str(folder))
                handles[gathering] = serve.run(served, name=gathering, route_prefix=None)
            for repetition in range(-1, REPETITIONS):  # the first one pulls the adapters
                order = random.Random(repetition).sample(SETTINGS, len(SETTINGS))
                for adapters, gathering, way in order:
                    run = load(handles[gathering], adapters, way, answers[adapters])
                    run |= {"adapters": adapters, "gathering": gathering, "way": way}
                    if repetition >= 0:
                        yield {**known, **run, "repetition": repetition, "gate": "passed"}
        finally:
            ray.shutdown()


def runs_of(records: list[Record], setting: Setting) -> list[Record]:
    """The repetitions of a setting."""
    return [r for r in records if (r["adapters"], r["gathering"], r["way"]) == setting]


def medians(records: list[Record]) -> dict[Setting, Record]:
    """Of the repetitions of each setting."""
    names = "requests_per_second", "p50", "p99", "mean_batch"
    return {
        setting: {n: statistics.median(r[n] for r in runs_of(records, setting)) for n in names}
        for setting in SETTINGS
    }


def table(records: list[Record]) -> str:
    """Markdown, for docs/serve_ray.md."""
    lines = [
        "| adapters | gathered | way | requests/s | p50, ms | p99, ms | mean batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for (adapters, gathering, way), m in medians(records).items():
        times = f"{m['p50']:.0f} | {m['p99']:.0f}"
        figures = f"{m['requests_per_second']:.1f} | {times} | {m['mean_batch']:.1f}"
        lines.append(f"| {adapters} | {gathering} | {way} | {figures} |")
    return "\n".join(lines)


def sentence(records: list[Record]) -> str:
    """The example against what Ray does with its model ids, for docs/serve_ray.md."""
    found, parts = medians(records), []
    for adapters in ADAPTERS:
        ours = found[adapters, GATHERING[0], PAYLOAD]
        same, ray = (found[adapters, gathering, BY_MODEL] for gathering in GATHERING)
        times = [ours["requests_per_second"] / m["requests_per_second"] for m in (ray, same)]
        parts.append(
            f"with {adapters} adapters, {times[0]:.1f} times the throughput of one adapter per "
            f"batch as Ray gathers it, with a p99 of {ours['p99']:.0f} ms in place of "
            f"{ray['p99']:.0f}, and {times[1]:.1f} times that of one adapter per batch as the "
            f"replica gathers it ({same['p99']:.0f} ms)"
        )
    return "; ".join(parts)


def draw(records: list[Record], out: Path) -> None:
    """Throughput and p99, each run a point, medians as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    found = medians(records)
    places = [(n, gathering) for n in ADAPTERS for gathering in GATHERING]
    for axis, name in zip(axes, ("requests_per_second", "p99"), strict=True):
        for offset, (way, colour) in zip((-0.19, 0.19), COLOURS.items(), strict=True):
            for i, place in enumerate(places):
                runs = [r[name] for r in runs_of(records, (*place, way))]
                label = way if i == 0 else None
                axis.bar(i + offset, found[(*place, way)][name], 0.36, color=colour, label=label)
                axis.plot([i + offset] * len(runs), runs, ".", color="black", markersize=4)
        axis.set_xticks(range(len(places)), [f"{n} adapters\n{g}" for n, g in places], fontsize=8)
    axes[0].set_title("requests per second", fontsize=9)
    axes[1].set_title("p99 of the answers, ms", fontsize=9)
    axes[0].margins(y=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(plot.origin(records[0], "ray", "torch"), fontsize=8)
    plot.save(figure, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw the record that is there")
    parser.add_argument("--out", type=Path, default=ROOT / RECORD, help="the record")
    given = parser.parse_args()
    if not given.draw:
        text = "".join(json.dumps(r) + "\n" for r in measure())
        given.out.write_text(text, encoding="utf-8")
    records = plot.read(given.out)
    print(table(records), sentence(records), sep="\n\n")
    if given.draw:
        draw(records, ROOT / PICTURE)


if __name__ == "__main__":
    main()
