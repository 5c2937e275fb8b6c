"""Rank blocks: the rank rows of a tile's union in blocks of 16, whatever the adapters' ranks.

The adapters of a union lie one after the other: an adapter of rank r has cdiv(r, RANK_BLOCK)
blocks, one that leaves this layer alone has none. A program takes GROUP blocks at once, of one
adapter or of several, so that x is loaded once for all of them. This file holds how shrink, expand
and fused find them.

Finding them waits for memory once. `ask` loads the union, the whole tables of a small pool and the
places, none of which waits for another; what is searched after that is in registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import tensors

RANK_BLOCK = tl.constexpr(tensors.RANK_BLOCK)
# The widest window of a union, and the most slots whose tables a program holds: what is searched
# at once has to fit the registers.
WIDEST = tl.constexpr(64)
# Places of a tile that a program holds, 4 for each of its threads.
MOST_PLACES = tl.constexpr(512)


class Sizes(NamedTuple):
    """The sizes of a batch and of a pool: h is [M, J, R, SPLIT_K]."""

    M: tl.tensor  # rows
    J: tl.tensor  # places of a row
    R: tl.tensor  # a multiple of RANK_BLOCK, at least every rank
    U: tl.tensor  # room for a tile's union
    S: tl.tensor  # slots of the pool


class Asked(NamedTuple):
    """A window of a tile's union and what the pool says of slots, on their way from memory."""

    length: tl.tensor  # of the union from here on, which may be longer than the window
    union: tl.tensor  # [BLOCK_U]; anything from length on
    place: tl.tensor  # [BLOCK_M, BLOCK_U] likewise; or a pointer to [BLOCK_M, 1]
    rank: tl.tensor  # [SLOTS], or a pointer
    offset: tl.tensor  # likewise


class Window(NamedTuple):
    """The rank blocks of a window; the fields that are no scalars are [BLOCK_U]."""

    slot: tl.tensor  # anything from length on, but a slot
    ends: tl.tensor  # how many blocks the slots up to this one have
    total: tl.tensor
    packed: tl.tensor  # what a block needs of its slot: see `search`


class Blocks(NamedTuple):
    """GROUP rank blocks of a window; each field is [GROUP]."""

    exists: tl.tensor  # else it lies past the last one
    u: tl.tensor  # its slot's position in the window
    first: tl.tensor  # its first rank row within the adapter
    row: tl.tensor  # and in the pool
    left: tl.tensor  # rank rows of the adapter from there on


@triton.jit
def table(pointer, S, SLOTS: tl.constexpr):
    """A table of the pool, where it is small; else its pointer, for `of_slots` to ask."""
    if SLOTS:
        offs_s = tl.arange(0, SLOTS)
        return tl.load(pointer + offs_s, mask=offs_s < S, other=0)
    else:
        return pointer


@triton.jit
def of_slots(known, slot, exists, SLOTS: tl.constexpr):
    """What a table says of slots; 0 where they do not exist."""
    if SLOTS:
        return tl.where(exists, tl.gather(known, slot, axis=0), 0)
    else:
        return tl.load(known + slot, mask=exists, other=0)


@triton.jit
def ask(
    plan,
    pool,
    sizes,
    pid_m,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The window of the union of tile pid_m (int64) that begins at `window`."""
    offs_u, tile_m = tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_M)
    inside = window + offs_u < sizes.U
    union_tile = plan.union + pid_m * sizes.U + window
    place = plan.place + (pid_m * sizes.U + window) * BLOCK_M + tile_m[:, None]
    # Not masked by length, which is on its way.
    union = tl.load(union_tile + offs_u, mask=inside, other=0)
    length = tl.load(plan.length + pid_m) - window
    rank = table(pool.rank, sizes.S, SLOTS)
    offset = table(pool.offset, sizes.S, SLOTS)
    if BLOCK_M * BLOCK_U <= MOST_PLACES:
        place = tl.load(place + offs_u[None, :] * BLOCK_M, mask=inside[None, :], other=-1)
    return Asked(length, union, place, rank, offset)


@triton.jit
def search(asked, BLOCK_U: tl.constexpr, SLOTS: tl.constexpr):
    """The rank blocks of a window."""
    exists = tl.arange(0, BLOCK_U) < asked.length
    slot = tl.where(exists, asked.union, 0)
    rank = of_slots(asked.rank, slot, exists, SLOTS)
    offset = of_slots(asked.offset, slot, exists, SLOTS)
    blocks = (rank + RANK_BLOCK - 1) // RANK_BLOCK
    ends = tl.cumsum(blocks, axis=0)
    # As one number, since each look-up is a step through shared memory.
    packed = (offset.to(tl.int64) << 32) | (ends - blocks).to(tl.int64) << 16 | rank
    return Window(slot, ends, tl.sum(blocks, axis=0), packed)


@triton.jit
def find_blocks(start, window, BLOCK_U: tl.constexpr, GROUP: tl.constexpr):
    """Blocks start .. start + GROUP - 1 of a window."""
    block = start + tl.arange(0, GROUP)
    exists = block < window.total
    # Those past the last block have all of the union before them.
    before = (window.ends[None, :] <= block[:, None]).to(tl.int32)  # [GROUP, BLOCK_U]
    u = tl.minimum(tl.sum(before, axis=1), BLOCK_U - 1)
    packed = tl.gather(window.packed, u, axis=0)
    first = (block - (packed >> 16 & 0xFFFF).to(tl.int32)) * RANK_BLOCK
    row = (packed >> 32).to(tl.int32) + first
    left = tl.where(exists, (packed & 0xFFFF).to(tl.int32) - first, 0)
    return Blocks(exists, u, first, row, left)


@triton.jit
def find_places(blocks, asked, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, GROUP: tl.constexpr):
    """[BLOCK_M, GROUP]: the place at which each row selects a block's slot, or -1."""
    if BLOCK_M * BLOCK_U <= MOST_PLACES:
        which = tl.broadcast_to(blocks.u[None, :], [BLOCK_M, GROUP])
        place = tl.gather(asked.place.to(tl.int32), which, axis=1)
        return tl.where(blocks.exists[None, :], place, -1)
    else:
        place_rows = asked.place + blocks.u[None, :] * BLOCK_M
        return tl.load(place_rows, mask=blocks.exists[None, :], other=-1)


@triton.jit
def rank_rows(blocks, GROUP: tl.constexpr):
    """(rows of the pool, which of them are the adapters' own), each [GROUP * RANK_BLOCK]."""
    offs_b = tl.arange(0, RANK_BLOCK)
    row = blocks.row[:, None] + offs_b[None, :]
    own = blocks.left[:, None] > offs_b[None, :]
    return tl.reshape(row, [GROUP * RANK_BLOCK]), tl.reshape(own, [GROUP * RANK_BLOCK])
