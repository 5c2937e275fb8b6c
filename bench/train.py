"""Training several adapters on one linear layer, ours and as others do it: python bench/train.py

A step is forward and backward, without an optimizer: the gradients of x and of every A and B, for a
frozen base. The rows of a batch stand in any order, each with one adapter. It is timed only if all
its gradients agree with the formula in fp64; else the record says what is wrong.

    base       the frozen layer alone: the floor
    lora_mux   one pass for all, under a route that is in force already
    as a model the same, and what its layers share: a route is opened for each step, and a changed
               value of each parameter, as by an optimizer, is brought into the pool
    PEFT       PEFT itself: one adapter after the other, each with a pass of its own rows
    alone      the same by hand
    loop       one pass through the base; then two products for each adapter's rows
    stack      adapters stacked in each step, padded to the largest rank; rows sorted, two grouped
               products, and the answers put back

In bf16 two more: PEFT keeps its adapters in fp32 there, and "PEFT 16" has them in bf16 as all
others do; "batched" is "stack" by batched products, as all adapters have equally many rows here.

Which rows are whose is known to all of them before the clock starts. On a GPU the host's clock
stops when all is done. `device` is how long the GPU itself takes for a step, whose launches wait
in its queue until the last one is there: no less can be had by a graph, or beside other work.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

import lora_mux
from lora_mux.measure.bench import device
from lora_mux.measure.provenance import ROOT, provenance
from lora_mux.measure.timing import Times, microseconds, syncs, wait
from work import moved_bytes, work

ALPHA = 16.0
CYCLES = 2000  # of a GPU in a microsecond, or less


class Cell(NamedTuple):
    """The sizes of a batch."""

    adapters: int
    rows: int  # of each adapter
    ranks: tuple[int, ...]  # as many adapters have each, in any order

    def __str__(self) -> str:
        return f"{self.adapters} x {self.rows}, r {' '.join(map(str, self.ranks))}"


def cells(on_cpu: bool) -> list[Cell]:
    sizes = (4, 512), (64, 32), (8, 16)
    if not on_cpu:
        sizes = (4, 2048), (64, 128), (8, 16)
    return [Cell(*size, ranks) for size in sizes for ranks in ((16,), (4, 8, 16, 64))]


class Problem:
    """A batch, its adapters, and the gradients that a step must give."""

    def __init__(self, cell: Cell, width: int, dtype: torch.dtype, place: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        count, M = cell.adapters, cell.adapters * cell.rows
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        self.ranks = [cell.ranks[i % len(cell.ranks)] for i in order]
        self.scalings = [ALPHA / r for r in self.ranks]
        self.counts = [cell.rows] * count
        owner = torch.arange(count).repeat_interleave(cell.rows)
        owner = owner[torch.randperm(M, generator=generator)]
        self.owner: list[int] = owner.tolist()
        self.rows = [(owner == i).nonzero().flatten().to(place) for i in range(count)]
        self.x, self.dy = draw(M, width).to(place, dtype), draw(M, width).to(place, dtype)
        self.W = (draw(width, width) / width**0.5).to(place, dtype)
        self.A = [(draw(r, width) / width**0.5).to(place, dtype) for r in self.ranks]
        self.B = [(draw(width, r) * 0.1).to(place, dtype) for r in self.ranks]
        self.expected = self._expected()
        # A value is rounded to the dtype at most four times on its way (a product, its scaling,
        # the next product, a sum), and a sum of n such terms in fp32 loses about sqrt(n) roundings.
        unit = {d: torch.finfo(d).eps / 2 for d in (dtype, torch.float32)}
        terms = width + max(cell.rows, *self.ranks)
        self.tolerance = 4 * unit[dtype] + terms**0.5 * unit[torch.float32]

    def _expected(self) -> list[Tensor]:
        x, dy, W = self.x.double(), self.dy.double(), self.W.double()
        dx, of_A, of_B = dy @ W, [], []
        for rows, A, B, s in zip(self.rows, self.A, self.B, self.scalings, strict=True):
            h, g = x[rows] @ A.double().T, dy[rows] @ B.double()
            dx[rows] += s * g @ A.double()
            of_A.append(s * g.T @ x[rows])
            of_B.append(s * dy[rows].T @ h)
        return [dx, *of_A, *of_B]

    def error(self, gradients: Sequence[Tensor]) -> float:
        """The largest relative norm of an error, of dx, and of A's and B's of each adapter."""
        pairs = zip(gradients, self.expected, strict=True)
        return max(float((got.double() - e).norm() / e.norm()) for got, e in pairs)

    def leaves(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x, and A and B of each adapter, as leaves of autograd."""
        x, *factors = (t.clone().requires_grad_() for t in (self.x, *self.A, *self.B))
        return x, factors[: len(self.A)], factors[len(self.A) :]


class Step(NamedTuple):
    """A forward and backward."""

    run: Callable[[], None]
    xs: Sequence[Tensor]  # x, or the rows of each adapter
    factors: Sequence[Tensor]  # each A, then each B; none = of the base alone
    rows: Sequence[Tensor] = ()  # where those of xs stand in the batch, if they are apart

    def __call__(self) -> None:
        for leaf in (*self.xs, *self.factors):
            leaf.grad = None
        self.run()

    def gradients(self) -> list[Tensor]:
        """dx, and those of each A and each B, after a call."""
        dx, *others = (
            torch.cat([_gradient(x) for x in self.xs]),
            *map(_gradient, self.factors),
        )
        if self.rows:
            dx = torch.empty_like(dx).index_copy_(0, torch.cat([*self.rows]), dx)
        return [dx, *others]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def base(p: Problem) -> Step:
    x, _, _ = p.leaves()
    return Step(lambda: linear(x, p.W).backward(p.dy), [x], [])


def ours(p: Problem, as_a_model: bool = False) -> Step:
    x, _, _ = p.leaves()
    layer = nn.Linear(p.W.shape[1], len(p.W), bias=False, device="meta").requires_grad_(False)
    layer.weight = nn.Parameter(p.W, requires_grad=False)
    model = nn.Sequential(layer)
    mux = lora_mux.attach(model, targets=["0"])
    for i, pair in enumerate(zip(p.A, p.B, strict=True)):
        mux.add_adapter(f"t{i}", {"0": pair}, alpha=ALPHA)
    trained = [mux.train(f"t{i}").parameters() for i in range(len(p.A))]
    A, B = zip(*trained, strict=True)
    names = [f"t{i}" for i in p.owner]

    def run() -> None:
        model(x).backward(p.dy)

    def whole() -> None:
        torch.autograd.graph.increment_version([*A, *B])
        with mux.route(names):
            run()

    if not as_a_model:
        mux.set_route(names)
    return Step(whole if as_a_model else run, [x], [*A, *B])


def with_peft(p: Problem, same_dtype: bool = False) -> Step:
    layer = nn.Linear(p.W.shape[1], len(p.W), bias=False, device="meta").requires_grad_(False)
    layer.weight = nn.Parameter(p.W, requires_grad=False)
    model = nn.Sequential(layer)
    names = [f"t{i}" for i in range(len(p.A))]
    for i, name in enumerate(names):
        config = peft.LoraConfig(r=p.ranks[i], lora_alpha=int(ALPHA), target_modules=["0"])
        if i == 0:
            wrapped = peft.get_peft_model(
                model, config, name, autocast_adapter_dtype=not same_dtype
            )
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=not same_dtype)
    lora = model[0]
    factors = [getattr(lora, side)[name].weight for side in ("lora_A", "lora_B") for name in names]
    for parameter, values in zip(factors, [*p.A, *p.B], strict=True):
        parameter.data = values.to(parameter.dtype, copy=True)
    xs, parts = _apart(p)

    def run() -> None:
        for name, x, dy in zip(names, xs, parts, strict=True):
            wrapped.set_adapter(name)
            wrapped(x).backward(dy)

    return Step(run, xs, factors, p.rows)


def alone(p: Problem) -> Step:
    (_, A, B), (xs, parts) = p.leaves(), _apart(p)

    def run() -> None:
        for x, dy, a, b, s in zip(xs, parts, A, B, p.scalings, strict=True):
            linear(x, p.W).addmm(linear(x, a).mul(s), b.T).backward(dy)

    return Step(run, xs, [*A, *B], p.rows)


def _apart(p: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """x, as leaves, and dy of each adapter: whoever trains it alone has them so."""
    return [p.x[rows].requires_grad_() for rows in p.rows], [p.dy[rows] for rows in p.rows]


def loop(p: Problem) -> Step:
    x, A, B = p.leaves()

    def run() -> None:
        y = linear(x, p.W)
        for rows, a, b, s in zip(p.rows, A, B, p.scalings, strict=True):
            h = linear(x.index_select(0, rows), a)
            y.index_add_(0, rows, linear(h.mul(s), b))
        y.backward(p.dy)

    return Step(run, [x], [*A, *B])


def stack(p: Problem, by_groups: bool = True) -> Step:
    x, A, B = p.leaves()
    top = -(-max(p.ranks) // 8) * 8  # grouped products ask for multiples of 16 bytes
    order = torch.cat(p.rows)
    back = order.argsort()
    ends = torch.tensor(p.counts, device=x.device).cumsum(0).to(torch.int32)
    of_row = torch.tensor(p.scalings).repeat_interleave(torch.tensor(p.counts))
    scaling = of_row[:, None].to(x)

    def grouped(rows: Tensor, factors: Tensor) -> Tensor:
        if by_groups and rows.dtype == torch.bfloat16 and rows.is_cuda:
            return torch._grouped_mm(rows, factors, offs=ends)
        return torch.bmm(rows.view(len(A), -1, rows.shape[1]), factors).flatten(0, 1)

    def run() -> None:
        As = torch.stack([pad(a, (0, 0, 0, top - len(a))) for a in A])  # [T, top, K]
        Bs = torch.stack([pad(b, (0, top - b.shape[1])) for b in B])  # [T, N, top]
        h = grouped(x.index_select(0, order), As.mT) * scaling
        y = linear(x, p.W) + grouped(h, Bs.mT).index_select(0, back)
        y.backward(p.dy)

    return Step(run, [x], [*A, *B])


OURS = ("lora_mux", "as a model")
PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "base": base,
    "lora_mux": ours,
    "as a model": lambda p: ours(p, as_a_model=True),
    "PEFT": with_peft,
    "alone": alone,
    "loop": loop,
    "stack": stack,
}
IN_BF16 = {
    "PEFT 16": lambda p: with_peft(p, same_dtype=True),
    "batched": lambda p: stack(p, by_groups=False),
}


def checked(p: Problem, provider: Callable[[Problem], Step]) -> tuple[Step | None, dict]:
    """A step, unless it is wrong or impossible, and what its record says of that."""
    try:
        step = provider(p)
        step()
        if not step.factors:
            return step, {}
        error = p.error(step.gradients())
    except Exception as failure:  # the others' figures are not lost to one of them
        return None, {"reason": f"{type(failure).__name__}: {failure}"}
    right = error <= p.tolerance  # NaN is wrong, too
    return (step if right else None), {"error": error}


def measure(p: Problem, place: torch.device, runs: int, seconds: float) -> dict[str, dict]:
    """Provider -> error, times and counts; without times where it is wrong, or why it failed."""
    found: dict[str, dict] = {}
    steps: dict[str, Step] = {}
    every = PROVIDERS | (IN_BF16 if p.x.dtype == torch.bfloat16 else {})
    for name, provider in every.items():
        step, found[name] = checked(p, provider)
        if step is None:
            continue
        steps[name] = step
        if place.type == "cpu":
            counted = work(step)._asdict()
            found[name] |= {**counted, "moved_bytes": moved_bytes(step)}
    calls = {name: lambda n, step=step: (step(), wait(place)) for name, step in steps.items()}
    # By the host's clock on a GPU as well: in eager mode it often decides.
    times = microseconds(calls, 1, torch.device("cpu"), runs, seconds=seconds)
    for name, took in times.items():
        found[name]["microseconds"] = took
        if place.type == "cuda":
            found[name]["device"] = on_device(steps[name], took["p50"], min(runs, 5))
    return found


def on_device(step: Step, host: float, runs: int) -> dict[str, float]:
    """Microseconds of the GPU alone: it sleeps until the host has launched the whole step.

    Args:
        host: microseconds that the host takes for a step.
    """
    waits = syncs(step)  # then there is no queue, and the host's share is in it
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    took = []
    for _ in range(runs):
        torch.cuda._sleep(int(CYCLES * (2 * host + 1000)))
        start.record()
        step()
        end.record()
        end.synchronize()
        took.append(1e3 * start.elapsed_time(end))
    return {"min": min(took), "p50": statistics.median(took), "runs": runs, "syncs": waits}


def ahead(found: dict[str, dict], statistic: str) -> tuple[float, str]:
    """How many times as long the fastest other takes, and which it is; NaN if ours failed."""
    times: dict[str, Times] = {
        name: of["microseconds"] for name, of in found.items() if "microseconds" in of
    }
    others = [name for name in times if name not in ("base", *OURS)]
    if "lora_mux" not in times or not others:
        return float("nan"), "none"
    best = min(others, key=lambda name: times[name][statistic])
    return times[best][statistic] / times["lora_mux"][statistic], best


def show(found: dict[str, dict]) -> None:
    floor = found["base"]["microseconds"]["min"]
    for name, of in found.items():
        if "microseconds" not in of:
            wrong = f"WRONG by {of['error']:.1e}" if "error" in of else of["reason"]
            print(f"  {name:10} {wrong}", flush=True)
            continue
        times = of["microseconds"]
        line = f"  {name:10} min {times['min'] / 1e3:8.2f}  p50 {times['p50'] / 1e3:8.2f} ms"
        line += f"  {times['min'] / floor:5.2f} of the base"
        if "device" in of:
            line += f"  device {of['device']['p50'] / 1e3:8.3f} ms"
            line += " (syncs)" if of["device"]["syncs"] else ""
        if "flops" in of:
            line += f"  {of['flops'] / 1e9:6.2f} GFLOP  {of['moved_bytes'] / 1e6:7.1f} MB moved"
            line += f"  {of['allocated_bytes'] / 1e6:7.1f} MB made"
        print(line + (f"  error {of['error']:.1e}" if "error" in of else ""), flush=True)
    for statistic in ("min", "p50"):
        ratio, best = ahead(found, statistic)
        verdict = "ahead" if ratio >= 1 else "BEHIND"
        print(f"  {verdict}: the fastest other ({best}) takes {ratio:.2f} of ours by {statistic}")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", type=device, default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--width", type=int, default=1024, help="K = N of the layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", nargs="+", type=int, help="only these, by number from 0")
    parser.add_argument("--rows", type=int, help="of each adapter, instead of the cells' own")
    parser.add_argument("--runs", type=int, default=100, help="of each provider, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each cell")
    parser.add_argument("--note", help="what else the record should say, as of other work here")
    parser.add_argument("--out", type=Path, help="default: bench/results/train-DEVICE.jsonl")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    every, failed = cells(args.device.type == "cpu"), False
    out = args.out or ROOT / "bench" / "results" / f"train-{args.device.type}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for number in args.cells or range(len(every)):
            cell = every[number]._replace(rows=args.rows or every[number].rows)
            problem = Problem(cell, args.width, getattr(torch, args.dtype), args.device)
            print(f"{cell}, {args.width} wide, {args.dtype}", flush=True)
            found = measure(problem, args.device, args.runs, args.seconds)
            case = {**cell._asdict(), "width": args.width, "dtype": args.dtype}
            gate = {"tolerance": problem.tolerance, "note": args.note}
            record = {**provenance(args.device), "cell": case, **gate, "providers": found}
            print(json.dumps(record), file=file, flush=True)
            show(found)
            failed |= any("microseconds" not in found[name] for name in ("base", *OURS))
    print(f"wrote {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
