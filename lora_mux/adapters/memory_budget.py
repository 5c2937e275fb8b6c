"""How much memory the pools of a model may take, and how many rank rows it buys in each."""

import re
from collections.abc import Collection, Mapping, Sequence

from ..core import Pool
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
