"""Room for arrivals, on pools drawn as strings, against everything that could be done.

Each character is a rank row. "." is free, and a letter is the adapter whose row it is: a small one
may be evicted, a capital one may not. Arriving adapters are called 0, 1, 2.
"""

import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import pytest
import torch

from lora_mux.adapters.placement import Placement, find_room
from lora_mux.core import FreeRuns, LoraWeights, Pool, Span
from lora_mux.errors import PoolCapacityError

WIDTH = 2  # in_features and out_features


@dataclass(frozen=True)
class Case:
    strips: Sequence[str]  # a pool each
    arriving: Sequence[Sequence[int]]  # each with its rank rows in every pool
    oldest_first: str = ""  # who may be evicted, and move
    movable: str = ""  # who may only move

    @property
    def order(self) -> str:
        ranks = {str(i): rows for i, rows in enumerate(self.arriving)}
        return "".join(sorted(ranks, key=lambda name: -max(ranks[name])))

    def needed(self, order: Iterable[str], pool: int) -> dict[str, int]:
        rows = {name: self.arriving[int(name)][pool] for name in order}
        return {name: r for name, r in rows.items() if r}

    def plan(self, pools: Sequence[Pool] | None = None) -> Placement:
        pools = pools or [planned(strip) for strip in self.strips]
        names = "".join(map(str, range(len(self.arriving))))
        return find_room(
            {str(i): pool for i, pool in enumerate(pools)},
            {
                ord(name): {
                    str(i): strip.count(name) or self.needed(name, i)[name]
                    for i, strip in enumerate(self.strips)
                    if name in strip or (name in names and self.needed(name, i))
                }
                for name in {*"".join(self.strips), *names} - {"."}
            },
            map(ord, names),
            list(map(ord, self.oldest_first + self.movable)),
            list(map(ord, self.oldest_first)),
        )


def runs(strip: str) -> Iterator[tuple[str, int, int]]:
    """The name, the first row and the number of rows of each run."""
    for name, rows in itertools.groupby(enumerate(strip), key=lambda row: row[1]):
        places = [place for place, _ in rows]
        yield name, places[0], len(places)


def planned(strip: str) -> Pool:
    """A pool whose host side is as drawn."""
    pool = Pool(WIDTH, WIDTH, torch.float32, torch.device("cpu"))
    taken = [(name, start, rows) for name, start, rows in runs(strip) if name != "."]
    pool.spans = {ord(name): Span(start, rows, False, 1.0) for name, start, rows in taken}
    pool.runs = FreeRuns.rebuilt(len(strip), [run[1:] for run in taken])
    return pool


def weights(handle: int, rows: int) -> LoraWeights:
    A, B = torch.full((rows, WIDTH), float(handle)), torch.full((WIDTH, rows), float(handle))
    return LoraWeights(A, B, 1.0)


def filled(strip: str) -> Pool:
    """A pool that holds what is drawn: each row has its adapter's number as its values."""
    pool = Pool(WIDTH, WIDTH, torch.float32, torch.device("cpu"))
    pool.fix(len(strip))
    slots = [ord(name) if name != "." else i for i, (name, *_) in enumerate(runs(strip))]
    for slot, (_, _, rows) in zip(slots, runs(strip), strict=True):
        pool.write(slot, weights(slot, rows), 128)
    for slot, (name, _, _) in zip(slots, runs(strip), strict=True):
        if name == ".":
            pool.erase([slot])
    return pool


def drawn(pool: Pool) -> str:
    """What the values in a pool are, wherever the host believes them to be."""
    rows = torch.cat((pool.A_rows[:, :WIDTH], pool.B_rows[:, :WIDTH]), 1)
    assert (rows == rows[:, :1]).all()
    for slot, span in pool.spans.items():
        assert (int(pool.offset[slot]), int(pool.rank[slot])) == span[:2]
    return "".join(chr(int(row)) if row else "." for row in rows[:, 0].tolist())


def without(strip: str, names: Iterable[str]) -> str:
    return strip.translate({ord(name): "." for name in names})


def placed(strip: str, name: str, rows: int) -> str | None:
    """With an adapter in the first free run that holds it."""
    at = strip.find("." * rows)
    return None if at < 0 else strip[:at] + name * rows + strip[at + rows :]


def slid(strip: str, name: str) -> str:
    assert name in strip
    moved = placed(without(strip, name), name, strip.count(name))
    assert moved is not None and moved.find(name) <= strip.find(name)
    return moved


def done(
    case: Case, pool: int, evicted: Iterable[str], sliding: Iterable[str], order: str
) -> str | None:
    """What becomes of a pool; None if an arrival does not fit."""
    strip: str | None = without(case.strips[pool], evicted)
    for name in sliding:
        strip = slid(strip or "", name)
    for name, rows in case.needed(order, pool).items():
        strip = strip and placed(strip, name, rows)
    return strip


def carried_out(case: Case, plan: Placement) -> list[str | None]:
    evicted, order = ("".join(map(chr, handles)) for handles in (plan.evicted, plan.arriving))
    sliding = [map(chr, plan.sliding.get(str(i), ())) for i in range(len(case.strips))]
    return [done(case, i, evicted, slots, order) for i, slots in enumerate(sliding)]


def has_room(case: Case) -> bool:
    """Whether any of the adapters could go, and all others in each pool move or none, for room."""

    def fits(pool: int, evicted: Sequence[str]) -> bool:
        strip = without(case.strips[pool], evicted)
        moving = [name for name in dict.fromkeys(strip) if name in case.oldest_first + case.movable]
        return any(done(case, pool, evicted, slides, case.order) for slides in ((), moving))

    sets = (itertools.combinations(case.oldest_first, n) for n in range(7))
    return any(
        all(fits(pool, evicted) for pool in range(len(case.strips)))
        for evicted in itertools.chain.from_iterable(sets)
    )


def any_case(seed: int) -> Case:
    draw = random.Random(seed)
    may_go, may_move = draw.choice([0, 0.3, 0.7, 1]), draw.choice([0, 0.5, 1])
    names = [n if draw.random() < may_go else n.upper() for n in "abcdef"[: draw.randint(0, 6)]]
    movable = "".join(n for n in names if n.isupper() and draw.random() < may_move)
    strips = []
    for _ in range(draw.randint(1, 3)):
        present = draw.sample(names, len(names))
        # One row of what is in the way: longer ones only make for longer strips.
        most = {name: 5 if name in movable or name.islower() else 2 for name in present}
        taken = [name * draw.randint(0, most[name]) for name in present]
        strips.append("".join("." * draw.choice([0, 0, 1, 2, 3]) + run for run in taken) + ".")
    longest = min(map(len, strips))
    arriving = [
        [draw.randint(1, min(5, longest)), *(draw.randint(0, min(5, longest)) for _ in strips[1:])]
        for _ in range(draw.choice([1, 1, 2, 3]))
    ]
    oldest_first = "".join(filter(str.islower, draw.sample(names, len(names))))
    return Case(strips, arriving, oldest_first, movable)


@dataclass(frozen=True)
class Picture:
    case: Case
    after: Sequence[str]


PICTURES = {
    "there is room": Picture(Case(["aa..b"], [[2]], "ab"), ["aa00b"]),
    "the oldest goes": Picture(Case(["aabbcc"], [[2]], "bac"), ["aa00cc"]),
    "with the free rows beside it": Picture(Case(["aab..cc"], [[3]], "abc"), ["aa000cc"]),
    # Of the two stretches of 4, the one without d, which was used last.
    "a stretch of the oldest": Picture(Case(["aacc.X.bbdd"], [[4]], "abcd"), ["0000.X.bbdd"]),
    "no more than is needed": Picture(Case(["aabbccdd"], [[4]], "adbc"), ["0000ccdd"]),
    "evicting comes before moving": Picture(
        Case(["aaabbbcccddd"], [[6]], "acbd"), ["000000cccddd"]
    ),
    "what is in use stays": Picture(Case(["aaXbbbb"], [[3]], "ab"), ["aaX000."]),
    "what is pinned moves where it is in the way": Picture(
        Case(["aaPbb"], [[4]], "ab", movable="P"), ["P0000"]
    ),
    "but not for less than an eviction": Picture(
        Case(["aaP..bbbb"], [[4]], "ab", movable="P"), ["aaP0000.."]
    ),
    "as few move as can be": Picture(Case([".P.Q.R...S."], [[4]], movable="PQRS"), ["RP.Q0000.S."]),
    "one moves rather than two, for whom no one would go": Picture(
        Case(["aaPbbX..Q.R."], [[4]], "ab", movable="PQR"), ["P0000X..Q.R."]
    ),
    "the pinned move elsewhere": Picture(Case(["..XPP."], [[3]], movable="P"), ["PPX000"]),
    "several": Picture(Case(["aabbcc"], [[2], [2]], "cab"), ["00bb11"]),
    "the largest first": Picture(Case(["aaXbbbcc"], [[2], [3]], "bac"), ["00X111cc"]),
    # In the first pool, d would slide out of P's way; then the second pool lets d go.
    "planned anew after a later eviction": Picture(
        Case(["...XdYPP..", "dddd"], [[4, 4]], "d", movable="P"), ["PP.X.Y0000", "0000"]
    ),
    # a goes for the first pool, but b goes for the second and is enough for both.
    "no one goes in vain": Picture(Case(["aabb", "bbXX"], [[2, 2]], "ab"), ["aa00", "00XX"]),
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_pictures(picture: Picture) -> None:
    assert carried_out(picture.case, picture.case.plan()) == list(picture.after)


@pytest.mark.parametrize(
    "case",
    [
        Case(["XXaa"], [[3]], "a"),
        Case(["aaXbb"], [[3]], "ab"),
        Case(["aaaa", "XaaX"], [[2, 3]], "a"),
        Case(["PP.."], [[3]], movable="P"),
        Case([""], [[1]]),
    ],
)
def test_no_room(case: Case) -> None:
    with pytest.raises(PoolCapacityError, match="must hold [13] more rank rows"):
        case.plan()


def check_against_everything(seeds: Iterable[int]) -> None:
    counts = {True: 0, False: 0}
    for seed in seeds:
        case = any_case(seed)
        try:
            plan = case.plan()
        except PoolCapacityError:
            assert not has_room(case), (seed, case)
            counts[False] += 1
        else:
            assert None not in carried_out(case, plan), (seed, case, plan)
            counts[True] += 1
    assert min(counts.values()) > 0.05 * sum(counts.values())


def test_against_everything_that_could_be_done() -> None:
    check_against_everything(range(5000))


@pytest.mark.slow
def test_against_everything_that_could_be_done_at_length() -> None:
    check_against_everything(range(5000, 55_000))


def test_plans_on_real_pools() -> None:
    """The values that are in the pools afterwards, and that planning changes nothing."""
    for seed in range(500):
        case = any_case(seed)
        pools = [filled(strip) for strip in case.strips]
        try:
            plan = case.plan(pools)
        except PoolCapacityError:
            plan = None
        assert [drawn(pool) for pool in pools] == list(case.strips)
        assert [dict(pool.spans) for pool in pools] == [planned(s).spans for s in case.strips]
        assert [list(p.runs) for p in pools] == [list(planned(s).runs) for s in case.strips]
        if plan is None:
            continue
        for i, pool in enumerate(pools):
            for handle in plan.evicted:
                pool.erase([handle])
            for slot in plan.sliding.get(str(i), ()):
                pool.slide(slot)
            for name, rows in case.needed(map(chr, plan.arriving), i).items():
                pool.write(ord(name), weights(ord(name), rows), 128)
        assert [drawn(pool) for pool in pools] == carried_out(case, plan), (seed, case, plan)


def check_one_step_a_plan(seeds: Iterable[int]) -> None:
    """Planned anew after each eviction and each slide, it takes about as many of them, and ends."""
    as_planned, taken = Counter[str](), Counter[str]()
    for seed in seeds:
        case = any_case(seed)
        try:
            plan = case.plan()
        except PoolCapacityError:
            continue
        as_planned["evictions"] += len(plan.evicted)
        as_planned["slides"] += sum(map(len, plan.sliding.values()))
        for _ in range(20):
            strips = list(case.strips)
            if plan.evicted:
                name = chr(plan.evicted[0])
                strips = [without(strip, name) for strip in strips]
                case = replace(case, oldest_first=case.oldest_first.replace(name, ""))
                taken["evictions"] += 1
            elif plan.sliding:
                path, (slot, *_) = next(iter(plan.sliding.items()))
                strips[int(path)] = slid(strips[int(path)], chr(slot))
                taken["slides"] += 1
            else:
                break
            case = replace(case, strips=strips)
            plan = case.plan()
        assert not plan.evicted and not plan.sliding, (seed, case)
    for what, count in as_planned.items():
        assert 100 < count and taken[what] <= 1.01 * count, (what, as_planned, taken)


def test_plans_anew_after_each_step() -> None:
    check_one_step_a_plan(range(2000))


@pytest.mark.slow
def test_plans_anew_after_each_step_at_length() -> None:
    check_one_step_a_plan(range(2000, 30_000))


def steps(call: Callable[[], Any]) -> int:
    """How many lines of the planner run."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        count += event == "line"
        return trace if "lora_mux" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def room_for(
    pools: int, spans: Mapping[int, Span], rows: int, evictable: Sequence[int], idle: Sequence[int]
) -> tuple[Placement, int]:
    """One adapter of `rows` comes to equal pools; the plan, and its steps."""
    pool = planned("")
    pool.spans = dict(spans)
    pool.runs = FreeRuns.rebuilt(
        max(span.offset + span.rows for span in spans.values()),
        [span[:2] for span in spans.values()],
    )
    by_path = {str(i): pool for i in range(pools)}
    ranks = {-1: dict.fromkeys(by_path, rows)}
    found: list[Placement] = []
    count = steps(lambda: found.append(find_room(by_path, ranks, [-1], idle, evictable)))
    return found[0], count


def adapters_of(rank: int, count: int) -> dict[int, Span]:
    return {slot: Span(rank * slot, rank, False, 1.0) for slot in range(count)}


class TestSteps:
    """Lines that run, which no other process slows down."""

    def test_usual(self) -> None:
        """The pools are full and the oldest makes room: no pool's adapters are looked at."""
        every = range(500)
        plan, count = room_for(200, adapters_of(16, 500), 16, every, every)
        assert list(plan.evicted) == [0] and not plan.sliding
        assert count < 60 * 200 + 10 * 500

    @pytest.mark.parametrize("pinned", [False, True])
    def test_linear(self, pinned: bool) -> None:
        """2,000 of rank 1 and one of rank 1,000, where every second one was used lately."""
        counts = []
        for residents in (1000, 2000):
            old, new = range(1, residents, 2), range(0, residents, 2)
            evictable = [*old] if pinned else [*old, *new]
            spans = adapters_of(1, residents)
            plan, count = room_for(1, spans, residents // 2, evictable, [*old, *new])
            assert len(plan.evicted) == residents // 2
            assert bool(plan.sliding) is pinned
            counts.append(count)
        assert counts[1] < 2.2 * counts[0] < 2.2 * 60 * 1000

    def test_many_pools(self) -> None:
        """A stretch that is emptied for the first of 224 pools serves the others."""
        old_first = random.Random(0).sample(range(500), 500)
        plan, count = room_for(224, adapters_of(8, 500), 256, old_first, old_first)
        assert len(plan.evicted) == 32
        assert count < 224 * 32 * 20
