"""How much memory the pools of a model may take, and how many rank rows that is in each."""

import re
from collections.abc import Sequence

from ..core import Pool
from ..errors import AdapterError, ArgumentTypeError, PoolCapacityError

UNITS = {"B": 1} | {
    prefix + unit: base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def bytes_of(memory: object) -> int:
    """A number of bytes, of an int or a str such as "2GiB" or "500 MB".

    Raises:
        ArgumentTypeError: neither int nor str.
        AdapterError: a str that is no such size, or nothing at all.

    Example:
        >>> bytes_of("1.5KiB"), bytes_of("2 GB"), bytes_of(7)
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


def split(memory: int, pools: Sequence[Pool]) -> int:
    """The rank rows of each pool, the same number in all, that `memory` bytes hold.

    Raises:
        PoolCapacityError: not even one.
    """
    row = sum(pool.row_bytes for pool in pools)
    if memory < row:
        raise PoolCapacityError(
            f"`memory` must hold at least one rank row in each of {len(pools)} targets, "
            f"{row} bytes, got {memory}"
        )
    return memory // row
