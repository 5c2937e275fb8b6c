"""Free runs of rank rows, against a list of booleans."""

import random

import pytest

from lora_mux.core.free_runs import FreeRuns


class Rows:
    """The same, row by row."""

    def __init__(self) -> None:
        self.free: list[bool] = []

    def take(self, rows: int) -> int | None:
        for start in range(len(self.free) - rows + 1):
            if all(self.free[start : start + rows]):
                self.free[start : start + rows] = [False] * rows
                return start
        return None

    @property
    def lengths(self) -> list[int]:
        shown = "".join("-" if free else " " for free in self.free)
        return [len(run) for run in shown.split()]


@pytest.mark.parametrize("seed", range(20))
def test_against_booleans(seed: int) -> None:
    draw, runs, rows = random.Random(seed), FreeRuns(), Rows()
    taken: list[tuple[int, int]] = []
    for _ in range(300):
        act = draw.random()
        if act < 0.05 and len(rows.free) < 200:
            more = draw.randrange(20)
            rows.free += [True] * more
            runs.grow(len(rows.free))
        elif act < 0.55:
            count = draw.randint(1, 9)
            start = runs.take(count)
            assert start == rows.take(count)
            if start is not None:
                taken.append((start, count))
        elif taken:
            start, count = taken.pop(draw.randrange(len(taken)))
            begin, end = runs.give(start, count)
            assert begin <= start and start + count <= end and (begin, end) in list(runs)
            rows.free[start : start + count] = [True] * count
        assert runs.capacity == len(rows.free)
        assert runs.free == sum(rows.free)
        assert runs.largest == max(rows.lengths, default=0)
        tail = rows.lengths[-1] if rows.free and rows.free[-1] else 0
        assert runs.tail == runs.capacity - tail
        twin = runs.copy()
        twin.take(1)
        assert runs.free == sum(rows.free)
        draw.shuffle(taken)
        rebuilt = FreeRuns.rebuilt(len(rows.free), [*taken, (0, 0)])
        assert (rebuilt.capacity, list(rebuilt)) == (runs.capacity, list(runs))


@pytest.mark.parametrize(
    "taken",
    [[(0, 3), (2, 1)], [(4, 2), (3, 2)], [(5, 1), (5, 1)], [(7, 2)], [(8, 1)], [(-1, 2)]],
    ids=str,
)
def test_rebuilt_notices_rows_that_two_have(taken: list[tuple[int, int]]) -> None:
    with pytest.raises(AssertionError, match="is taken"):
        FreeRuns.rebuilt(8, taken)
