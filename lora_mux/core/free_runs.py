"""Which rank rows of a pool are free: runs of consecutive rows, handed out first fit."""

from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Where an adapter's rank rows are, as the host knows it.

    It is another object, though maybe an equal one, whenever the rank rows hold something else.
    """

    offset: int
    rows: int
    bias: bool  # whether the last one of its rank is constant
    scaling: float
    gain: bool = False  # whether the last one of all is a gain
    cast: bool = False  # whether a smaller dtype has rounded the values since they were written

    @property
    def rank(self) -> int:
        """How many of the rows are multiplied with x."""
        return self.rows - self.gain


class Move(NamedTuple):
    """Rank rows on their way to another place: all that it takes to finish, and to begin again."""

    slot: int
    span: Span  # where they come to be
    left: slice  # the rows where none of them will be any more
    values: Mapping[str, Tensor]  # by buffer; copies, because old and new place may overlap


class FreeRuns:
    """The free runs among `capacity` rows, in order; no two of them touch."""

    def __init__(self) -> None:
        self.capacity = 0
        self._free: list[tuple[int, int]] = []  # (start, end)

    @classmethod
    def rebuilt(cls, capacity: int, taken: Iterable[tuple[int, int]]) -> "FreeRuns":
        """The free runs among `capacity` rows when runs (start, rows) are taken, in any order.

        Raises:
            AssertionError: two of them overlap, or one lies outside.
        """
        runs, end = cls(), 0
        runs.capacity = capacity
        for start, rows in [*sorted(taken), (capacity, 0)]:
            assert end <= start, f"rank row {start} of {capacity} is taken, and not below {end}"
            if end < start:
                runs._free.append((end, start))
            end = start + rows
        return runs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Where each run begins and ends, in order."""
        return iter(self._free)

    @property
    def free(self) -> int:
        """How many rows are free."""
        return sum(end - start for start, end in self._free)

    @property
    def largest(self) -> int:
        """How many rows the longest free run has."""
        return max((end - start for start, end in self._free), default=0)

    @property
    def tail(self) -> int:
        """Where the free rows at the very end begin; the capacity if there are none."""
        if self._free and self._free[-1][1] == self.capacity:
            return self._free[-1][0]
        return self.capacity

    def copy(self) -> "FreeRuns":
        """The same free runs, to try things out on."""
        twin = FreeRuns()
        twin.capacity, twin._free = self.capacity, self._free.copy()
        return twin

    def grow(self, capacity: int) -> None:
        """Add free rows at the end."""
        before, self.capacity = self.capacity, capacity
        self.give(before, capacity - before)

    def take(self, rows: int) -> int | None:
        """Take `rows` from the first run that holds them; returns their start, or None."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= rows:
                self._free[i : i + 1] = [(start + rows, end)] if end - start > rows else []
                return start
        return None

    def give(self, start: int, rows: int) -> tuple[int, int]:
        """Give rows back. They join the free runs that they touch; returns the run they are in."""
        if not rows:
            return start, start
        free, end = self._free, start + rows
        first = last = bisect(free, (start, end))
        if first and free[first - 1][1] == start:
            first, start = first - 1, free[first - 1][0]
        if last < len(free) and free[last][0] == end:
            last, end = last + 1, free[last][1]
        free[first:last] = [(start, end)]
        return start, end


def joined(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """(start, end) of the rank rows of spans, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, rows, *_ in sorted(spans):
        begins = joined.pop()[0] if joined and joined[-1][1] == start else start
        joined.append((begins, start + rows))
    return joined
