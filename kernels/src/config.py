"""Tile sizes, warps, stages and K splits: pure functions that return a checked Config.

The choices are reasoned; kernels/README.md gives the reasons, and what an H100 said of them.
"""

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The machine, as far as a choice depends on it."""

    name: str  # "sm_90", "gfx942", ...
    processors: int  # multiprocessors (NVIDIA) or compute units (AMD)


def _limits(low: int, high: int, power: bool = True) -> Any:
    """A field that must be a power of two (else any int) from `low` to `high`."""
    return field(metadata={"limits": (low, high, power)})


@dataclass(frozen=True, kw_only=True)
class TileSizes:
    """How kernels cut a problem; the fields that every config has.

    Raises:
        ValueError: a field outside its limits.
    """

    block_m: int = _limits(16, 128)  # rows of a tile, the plan's as well
    block_n: int = _limits(16, 256)
    block_k: int = _limits(16, 256)
    split_k: int = _limits(1, 16)  # parts of K that expand sums, in a fixed order
    shrink_group: int = _limits(1, 16)  # rank blocks (of 16 rank rows) that shrink takes at once
    expand_group: int = _limits(1, 16)  # and expand
    # The most that a thread may have (NVIDIA); None = as the compiler likes.
    registers: int | None = _limits(32, 255, power=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, (low, high, power) = getattr(self, one.name), one.metadata["limits"]
            if value is None and one.name == "registers":
                continue
            fits = isinstance(value, int) and low <= value <= high
            if not fits or (power and value & (value - 1)):
                kind = "a power of two" if power else "an int"
                raise ValueError(f"`{one.name}` must be {kind} from {low} to {high}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Config(TileSizes):
    """For shrink and expand; `choose` makes one, callers may pass their own."""

    shrink_warps: int = _limits(1, 16)
    shrink_stages: int = _limits(1, 16, power=False)
    expand_warps: int = _limits(1, 16)
    expand_stages: int = _limits(1, 16, power=False)


@dataclass(frozen=True, kw_only=True)
class FusedConfig(TileSizes):
    """For the fused kernel; `choose_fused` makes one."""

    swizzle: int = _limits(1, 16)  # row tiles that take a block of W together
    warps: int = _limits(1, 16)
    stages: int = _limits(1, 16, power=False)


def tile_rows(rows: int, itemsize: int, batch_invariant: bool = False) -> int:
    """BLOCK_M for a batch of `rows`; all layers that share a plan share it.

    While the base layer is bound by memory (up to about 184 rows on an H200), small tiles have
    small unions and fill the machine. With many rows, 64 of them share each load of an adapter.
    Not in fp32: its products use no tensor cores, and triton before 3.8 computes those of 64 rows
    in TF32 on sm_100, whatever is asked (triton #10176).
    """
    if batch_invariant or rows <= 64:
        return 16
    return 32 if rows <= 512 or itemsize > 2 else 64


@lru_cache(maxsize=4096)
def choose(
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    selections: int,
    itemsize: int,
    architecture: Architecture,
    block_m: int | None = None,
    batch_invariant: bool = False,
) -> Config:
    """The Config for x [rows, in_features], y [rows, out_features] and adapters up to `rank`.

    Args:
        rows: of the batch.
        in_features: K of x.
        out_features: N of y.
        rank: the largest rank that the pool may hold.
        selections: J, the places of a row.
        itemsize: bytes of an element of the products: 2, or 4 for fp32.
        architecture: of the device.
        block_m: of the plan; None = tile_rows(rows, itemsize, batch_invariant).
        batch_invariant: choose without looking at the rows, so that a row's bits do not depend on
            the batch around it, nor on which blocks share a product of expand.
    """
    block_m = block_m or tile_rows(rows, itemsize, batch_invariant)
    tiles = 1 if batch_invariant else max(1, -(-rows // block_m))
    half = itemsize <= 2
    block_k = (128 if block_m == 16 else 64) if half else (32 if block_m == 16 else 16)
    amd = architecture.name.startswith("gfx")
    old = architecture.name == "sm_80"  # no wgmma: both operands of a product fill registers
    # A narrow layer (k and v of an 8B model: N = 1024) leaves most processors without columns.
    columns = tiles * -(-out_features // 64)
    narrow = block_m == 16 and 2 * columns <= architecture.processors
    # On sm_100 products of 32 columns miss the tensor memory, and spill.
    narrow = narrow and architecture.name != "sm_100"
    one_block = selections * -(-rank // 16) <= 1
    return Config(
        block_m=block_m,
        shrink_group=(4 if block_m == 16 else 2) if half else 1,
        block_k=block_k,
        split_k=_splits(in_features, tiles, block_m, block_k, architecture),
        shrink_warps=4,
        shrink_stages=3 if half and not amd else 2,
        expand_group=1 if batch_invariant or one_block or not half or (old and block_m > 16) else 2,
        block_n=64 if half and not narrow else 32,
        expand_warps=8 if old and block_m == 64 else 4,
        expand_stages=1 if old and block_m == 32 else 2,
        registers=None if amd else _registers(block_m, half, old),
    )


def _registers(block_m: int, half: bool, old: bool) -> int:
    """The most that a thread may have, with which no shipped config spills.

    Left alone, ptxas spills one to four to fit another warp. With 168 three programs of four warps
    fit on a multiprocessor, with 192 two.
    """
    if not half or (old and block_m > 16):
        return 255
    return 168 if block_m == 16 else 192


def _splits(
    in_features: int, tiles: int, block_m: int, block_k: int, architecture: Architecture
) -> int:
    """How many programs share the K loop of one tile and group of rank blocks.

    As many as let a batch with a single adapter fill the processors. But each has at least two
    steps of BLOCK_K (one would wait for its loads with nothing to overlap them), and there are no
    more planes of h than expand can have under way at once: 8 of up to 32 rows, 4 of 64.
    """
    most = min(8 if block_m < 64 else 4, architecture.processors // tiles)
    steps = -(-in_features // block_k)
    splits = 1
    while 2 * splits <= most and 4 * splits <= steps:
        splits *= 2
    return splits


# While the layer is bound by memory, up to about 184 rows on an H200, the programs of shrink hide
# behind those of W. With more rows they would only stand in front of them.
SHRINKS_WITHIN = 184


def fused_tile_rows(rows: int) -> int:
    """BLOCK_M of the fused kernel: all rows in one tile up to 128, so that W is read once."""
    for block_m in (16, 32, 64):
        if rows <= block_m:
            return block_m
    return 128


@lru_cache(maxsize=4096)
def choose_fused(rows: int, out_features: int, architecture: Architecture) -> FusedConfig:
    """The FusedConfig for y [rows, out_features] in 16-bit types."""
    block_m = fused_tile_rows(rows)
    amd = architecture.name.startswith("gfx")
    old = architecture.name == "sm_80"  # no wgmma: both operands of a product fill registers
    if rows > SHRINKS_WITHIN:
        # As many products for each byte that comes from the L2 cache as fit the registers.
        return FusedConfig(
            block_m=128,
            block_n=64 if old else 128,
            block_k=64,
            shrink_group=1,
            split_k=1,
            expand_group=2,
            swizzle=8,
            warps=8,
            stages=2 if amd else 3,
            registers=None if amd else 255,
        )
    block_n = _columns(rows, block_m, out_features, architecture.processors)
    return FusedConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=128 if block_m <= 32 else 64,
        # Half as many rows of A as a base tile has of W, so that h is there when it is wanted;
        # a tile of 16 columns has no half, and K is split instead.
        shrink_group=min(2, max(1, block_n // 32)),
        split_k=2 if block_n == 16 else 1,
        expand_group=2,
        swizzle=2,
        warps=4 if block_m * block_n <= (2048 if old else 4096) else 8,
        stages=2 if amd else 4 if block_m <= 32 else 3,
        # Left alone, ptxas spills one to eight registers to fit another warp.
        registers=None if amd else 255,
    )


def _columns(rows: int, block_m: int, out_features: int, processors: int) -> int:
    """BLOCK_N: the least time for whole waves of programs.

    A program reads block_n rows of W from memory, and all of x from the L2 cache, which is about
    three times as fast.
    """
    tiles = -(-rows // block_m)

    def time(block_n: int) -> float:
        waves = -(-tiles * -(-out_features // block_n) // processors)
        return waves * (block_n + block_m / 3)

    return min((128, 64, 32, 16) if block_m < 128 else (64, 32, 16), key=time)
