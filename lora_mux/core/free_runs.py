"""Which rank rows of a pool are free: runs of consecutive ones, handed out first fit."""


class Runs:
    """The free runs among `capacity` rows, in order, none touching the next."""

    def __init__(self) -> None:
        self.capacity = 0
        self._free: list[tuple[int, int]] = []  # (start, end)

    @property
    def free(self) -> int:
        """How many rows are free."""
        return sum(end - start for start, end in self._free)

    @property
    def largest(self) -> int:
        """The length of the longest free run."""
        return max((end - start for start, end in self._free), default=0)

    @property
    def tail(self) -> int:
        """Where the free rows at the very end begin; the capacity when there are none."""
        if self._free and self._free[-1][1] == self.capacity:
            return self._free[-1][0]
        return self.capacity

    def copy(self) -> "Runs":
        twin = Runs()
        twin.capacity, twin._free = self.capacity, self._free.copy()
        return twin

    def grow(self, capacity: int) -> None:
        """Add free rows at the end."""
        before, self.capacity = self.capacity, capacity
        self.give(before, capacity - before)

    def take(self, rows: int) -> int | None:
        """The start of the first run that holds `rows`, which are taken; None when none does."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= rows:
                self._free[i : i + 1] = [(start + rows, end)] if end - start > rows else []
                return start
        return None

    def give(self, start: int, rows: int) -> None:
        """Give taken rows back; they join the free runs that they touch."""
        if not rows:
            return
        end = start + rows
        at = sum(free_start < start for free_start, _ in self._free)
        after = at + 1 if at < len(self._free) and self._free[at][0] == end else at
        if after > at:
            end = self._free[at][1]
        if at and self._free[at - 1][1] == start:
            at, start = at - 1, self._free[at - 1][0]
        self._free[at:after] = [(start, end)]
