"""Tile sizes, warps, stages and K splits: one pure function, which returns a checked Config.

The choices are reasoned, not yet measured on a GPU: see kernels/README.md for the reasons.
"""

from dataclasses import dataclass, fields
from functools import lru_cache


@dataclass(frozen=True)
class Architecture:
    """What a choice depends on of the machine."""

    name: str  # "sm_90", "gfx942", ...
    processors: int  # multiprocessors (NVIDIA) or compute units (AMD)


@dataclass(frozen=True)
class Config:
    """How the kernels cut a problem; `choose` makes one, callers may pass their own.

    Raises:
        ValueError: a field that is no power of two (stages and registers: no int), or outside
            what the kernels can do.
    """

    block_m: int  # rows of a tile; plan, shrink and expand of one forward pass share it
    shrink_group: int  # rank blocks (of 16 rank rows) that a program of shrink takes at once
    block_k: int
    split_k: int  # parts of K that are summed in expand, in a fixed order
    shrink_warps: int
    shrink_stages: int
    expand_group: int
    block_n: int
    expand_warps: int
    expand_stages: int
    registers: int | None  # the most that a thread may have (NVIDIA); None = as the compiler likes

    def __post_init__(self) -> None:
        limits = {"block_m": (16, 128), "block_k": (16, 256), "block_n": (16, 256)}
        if self.registers is not None:
            _check("registers", self.registers, 32, 255, power=False)
        for field in fields(self)[:-1]:
            power = not field.name.endswith("stages")
            _check(field.name, getattr(self, field.name), *limits.get(field.name, (1, 16)), power)


def _check(name: str, value: object, low: int, high: int, power: bool) -> None:
    fits = isinstance(value, int) and low <= value <= high and not (power and value & (value - 1))
    if not fits:
        kind = "a power of two" if power else "an int"
        raise ValueError(f"`{name}` must be {kind} from {low} to {high}, got {value!r}")


def tile_rows(rows: int, itemsize: int, batch_invariant: bool = False) -> int:
    """BLOCK_M for a batch of `rows`; all layers of a forward pass that share a plan share it.

    While the base layer is bound by memory (up to ~184 rows on an H200) small tiles have small
    unions and fill the machine; with many rows 64 of them share each load of an adapter. Not in
    fp32: its products take no tensor cores, and from 64 rows on triton before 3.8 computes them in
    TF32 on sm_100, whatever is asked (triton #10176).
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
        batch_invariant: a choice that does not depend on the rows, so that a row's bits do not
            depend on the batch around it: nor on which blocks share a product of expand.
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
    """Left alone, ptxas spills one to four registers to fit another warp.

    With these, three or two programs of four warps on a multiprocessor, no shipped config spills.
    """
    if not half or (old and block_m > 16):
        return 255
    return 168 if block_m == 16 else 192


def _splits(
    in_features: int, tiles: int, block_m: int, block_k: int, architecture: Architecture
) -> int:
    """How many programs share the K loop of one tile and group of rank blocks.

    Enough that a batch with a single adapter fills the processors, but at least two steps of
    BLOCK_K for each (one would wait for its loads without anything to overlap), and no more planes
    of h than expand can have under way at once: 8 of up to 32 rows, 4 of 64.
    """
    most = min(8 if block_m < 64 else 4, architecture.processors // tiles)
    steps = -(-in_features // block_k)
    splits = 1
    while 2 * splits <= most and 4 * splits <= steps:
        splits *= 2
    return splits
