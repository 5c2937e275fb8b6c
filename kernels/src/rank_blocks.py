"""Rank blocks: the rank rows of a tile's union in blocks of 16, whatever the adapters' ranks.

The adapters of a union lie one after the other: an adapter of rank r has cdiv(r, RANK_BLOCK)
blocks, one that leaves this layer alone has none. A program takes GROUP blocks at once, of one
adapter or of several, so that x is loaded once for all of them. This file holds how shrink and
expand find them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# The least that a tensor core takes: K = 16 of expand's product (16-bit types), N = 16 on AMD.
RANK_BLOCK = tl.constexpr(16)


class Sizes(NamedTuple):
    """The sizes of a batch: h is [SPLIT_K, M, J, R]."""

    M: tl.tensor  # rows
    J: tl.tensor  # places of a row
    R: tl.tensor  # a multiple of RANK_BLOCK, at least every rank
    U: tl.tensor  # room for a tile's union


class Blocks(NamedTuple):
    """GROUP rank blocks of a window of a tile's union; each field is [GROUP]."""

    exists: tl.tensor  # else it lies past the last one
    u: tl.tensor  # its slot's position in the window
    slot: tl.tensor
    first: tl.tensor  # its first rank row within the adapter
    rank: tl.tensor  # of the adapter
    offset: tl.tensor  # the adapter's first rank row in the pool


@triton.jit
def block_ends(union_ptr, length, rank_ptr, BLOCK_U: tl.constexpr):
    """ends[u] = how many blocks the slots union[:u + 1] have; the last one is the tile's total."""
    offs_u = tl.arange(0, BLOCK_U)
    mask_u = offs_u < length
    slot = tl.load(union_ptr + offs_u, mask=mask_u, other=0)
    rank = tl.load(rank_ptr + slot, mask=mask_u, other=0)
    return tl.cumsum((rank + RANK_BLOCK - 1) // RANK_BLOCK, axis=0)


@triton.jit
def locate(block, ends, total):
    """Where blocks [GROUP] are: (position in the window, first rank row within the adapter)."""
    # [GROUP, BLOCK_U]
    before = ends[None, :] <= block[:, None]
    start = tl.max(tl.where(before, ends[None, :], 0), axis=1)
    return tl.sum(before.to(tl.int32), axis=1), (block - start) * RANK_BLOCK


@triton.jit
def find_blocks(start, ends, total, union_ptr, pool, GROUP: tl.constexpr):
    """Blocks start .. start + GROUP - 1 of the window of a union that union_ptr points to."""
    block = start + tl.arange(0, GROUP)
    exists = block < total
    u, first = locate(block, ends, total)
    slot = tl.load(union_ptr + u, mask=exists, other=0)
    rank = tl.load(pool.rank + slot, mask=exists, other=0)
    offset = tl.load(pool.offset + slot, mask=exists, other=0)
    return Blocks(exists, u, slot, first, rank, offset)


@triton.jit
def rank_rows(blocks, GROUP: tl.constexpr):
    """(rows of the pool, which of them are the adapters' own), each [GROUP * RANK_BLOCK]."""
    offs_b = tl.arange(0, RANK_BLOCK)
    row = (blocks.offset + blocks.first)[:, None] + offs_b[None, :]
    own = (blocks.rank - blocks.first)[:, None] > offs_b[None, :]
    return tl.reshape(row, [GROUP * RANK_BLOCK]), tl.reshape(own, [GROUP * RANK_BLOCK])


@triton.jit
def find_places(blocks, window, place_ptr, BLOCK_M: tl.constexpr):
    """[BLOCK_M, GROUP]: the place at which each row selects a block's slot, or -1.

    place_ptr [BLOCK_M, 1] is where the rows' places of the union's first slot are.
    """
    place_rows = place_ptr + (window + blocks.u)[None, :] * BLOCK_M
    return tl.load(place_rows, mask=blocks.exists[None, :], other=-1).to(tl.int32)
