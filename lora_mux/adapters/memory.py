"""How much memory the pools of a model may take, and how much its adapters do.

What a number of bytes buys is counted in rank rows; a report has both.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..core import Pool, Slots, slot_of
from ..errors import AdapterError, ArgumentTypeError, PoolCapacityError

UNITS = {"B": 1} | {
    prefix + unit: base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def parse_size(memory: object) -> int:
    """The number of bytes in an int, or in a str such as "2GiB" or "500 MB".

    Raises:
        ArgumentTypeError: memory is neither int nor str.
        AdapterError: the str is no such size, or the size is less than a byte.

    Examples:
        >>> parse_size("1.5KiB"), parse_size("2 GB"), parse_size(7)
        (1536, 2000000000, 7)
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise ArgumentTypeError(
            f"`memory` must be an int of bytes or a str like '2GiB', got {type(memory).__name__}"
        )
    size = memory
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", size)
        size = int(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise AdapterError(f"`memory` must be a size like '2GiB' or 500_000_000, got {memory!r}")
    return size


def rank_rows_within(memory: int, pools: Sequence[Pool]) -> int:
    """The rank rows that `memory` bytes buy in each pool, the same number in all.

    Raises:
        PoolCapacityError: the memory is less than one rank row in each.
    """
    row_bytes = sum(pool.row_bytes for pool in pools)
    if memory < row_bytes:
        raise PoolCapacityError(
            f"`memory` must be at least one rank row in each of {len(pools)} targets, "
            f"{row_bytes} bytes, got {memory}"
        )
    return memory // row_bytes


def check_fit(
    pools: Mapping[str, Pool],
    rank_rows: Mapping[int, Mapping[str, int]],
    wanted: Collection[int],
) -> None:
    """Refuse adapters that can never be resident together.

    Args:
        pools: by path.
        rank_rows: handle -> path -> the rank rows that it takes there, of the adapters that are
            wanted and of those that stay in the pools whatever comes.
        wanted: handles.

    Raises:
        PoolCapacityError: a pool is too small for all of these.
    """
    for path, pool in pools.items():
        needed = sum(rank_rows[handle].get(path, 0) for handle in wanted)
        kept = sum(rows.get(path, 0) for rows in rank_rows.values()) - needed
        if needed + kept > pool.runs.capacity:
            raise PoolCapacityError(
                f"the pool of {path!r} must hold {needed} rank rows for one request, but of its "
                f"{pool.runs.capacity} pinned and trained adapters keep {kept}; name fewer "
                "adapters, unpin some, or attach with more memory"
            )


@dataclass(frozen=True)
class AdapterMemory:
    """How much memory one adapter takes in the pools."""

    rank_rows: int  # over all targets; 0 while the adapter waits on the host
    bytes: int
    resident: bool
    pinned: bool


@dataclass(frozen=True)
class PoolMemory:
    """How many rank rows the pool of one target has."""

    capacity: int
    used: int
    largest_free_run: int
    row_bytes: int  # of one rank row, A's part and B's part together

    @property
    def free(self) -> int:
        """How many rank rows are free."""
        return self.capacity - self.used


@dataclass(frozen=True)
class MemoryReport:
    """How much memory the pools and the adapters of a model take.

    Bytes are those of the rank rows. The tables of slots come on top.
    """

    targets: Mapping[str, PoolMemory]  # by path
    adapters: Mapping[str, AdapterMemory]  # by name
    replaced: int  # bytes of adapters that were removed or replaced, and are still in use
    saved_modules: int = 0  # bytes of the modules that adapters saved; equal ones are there once

    @property
    def capacity(self) -> int:
        """Bytes of all rank rows, used and free."""
        return sum(pool.capacity * pool.row_bytes for pool in self.targets.values())

    @property
    def used(self) -> int:
        """Bytes of the used rank rows: the sum of `adapters`, `saved_modules` and `replaced`."""
        return sum(pool.used * pool.row_bytes for pool in self.targets.values())

    @property
    def free(self) -> int:
        """Bytes of the free rank rows."""
        return self.capacity - self.used

    def __str__(self) -> str:
        resident = sum(adapter.resident for adapter in self.adapters.values())
        run = min((pool.largest_free_run for pool in self.targets.values()), default=0)
        return (
            f"{_readable(self.used)} of {_readable(self.capacity)} used by {resident} of "
            f"{len(self.adapters)} adapters; {run} consecutive rank rows are free in every target"
        )


def report_memory(
    pools: Mapping[str, Pool], slots: Slots, pinned: Collection[int], nameless: Collection[int]
) -> MemoryReport:
    """What the pools hold at this moment.

    Args:
        pools: the targets' pools, by path.
        slots: the adapters of the model.
        pinned: handles.
        nameless: handles of adapters that were removed or replaced, and are still in use.
    """
    rows: Counter[int] = Counter()  # by slot
    size: Counter[int] = Counter()  # by slot, in bytes
    for pool in pools.values():
        row_bytes = pool.row_bytes
        for slot, span in pool.spans.items():
            rows[slot] += span.rows
            size[slot] += span.rows * row_bytes
    return MemoryReport(
        targets={
            path: PoolMemory(
                capacity=pool.runs.capacity,
                used=pool.runs.capacity - pool.runs.free,
                largest_free_run=pool.runs.largest,
                row_bytes=pool.row_bytes,
            )
            for path, pool in pools.items()
        },
        adapters={
            name: AdapterMemory(
                rank_rows=rows[slot_of(handle)],
                bytes=size[slot_of(handle)],
                resident=slots.is_live(handle),
                pinned=handle in pinned,
            )
            for name, handle in slots.handles.items()
        },
        replaced=sum(size[slot_of(handle)] for handle in nameless),
        saved_modules=sum(size[slot_of(handle)] for handle in slots.companions.handles),
    )


def _readable(size: float) -> str:
    """A number of bytes in the unit that makes it short."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
