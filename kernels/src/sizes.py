"""What launchers derive from sizes: grids, windows, and how wide rows may be loaded."""

from math import gcd

from torch import Tensor

from .config import Limits, TileSizes
from .rank_blocks import RANK_BLOCK, WIDEST


def unit(tensor: Tensor) -> int:
    """The largest power of two, up to 16, that divides the columns and the row stride."""
    return gcd(tensor.shape[1], tensor.stride(0), 16)


def groups(U: int, R: int, config: TileSizes, most: int) -> int:
    """Programs of shrink for a tile and split: one for each group of blocks, up to `most`."""
    wanted = cdiv(U * (R // RANK_BLOCK.value), config.shrink_group)
    return min(wanted, max(1, most))


def registers(config: Limits, unit: int) -> dict[str, int]:
    """A limit for the compiler; only NVIDIA's knows the option.

    Rows that are read element by element need more: as many as there are.
    """
    if config.registers is None:
        return {}
    return {"maxnreg": config.registers if unit >= 8 else 255}


def stages(most: int, width: int) -> int:
    """How many tiles of x are under way at once.

    Rows that are read two bytes at a time pass through registers, and more than one tile of them
    does not fit: sm_100 spills 88 bytes.

    Args:
        most: of rows that the card copies by itself, at least four bytes at a time.
        width: bytes that are read at once.
    """
    return most if width >= 4 else 1


def window(U: int) -> int:
    """How much of a union the kernels search at once."""
    widest: int = WIDEST.value
    return min(widest, max(16, power(U)))


def slots(S: int) -> int:
    """How many slots' ranks and offsets a program holds; 0 = it asks for those that it needs."""
    return max(16, power(S)) if S <= WIDEST.value else 0


def cdiv(n: int, block: int) -> int:
    """n / block, rounded up: triton.cdiv takes 2.6 us a call, a sixteenth of a whole launch."""
    return -(-n // block)


def power(n: int) -> int:
    """The next power of two, or n itself: triton.next_power_of_2 takes as long."""
    return 1 << (n - 1).bit_length()
