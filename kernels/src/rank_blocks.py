"""Rank blocks: the rank rows of a tile's union in blocks of 16, whatever the adapters' ranks.

The adapters of a union lie one after the other: an adapter of rank r has cdiv(r, RANK_BLOCK)
blocks, one that leaves this layer alone has none. A program takes GROUP blocks at once, of one
adapter or of several, so that x is loaded once for all of them. What shrink and expand share to
find them stands here.
"""

import triton
import triton.language as tl

# The least that a tensor core takes: K = 16 of expand's product (16-bit types), N = 16 on AMD.
RANK_BLOCK = tl.constexpr(16)


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
    """Where blocks [GROUP] are: (position in the union, first rank row within the adapter)."""
    # [GROUP, BLOCK_U]
    before = ends[None, :] <= block[:, None]
    start = tl.max(tl.where(before, ends[None, :], 0), axis=1)
    return tl.sum(before.to(tl.int32), axis=1), (block - start) * RANK_BLOCK
