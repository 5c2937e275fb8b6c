"""Simulations, never measurements: how many replicas a fleet needs, and what goes to which.

    python bench/fleet.py                           # all of docs/scale.md: minutes on 2 cores
    python bench/fleet.py --replicas 40 --rate 300  # one fleet, with your figures: see --help
    python bench/fleet.py --draw                    # tables and picture of the record alone

A day of requests is shortened until --requests fit, at their real rate. Costs are those of records
(bench/simulated/costs.py), and flags override them. Writes bench/results/fleet.jsonl, one line for
each fleet, and docs/images/fleet.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lora_mux.measure.provenance import ROOT, provenance
from simulated import costs as cost
from simulated.fleet import Fleet, play
from simulated.routing import ROUTINGS
from simulated.tables import draw, scale_table, tables
from simulated.traffic import Traffic, requests

RECORD, PICTURE = "bench/results/fleet.jsonl", "docs/images/fleet.png"
WARM = 0.2  # of the requests, before anything is counted
SIZES = 1, 10, 100, 1000
LOADS = 100, 10  # milliseconds of a load, besides what the record says
MIXES = 1, 2, 4
RATES = {"a replica": 2.0, "all": 200.0, "mixes": 16.0}  # requests a second
DEATHS, WINDOW = 8, 60.0
MOST = 1000  # replicas, where a search gives up
Record = dict[str, Any]


class Job(NamedTuple):
    """One fleet to play, or to find the size of."""

    part: str
    case: Record  # what the tables show of it
    fleet: Fleet
    traffic: Traffic
    n: int
    rate: float
    target: float  # seconds until the first token
    seed: int


def once(job: Job) -> Record:
    """Play a job's fleet."""
    rng = np.random.default_rng(job.seed)
    came = requests(job.traffic, job.n, job.rate, rng)
    day = play(job.fleet, came, job.seed, job.traffic).since(WARM)
    found: Record = {"hits": day.hits, "p50": day.wait(50), "p99": day.wait(99), "lost": day.lost}
    found |= {name: int(counts.sum()) for name, counts in day.events.items()}
    found |= {"requests": len(day.at), "named": int(day.named.sum())}
    if day.deaths:
        found["interrupted"] = int((day.attempts > 1).sum())
        gap = day.at[:, None] - np.array(day.deaths)
        for name, start in (("before", -WINDOW), ("dead", 0.0), ("back", job.fleet.back)):
            within = ((gap >= start) & (gap < start + WINDOW)).any(1)
            found[name] = {
                "hits": 1 - day.events["loads"][within].sum() / day.named[within].sum(),
                "p99": float(np.nanpercentile(day.first[within], 99)),
            }
    return found


def needed(job: Job) -> Record:
    """The fewest replicas, within 4 %, with which 99 % have their first token in time."""
    few, many = 0, max(1, round(job.rate / 10))
    while (found := _with(job, many))["p99"] > job.target:
        few, many = many, 2 * many
        if many > MOST:
            return {"replicas": None}
    while many - few > max(1, 0.04 * many):
        tried = _with(job, middle := (few + many) // 2)
        if tried["p99"] > job.target:
            few = middle
        else:
            many, found = middle, tried
    return {"replicas": many, **found}


def _with(job: Job, replicas: int) -> Record:
    return once(job._replace(fleet=replace(job.fleet, replicas=replicas)))


def run(job: Job) -> Record:
    """What the tables and the picture need of a job, or `needed` of it."""
    found = needed(job) if job.part == "needed" else once(job)
    return {"simulation": job.part, "case": job.case, **found}


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Those of docs/scale.md, or those of the fleet that was asked for."""
    traffic, n = traffic_of(args), args.requests
    fleet = Fleet(costs_of(args), 32, "", args.rows, args.device, levels_of(args))
    day = Job("scale", {}, fleet, traffic, n, RATES["a replica"] * 32, args.target, args.seed)
    for size in (args.replicas,) if args.replicas else SIZES:
        at = day._replace(rate=args.rate or RATES["a replica"] * size)
        for name in ROUTINGS:
            one = replace(fleet, replicas=size, routing=name)
            yield at._replace(case={"replicas": size, "routing": name}, fleet=one)
    if args.replicas:
        return
    peak = day._replace(part="needed", traffic=traffic._replace(swing=0.0), n=n // 4)
    costs = fleet.costs
    for load, evict in ((costs.load, costs.evict), *((ms / 1e3, 0.0) for ms in LOADS)):
        for name in ROUTINGS:
            case = {"load": load + evict, "routing": name}
            one = replace(fleet, routing=name, costs=replace(costs, load=load, evict=evict))
            yield peak._replace(case=case, fleet=one, rate=RATES["all"])
    for k in MIXES:
        for name, key in (*((routing, "set") for routing in ROUTINGS), ("hash, all", "rarest")):
            case = {"mix": k, "routing": name, "key": key}
            one, mixed = replace(fleet, routing=name, key=key), traffic._replace(mix={k: 1.0})
            some = day._replace(part="mixes", n=n // 2, rate=RATES["mixes"])
            yield some._replace(case=case, fleet=one, traffic=mixed)
    for name in ROUTINGS:
        one = replace(fleet, routing=name, deaths=DEATHS, back=WINDOW)
        yield peak._replace(part="deaths", case={"routing": name}, fleet=one, n=n, rate=day.rate)


def costs_of(args: argparse.Namespace) -> cost.Costs:
    """From the records, and from flags where they are given."""
    most = args.rows * max(*MIXES, *traffic_of(args).mix)
    found = cost.from_records(args.rank, most, args.rest_ms / 1e3)
    if args.step_ms is not None:
        found = replace(found, base=[args.step_ms / 1e3] * (args.rows + 1))
    if args.adapter_us is not None:
        found = replace(found, adapters=[n * args.adapter_us / 1e6 for n in range(most + 1)])
    if args.prompt_us is not None:
        found = replace(found, token=args.prompt_us / 1e6)
    if args.load_ms is not None:
        found = replace(found, load=args.load_ms / 1e3, evict=0.0)
    return found


def levels_of(args: argparse.Namespace) -> tuple[cost.Level, ...]:
    """The host's memory, the disk, the store."""
    bytes_ = cost.adapter_bytes(args.rank)
    return (
        cost.Level("host", args.host, 0.0, 0.0),  # the record's load starts in the page cache
        cost.Level("disk", args.disk, 1e-4, bytes_ / args.disk_gbps / 1e9),
        cost.Level("store", inf, args.store_ms / 1e3, bytes_ / args.store_gbps / 1e9),
    )


def traffic_of(args: argparse.Namespace) -> Traffic:
    """What users do."""
    mix = {int(k): float(share) for k, _, share in (m.partition(":") for m in args.mix)}
    return Traffic(args.adapters, args.zipf, mix, args.prompt, args.answer, args.swing)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults without a record are assumptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--replicas", type=int, help="play one fleet of this size, and write nothing")
    add("--rate", type=float, help="its requests a second, the mean of the day")
    add("--draw", action="store_true", help="only print and draw the record that is there")
    add("--requests", type=int, default=100_000, help="to play for each fleet")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="processes")
    add("--out", type=Path, default=ROOT / RECORD)
    add("--picture", type=Path, default=ROOT / PICTURE)
    group = parser.add_argument_group("measured, unless you give yours")
    group.add_argument("--step-ms", type=float, help="a decode step without adapters, all of it")
    group.add_argument("--adapter-us", type=float, help="more for each distinct adapter in a batch")
    group.add_argument("--prompt-us", type=float, help="for each token of a prompt")
    group.add_argument("--load-ms", type=float, help="an adapter from the host into a full pool")
    assume = parser.add_argument_group("assumed").add_argument
    assume("--rest-ms", type=float, default=2.0, help="of a step besides its linear layers")
    assume("--rank", type=int, default=16, help="of all adapters, on all linear layers of 8B")
    assume("--rows", type=int, default=32, help="of a batch; records end at 32")
    assume("--device", type=int, default=48, help="adapters in a pool: 4 GB of rank 16")
    assume("--host", type=int, default=768, help="in a replica's host memory: 64 GB of rank 16")
    assume("--disk", type=int, default=4000, help="on its disk: 336 GB of rank 16")
    assume("--disk-gbps", type=float, default=2.0, help="gigabytes a second from the disk")
    assume("--store-gbps", type=float, default=1.0, help="from the object store, to each replica")
    assume("--store-ms", type=float, default=100.0, help="until the store's first byte")
    assume("--adapters", type=int, default=1_000_000, help="in all")
    assume("--zipf", type=float, default=1.0, help="the exponent of their popularity")
    assume("--mix", nargs="+", default=["1"], help="adapters of a request, and shares: 1:0.7 3:0.3")
    assume("--prompt", type=float, default=512.0, help="tokens, the mean")
    assume("--answer", type=float, default=128.0, help="tokens, the mean")
    assume("--swing", type=float, default=0.5, help="of the day's rate around its mean")
    assume("--target", type=float, default=1.0, help="seconds until 99 %% have their first token")
    args = parser.parse_args(argv)
    args.mix = [m if ":" in m else f"{m}:1" for m in args.mix]
    if (args.replicas is None) != (args.rate is None):
        parser.error("--replicas and --rate go together")
    if args.rows > cost.ROWS:
        parser.error(f"--rows: {cost.GPU} ends at {cost.ROWS}, got {args.rows}")
    if args.device < (most := max(int(m.partition(":")[0]) for m in args.mix)):
        parser.error(f"--device: a pool of {args.device} holds no request of {most} adapters")
    if not args.device <= args.host <= args.disk:
        parser.error(
            "--device, --host, --disk: each level must hold as many adapters as the one above, got "
            f"{args.device}, {args.host}, {args.disk}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parse(argv)
    if not args.draw:
        found: list[Record] = []
        work = [*jobs(args)]
        with ProcessPoolExecutor(args.jobs) as pool:
            for one in pool.map(run, work):
                print(f"{len(found) + 1} of {len(work)}", file=sys.stderr)
                found.append(one)
        if args.replicas:
            print(scale_table(found))
            return 0
        known = provenance(torch.device("cpu"))
        setting = {"traffic": traffic_of(args)._asdict(), "fleet": asdict(work[0].fleet)}
        lines = [known | {"simulation": "setting", **setting}, *(known | one for one in found)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        args.out.write_text(text.replace("Infinity", "null"), encoding="utf-8")
    records = [json.loads(line) for line in args.out.read_text("utf-8").splitlines()]
    draw(records, args.picture)
    print("\n\n".join(tables(records)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
