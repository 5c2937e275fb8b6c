"""Tile sizes, warps, stages and K splits: pure functions that return a checked Config.

The choices are reasoned; kernels/README.md gives the reasons, and what an H100 said of them.
"""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

# The instructions of tensor cores, as far as Triton uses them. Both operands of mma fill registers,
# those of wgmma and tcgen05 may stay in shared memory. mfma is AMD's.
TensorCores: TypeAlias = Literal["none", "mma", "wgmma", "tcgen05", "mfma"]


@dataclass(frozen=True)
class Architecture:
    """The machine, as far as a choice depends on it."""

    tensor_cores: TensorCores
    processors: int  # multiprocessors (NVIDIA) or compute units (AMD)
    shared: int  # bytes of shared memory that a program may have


def nvidia_tensor_cores(major: int) -> TensorCores:
    """The tensor cores of a compute capability."""
    if major < 8:
        return "none"  # they have some, but Triton multiplies fp16 without
    known: dict[int, TensorCores] = {9: "wgmma", 10: "tcgen05"}
    return known.get(major, "mma")  # which all have; of sm_120 it is all that Triton uses


def obstacle(capability: tuple[int, int], modern: bool) -> str:
    """What the kernels need of a GPU and do not find; "" where they run.

    Args:
        capability: compute capability, (major, minor).
        modern: for bf16, which older GPUs do not have, and for the fused kernel, whose W x would be
            far slower without tensor cores.
    """
    oldest = (8, 0) if modern else (7, 0)
    if capability >= oldest:
        return ""
    needed, got = (".".join(map(str, one)) for one in (oldest, capability))
    return f"compute capability {needed} or newer, got {got}"


def _limits(low: int, high: int, power: bool = True) -> Any:
    """A field that must be a power of two (else any int) from `low` to `high`."""
    return field(metadata={"limits": (low, high, power)})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Fields that keep within their limits.

    Raises:
        ValueError: a field outside of them.
    """

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
class TileSizes(Limits):
    """How kernels cut a problem; the fields that the configs of a forward pass have."""

    block_m: int = _limits(16, 128)  # rows of a tile, the plan's as well
    block_n: int = _limits(16, 256)
    block_k: int = _limits(16, 256)
    split_k: int = _limits(1, 16)  # parts of K that expand sums, in a fixed order
    shrink_group: int = _limits(1, 16)  # rank blocks (of 16 rank rows) that shrink takes at once
    expand_group: int = _limits(1, 16)  # and expand


@dataclass(frozen=True, kw_only=True)
class Config(TileSizes):
    """For shrink and expand; `choose` makes one, callers may pass their own."""

    shrink_warps: int = _limits(1, 16)
    shrink_stages: int = _limits(1, 16, power=False)
    expand_warps: int = _limits(1, 16)
    expand_stages: int = _limits(1, 16, power=False)
    walk: int = _limits(1, 16, power=False)  # blocks of columns that expand takes in turn


@dataclass(frozen=True, kw_only=True)
class FusedConfig(TileSizes):
    """For the fused kernel, whose rows are one tile; `choose_fused` makes one."""

    warps: int = _limits(1, 16)
    stages: int = _limits(1, 16, power=False)


@dataclass(frozen=True, kw_only=True)
class GradientConfig(Limits):
    """For the weight gradient; `choose_gradient` makes one."""

    group: int = _limits(1, 4)  # rank blocks (of 16 rank rows) of one adapter at once
    block_p: int = _limits(16, 128)  # pairs of a step
    block_c: int = _limits(16, 256)
    split: int = _limits(1, 16)  # programs that share an adapter's pairs
    warps: int = _limits(1, 16)
    stages: int = _limits(1, 16, power=False)


def tile_rows(rows: int, itemsize: int, batch_invariant: bool = False) -> int:
    """BLOCK_M for a batch of `rows`; all layers that share a plan share it.

    Small tiles have small unions: 256 rows of 256 adapters take an H100 67 us in tiles of 16 and
    109 us in tiles of 32, and 128 rows of 8 adapters 4 % more to 6 % less. With many rows, 64 of
    them share each load of an adapter. Not in fp32: its products use no tensor cores, and triton
    before 3.8 computes those of 64 rows in TF32 on sm_100, whatever is asked (triton #10176).
    """
    if batch_invariant or rows <= 256:
        return 16
    return 32 if itemsize > 2 else 64


@lru_cache(maxsize=4096)
def choose(
    rows: int,
    in_features: int,
    out_features: int,
    itemsize: int,
    architecture: Architecture,
    block_m: int | None = None,
    batch_invariant: bool = False,
) -> Config:
    """The Config for x [rows, in_features] and y [rows, out_features].

    Args:
        rows: of the batch.
        in_features: K of x.
        out_features: N of y.
        itemsize: bytes of an element of the products: 2, or 4 for fp32.
        architecture: of the device.
        block_m: of the plan; None = tile_rows(rows, itemsize, batch_invariant).
        batch_invariant: choose without looking at the rows, so that a row's bits do not depend on
            the batch around it, nor on which blocks share a product of expand.
    """
    block_m = block_m or tile_rows(rows, itemsize, batch_invariant)
    tiles = 1 if batch_invariant else max(1, -(-rows // block_m))
    cores = architecture.tensor_cores
    # Without tensor cores fp16 is multiplied as fp32 is, and larger tiles spill.
    half = itemsize <= 2 and cores != "none"
    block_k = (128 if block_m == 16 else 64) if half else (32 if block_m == 16 else 16)
    amd, mma = cores == "mfma", cores == "mma"
    # A narrow layer (k and v of an 8B model: N = 1024) leaves most processors without columns.
    columns = tiles * -(-out_features // 64)
    narrow = block_m == 16 and 2 * columns <= architecture.processors
    # With tcgen05 products of 32 columns miss the tensor memory, and spill.
    narrow = narrow and cores != "tcgen05"
    alone = batch_invariant or not half or (mma and block_m > 16)
    found = Config(
        block_m=block_m,
        shrink_group=(4 if block_m == 16 else 2) if half else 1,
        block_k=block_k,
        split_k=_splits(in_features, tiles, block_m, block_k, architecture),
        shrink_warps=4,
        shrink_stages=3 if half and not amd else 2,
        # Each group waits for memory once more; how many blocks there are is not known here.
        expand_group=1 if alone else 4 if block_m == 16 and not mma else 2,
        block_n=64 if half and not narrow else 32,
        expand_warps=8 if mma and block_m == 64 else 4,
        expand_stages=1 if mma and block_m == 32 else 2,
        walk=1,
        # Left alone, ptxas spills one to four registers to fit another warp.
        registers=None if amd else 255,
    )
    odd = in_features % 8 or out_features % 8  # rows that are read by the element would spill
    if cores != "wgmma" or not half or batch_invariant or narrow or odd:
        return found
    # What an H100 found fastest: kernels/README.md has the figures.
    if block_m == 16:
        return replace(found, expand_group=8, expand_warps=8, block_n=128)
    walk = 4 if tiles * -(-out_features // 512) >= architecture.processors else 1
    measured = {"block_k": 128, "shrink_stages": 4, "split_k": 1, "expand_group": 1, "block_n": 128}
    return replace(found, walk=walk, **measured)


def _splits(
    in_features: int, tiles: int, block_m: int, block_k: int, architecture: Architecture
) -> int:
    """How many programs share the K loop of one tile and group of rank blocks.

    As many as let a batch with a single adapter fill half the processors: with 256 rows of 256
    adapters, two take an H100 58 us and eight 67. But each has at least two steps of BLOCK_K (one
    would wait for its loads with nothing to overlap them), and there are no more parts of h than
    expand can have under way at once: 8 of up to 32 rows, 2 of 64.
    """
    most = min(8 if block_m < 64 else 2, architecture.processors // (2 * tiles))
    steps = -(-in_features // block_k)
    splits = 1
    while 2 * splits <= most and 4 * splits <= steps:
        splits *= 2
    return splits


# With more rows one launch is slower than three on an H100: 2.2 times the base against 1.8 with 64
# rows of a 4096 x 4096 layer, 3.6 against 2.2 with 256, and 2.1 against 1.3 in prefill.
FUSED_ROWS = 32


def fused_tile_rows(rows: int) -> int:
    """BLOCK_M of the fused kernel, whose rows are one tile, so that W is read once."""
    return 16 if rows <= 16 else 32


@lru_cache(maxsize=4096)
def choose_fused(
    rows: int, out_features: int, architecture: Architecture, places: int = 1
) -> FusedConfig:
    """The FusedConfig for y [rows, out_features] in 16-bit types, of up to FUSED_ROWS rows.

    Args:
        rows: of the batch.
        out_features: N of y.
        architecture: of the device.
        places: J, the adapters that a row may have.
    """
    block_m = fused_tile_rows(rows)
    amd = architecture.tensor_cores == "mfma"
    mma = architecture.tensor_cores == "mma"
    if not (amd or mma):
        return _in_shared_memory(block_m, out_features, architecture.processors, places)
    block_n = _columns(block_m, out_features, architecture.processors)
    # Tiles of x and W in shared memory; where operands fill registers, one stage is there.
    most = architecture.shared // (2 * (block_m + block_n) * 128) + mma
    return FusedConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=128,
        # Half as many rows of A as a base tile has of W, so that h is there when it is wanted;
        # a tile of 16 columns has no half, and K is split instead.
        shrink_group=min(2, max(1, block_n // 32)),
        split_k=2 if block_n == 16 else 1,
        expand_group=2,
        warps=4 if block_m * block_n <= (2048 if mma else 4096) else 8,
        stages=2 if amd else min(4, most),
        registers=None if amd else 255,
    )


def _in_shared_memory(block_m: int, out_features: int, processors: int, places: int) -> FusedConfig:
    """Where both operands of a product stay in shared memory.

    These are among those that an H100 found fastest, for which kernels/README.md has the figures.
    Programs with a multiprocessor of their own have six loads of W under way, others share its
    memory.
    """

    def programs(columns: int) -> int:
        return -(-out_features // columns)

    wide, registers = programs(64) > 2 * processors, 255
    if block_m == 16:
        block_n = 32 if programs(32) <= processors else 64
        block_k = 128 if wide else 256
        tile = {"block_m": 16, "block_n": block_n, "block_k": block_k, "warps": 4, "stages": 4}
        return FusedConfig(shrink_group=1, expand_group=4, split_k=2, registers=registers, **tile)
    tile = {"block_m": 32, "block_n": 128 if wide else 64, "block_k": 128}
    stages = 4 if wide or programs(64) > processors else 6
    warps = 8 if wide else 4
    # Shrink is sooner done in more parts, but h has all parts of all places.
    split_k = 4 if places == 1 else 1
    common = {"warps": warps, "stages": stages, "registers": registers, **tile}
    return FusedConfig(shrink_group=2, expand_group=8, split_k=split_k, **common)


def _columns(block_m: int, out_features: int, processors: int) -> int:
    """BLOCK_N: the least time for whole waves of programs.

    A program reads block_n rows of W from memory, and all of x from the L2 cache, which is about
    three times as fast.
    """

    def time(block_n: int) -> float:
        programs = -(-out_features // block_n)
        waves = -(-programs // processors)
        return waves * (block_n + block_m / 3)

    return min((128, 64, 32, 16), key=time)


def choose_gradient(
    pairs: int,
    adapters: int,
    rank_blocks: int,
    columns: int,
    itemsize: int,
    architecture: Architecture,
    batch_invariant: bool = False,
) -> GradientConfig:
    """The GradientConfig for the rank rows of trained adapters.

    Those with wgmma are the ones that an H100 found fastest; the others were decided by registers.
    kernels/README.md has the figures.

    Args:
        pairs: of rows and places; at most so many belong to the adapters.
        adapters: that are trained.
        rank_blocks: of 16 rank rows that they have together.
        columns: C of v.
        itemsize: bytes of an element of v: 2, or 4 for fp32.
        architecture: of the device.
        batch_invariant: choose without looking at the batch and at what else is trained, so that an
            adapter's bits do not depend on them.
    """
    cores = architecture.tensor_cores
    half = itemsize <= 2 and cores != "none"
    # Groups are of one adapter, and those of small ranks would be padded.
    mean = rank_blocks // max(1, adapters)
    group = 1 if batch_invariant or mean < 2 else 2 if mean == 2 else 4
    if not half:
        # Products of 64 columns would be TF32 on sm_100 (triton #10176).
        tile = {"group": 1, "block_p": 16, "block_c": 32, "warps": 4, "stages": 2}
    elif cores in ("mma", "mfma") and group > 1:
        # Both operands fill registers.
        tile = {"group": group, "block_p": 32, "block_c": 256 // group, "warps": 4, "stages": 3}
    elif cores == "wgmma":
        # Of five stages two and a half are under way: each step waits for its pairs.
        deep = group == 4 or (not batch_invariant and pairs >= 512 * max(1, adapters))
        tile = {"group": group, "block_p": 32, "block_c": 256, "warps": 8 if group == 4 else 4}
        tile["stages"] = 5 if deep else 2
    else:
        warps = 8 if group == 4 else 4
        tile = {"group": group, "block_p": 64, "block_c": 128, "warps": warps, "stages": 3}
    programs = -(-columns // tile["block_c"])
    most = 4
    if not batch_invariant:
        programs *= max(1, -(-rank_blocks // tile["group"]))
        # An adapter's part of the sum is as many bytes, written and read, as a step loads of v.
        most = pairs // (max(1, adapters) * 4 * tile["block_p"])
    split = 1
    while 2 * split <= min(most, 8) and 2 * split * programs <= architecture.processors:
        split *= 2
    registers = None if cores == "mfma" else 255
    return GradientConfig(split=split, registers=registers, **tile)
