"""What the pools of a model hold: a report, in rank rows and in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """What one adapter holds."""

    rank_rows: int  # in the pools, over all targets; 0 while it waits on the host
    bytes: int
    resident: bool
    pinned: bool


@dataclass(frozen=True)
class PoolMemory:
    """The rank rows of one target's pool."""

    capacity: int
    used: int
    largest_free_run: int
    row_bytes: int  # of one rank row, A's and B's part together

    @property
    def free(self) -> int:
        return self.capacity - self.used


@dataclass(frozen=True)
class Memory:
    """All pools of a model. Bytes are those of rank rows; the tables of slots come on top."""

    targets: Mapping[str, PoolMemory]  # by path
    adapters: Mapping[str, Holding]  # by name
    replaced: int  # bytes of adapters that were removed or replaced, and are still being read

    @property
    def capacity(self) -> int:
        """Bytes, used and free."""
        return sum(pool.capacity * pool.row_bytes for pool in self.targets.values())

    @property
    def used(self) -> int:
        """Bytes: exactly what `adapters` and `replaced` sum up to."""
        return sum(pool.used * pool.row_bytes for pool in self.targets.values())

    @property
    def free(self) -> int:
        """Bytes."""
        return self.capacity - self.used

    def __str__(self) -> str:
        resident = sum(holding.resident for holding in self.adapters.values())
        run = min((pool.largest_free_run for pool in self.targets.values()), default=0)
        return (
            f"{_shown(self.used)} of {_shown(self.capacity)} used by {resident} of "
            f"{len(self.adapters)} adapters; {run} rank rows in a row are free in every target"
        )


def _shown(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
