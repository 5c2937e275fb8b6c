"""How many global loads of a compiled kernel follow one another, read from its SASS.

    python tests/support/load_chain.py FILE.sass ...      each kind of way, and where it waits

One warp runs through what `cuobjdump -sass` prints, with every global load taking 1 and all else 0.
What is left is the chain: how many load latencies pass, whatever a latency is. A warp issues in
order, so it stops where the compiler has it wait. NVIDIA's encoding names, in each instruction, the
scoreboards that it waits for and the one that it sets, so no operand has to be understood. Copies
to shared memory (cp.async) come in groups, which a scoreboard counts.

All ways through the code are walked, as nothing here knows which one is taken. The first loop of a
way that multiplies is turned TURNS times, any other once. Not modelled: bandwidth, arithmetic,
barriers between warps, and lines that an earlier load has brought to the L1 cache.
"""

import re
import sys
from bisect import bisect_left
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

TURNS, COUNTED = 72, 60  # of a loop; 60 are whole periods of up to 7 stages
SCOREBOARDS = range(6)
INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
)
PRODUCT = re.compile(r"[A-Z]*MMA$")  # HMMA, HGMMA, UTCHMMA, ...
LOADS = {"LDG", "LD", "ATOMG", "ATOM", "POLL"}  # that bring something to registers


@dataclass(frozen=True)
class Instruction:
    """What a walk needs to know of one."""

    address: int
    text: str
    name: str  # LDG of LDG.E.128; POLL = a load that acquires what others have released
    goal: int | None  # where a branch goes
    conditional: bool
    sets: int  # the scoreboard that its result clears; 7 = none
    waits: tuple[int, ...]  # scoreboards that must be clear before it
    most: tuple[int, int] | None  # DEPBAR: what this scoreboard may still count after it


@dataclass(frozen=True)
class Chain:
    """The load latencies of a way through a kernel, the longest of its kind: see `chain`."""

    before: int  # until the loads that the first product needs are under way
    turn: float  # a turn of that product's loop; 0.5: two turns' loads are under way at once
    after: int  # from the last product of that loop to the end; a poll and an atomic are one each
    polls: int
    waits: tuple[str, ...]  # the instructions that waited


@dataclass
class Way:
    """A warp on its way through the code."""

    at: int = 0
    now: int = 0
    pending: list[list[int]] = field(default_factory=lambda: [[] for _ in SCOREBOARDS])
    copied: int = 0  # when all copies so far are there
    polls: int = 0
    loops: list[int] = field(default_factory=list)  # that multiplied, by their first address
    first: int = 0  # product
    last: int = 0  # of the first loop that multiplied
    turns: list[int] = field(default_factory=list)  # the last product of each
    passed: set[int] = field(default_factory=set)  # where branches that go back may go
    entered: list[int] = field(default_factory=list)  # of these, those around products; at the end
    waits: list[str] = field(default_factory=list)

    def wait(self, scoreboard: int, most: int, text: str) -> None:
        """Until a scoreboard counts no more than `most`."""
        times = self.pending[scoreboard]
        done = max(times[: len(times) - most], default=0)
        self.pending[scoreboard] = times[len(times) - most :] if most else []
        if done > self.now:
            self.now = done
            if text not in self.waits:
                self.waits.append(text)

    def step(self, one: Instruction, loop: int) -> None:
        """`loop`: the innermost one that `one` is in, if it is a product."""
        for scoreboard in one.waits:
            self.wait(scoreboard, 0, one.text)
        if one.most:
            self.wait(*one.most, one.text)
        if one.name in LOADS and one.sets in SCOREBOARDS:
            self.pending[one.sets].append(self.now + 1)
        elif one.name == "LDGSTS":
            self.copied = self.now + 1
        elif one.name == "LDGDEPBAR":
            self.pending[one.sets].append(self.copied)
        self.polls += one.name == "POLL"
        if PRODUCT.match(one.name):
            if not self.loops:
                self.first = self.now
            if self.loops[-1:] != [loop]:
                self.loops.append(loop)
            if len(self.loops) == 1:
                self.last = self.now

    def fork(self, goals: list[int], seen: set[str]) -> Iterator["Way"]:
        """On to each goal, but where a way that was alike has gone before."""
        for goal in goals:
            way = replace(deepcopy(self), at=goal)
            alike = repr(replace(way, waits=[]))
            if alike not in seen:
                seen.add(alike)
                yield way

    def chain(self) -> Chain:
        """What has passed, cut at the first and at the last product of the first loop."""
        settled = len(self.turns) == TURNS
        turn = (self.turns[-1] - self.turns[-1 - COUNTED]) / COUNTED if settled else 0.0
        before, after = max(0, self.first - 1), self.now - self.last
        return Chain(before, turn, after, self.polls, tuple(self.waits))


def parse(sass: str) -> list[Instruction]:
    """The instructions of one kernel that loads, waits, products and branches are made of."""
    code = []
    found = INSTRUCTION.findall(sass)
    for i, (address, guard, operation, operands, high) in enumerate(found):
        word, name = int(high, 16), operation.split(".")[0]
        # BRA.DIV, for lanes that have parted, is never taken.
        goal = re.search(r"0x([0-9a-f]+)$", operands) if operation in ("BRA", "BRA.U") else None
        limit = re.match(r"SB(\d)(?:, 0x([0-9a-f]+))?", operands) if name == "DEPBAR" else None
        waits = tuple(scoreboard for scoreboard in SCOREBOARDS if word >> 52 + scoreboard & 1)
        if name == "LDG" and ".STRONG" in operation and found[i + 1][2] == "CCTL.IVALL":
            name = "POLL"
        kept = goal or limit or waits or name in LOADS | {"LDGSTS", "LDGDEPBAR", "EXIT"}
        if kept or PRODUCT.match(name):
            code.append(
                Instruction(
                    int(address, 16),
                    f"{address} {operation} {operands}",
                    name,
                    int(goal[1], 16) if goal else None,
                    bool(guard) or re.match(r"!?U?P\d", operands) is not None,
                    word >> 46 & 7,
                    waits,
                    (int(limit[1]), int(limit[2] or "0", 16)) if limit else None,
                )
            )
    return code


def successors(code: list[Instruction]) -> list[list[int]]:
    """What may follow each instruction: the next one, or the goal of a branch, or both."""
    addresses = [one.address for one in code]
    found: list[list[int]] = []
    for at, one in enumerate(code):
        ends = (one.name == "EXIT" or one.goal is not None) and not one.conditional
        goal = [] if one.goal is None else [bisect_left(addresses, one.goal)]
        found.append([*([] if ends else [at + 1]), *goal])
    return found


def reached(follow: list[list[int]]) -> set[int]:
    """What lies on a way at all; where only BRA.DIV leads does not."""
    found, waiting = set(), [0]
    while waiting:
        at = waiting.pop()
        if at not in found and at < len(follow):
            found.add(at)
            waiting += follow[at]
    return found


def walk(code: list[Instruction]) -> Iterator[Way]:
    """Every way through the code; see ways_through."""
    follow = successors(code)
    back = {at: to for at in sorted(reached(follow)) for to in follow[at] if to <= at}
    # Each product, and where the loops around it begin.
    products = {
        at: {begin for end, begin in back.items() if begin <= at <= end}
        for at, one in enumerate(code)
        if PRODUCT.match(one.name)
    }
    around = set().union(*products.values())
    waiting, seen = [Way()] if products else [], set()
    while waiting:
        way = waiting.pop()
        while way.at < len(code):
            at = way.at
            if at in back.values():
                way.passed.add(at)
            way.step(code[at], max(products.get(at, ()), default=-1))
            if code[at].name == "EXIT":
                way.entered = sorted(way.passed & around)
                yield deepcopy(way)
            nexts = follow[at]
            if at in back:
                if way.loops == [back[at]] and len(way.turns) < TURNS:
                    way.turns.append(way.last)
                    nexts = [back[at]]
                else:  # once is enough
                    nexts = [to for to in nexts if to != back[at] or to not in way.passed]
            if len(nexts) != 1:
                waiting += way.fork(nexts, seen)
                break
            way.at = nexts[0]


def ways_through(sass: str) -> list[Way]:
    """All that lead to the end of a kernel; none where nothing multiplies."""
    return list(walk(parse(sass)))


def chain(ways: list[Way], loops: int, polls: bool) -> Chain:
    """The longest way that multiplies in so many loops, and polls or does not.

    Of those that poll the least, and of these the ones that keep to the first loops in the code:
    what further windows of a union add is not in it.

    Raises:
        ValueError: there is no such way.
    """
    alike = [way for way in ways if len(way.loops) == loops and (way.polls > 0) == polls]
    if not alike:
        raise ValueError(f"no way with {loops=}, {polls=}")
    return min(alike, key=lambda w: (w.polls, w.entered, -w.now, -w.first)).chain()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        ways = ways_through(Path(name).read_text())
        for kind in sorted({(len(way.loops), way.polls > 0) for way in ways if way.loops}):
            print(name, *kind, chain(ways, *kind))
