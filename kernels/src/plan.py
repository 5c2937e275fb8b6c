"""plan: what the rows of each tile select, computed once per forward pass for all layers.

    slots[m, j] = slot of the handle index[m, j], or -1
    union[t, :length[t]] = sorted({slots[m, j] : m in tile t, slots[m, j] >= 0})
    place[t, u, m] = min {j : slots[t * BLOCK_M + m, j] = union[t, u]}, or -1 when there is none
    strength[m, j] = sum of weight[m, j'] over the j' with slots[m, j'] = slots[m, j], for a first j
    state[m] = BASE: row m selects nothing; SELECTS: an adapter; DEAD: a handle that is not alive
    counters = 0: fused launches of this forward pass count in them, those of each stream apart

A handle is generation << 16 | slot; live[slot] is the handle of the slot's present tenant, or -1.
It needs no sync and no atomics, and sizes come from shapes alone, so it can be captured in a CUDA
graph.
"""

import triton
import triton.language as tl

from . import tensors

SLOT_MASK = tl.constexpr(tensors.SLOT_MASK)
BASE, SELECTS, DEAD = (tl.constexpr(n) for n in (tensors.BASE, tensors.SELECTS, tensors.DEAD))
COUNTERS = tl.constexpr(tensors.COUNTERS)
ALL_COUNTERS = tl.constexpr(tensors.STREAMS * tensors.COUNTERS)


@triton.jit(do_not_specialize=["M", "U"])
def plan_kernel(
    index_ptr,  # [M, J] int32 or int64: handles, -1 = none
    weight_ptr,  # [M, J] floating
    live_ptr,  # [65536] int32
    plan,  # a Plan, written: strength where place points to, union and place up to length
    M,
    J,
    U,
    stride_im,
    stride_ij,
    stride_wm,
    stride_wj,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,  # a power of two, at least J
    BLOCK_U: tl.constexpr,
):
    """One tile's rows x BLOCK_U places of its union; the sort is cheap enough to be repeated."""
    pid_m = tl.program_id(0).to(tl.int64)
    pid_u = tl.program_id(1)
    tile_m = tl.arange(0, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tile_m
    offs_j = tl.arange(0, BLOCK_J)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_j < J)[None, :]
    # [BLOCK_M, BLOCK_J]
    handle = tl.load(
        index_ptr + offs_m[:, None] * stride_im + offs_j[None, :] * stride_ij, mask=mask, other=-1
    ).to(tl.int64)
    weight = tl.load(
        weight_ptr + offs_m[:, None] * stride_wm + offs_j[None, :] * stride_wj,
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    # Masked to 16 bits any handle, a negative one too, stays inside the table.
    live = tl.load(live_ptr + (handle & SLOT_MASK), mask=mask, other=-1)
    alive = (live == handle) & (handle >= 0)
    slots = tl.where(alive, handle & SLOT_MASK, -1).to(tl.int32)

    # [BLOCK_M * BLOCK_J]
    ordered = tl.sort(tl.reshape(slots, [BLOCK_M * BLOCK_J]))
    offs = tl.arange(0, BLOCK_M * BLOCK_J)
    first = (ordered >= 0) & (
        (offs == 0) | (ordered != tl.gather(ordered, tl.maximum(offs - 1, 0), axis=0))
    )
    position = tl.cumsum(first.to(tl.int32), axis=0) - 1
    length = tl.sum(first.to(tl.int32))

    if pid_u == 0:
        dead = (alive == 0) & (handle != -1)
        state = tl.max(tl.where(dead, DEAD, tl.where(alive, SELECTS, BASE)), axis=1)
        # Within the tile 32 bits are enough. With 64, a sort of 4,096 spills (sm_80, triton 3.8).
        at = tile_m[:, None] * J + offs_j[None, :]
        tl.store(plan.slots + pid_m * BLOCK_M * J + at, slots, mask=mask)
        tl.store(plan.state + offs_m, state.to(tl.int8), mask=mask_m)
        tl.store(plan.union + pid_m * U + position, ordered, mask=first)
        tl.store(plan.length + pid_m, length)
        if pid_m == 0:
            tl.store(plan.counters + tl.arange(0, ALL_COUNTERS), 0)

    for u in range(pid_u * BLOCK_U, tl.minimum(length, (pid_u + 1) * BLOCK_U)):
        slot = tl.sum(tl.where(first & (position == u), ordered, 0))
        here = slots == slot
        place = tl.min(tl.where(here, offs_j[None, :], BLOCK_J), axis=1)
        selects = place < BLOCK_J
        # Selected, not multiplied by 0: the weight of another place may be NaN.
        strength = tl.sum(tl.where(here, weight, 0.0), axis=1)
        tl.store(plan.strength + offs_m * J + place, strength, mask=selects)
        place_tile = plan.place + (pid_m * U + u) * BLOCK_M
        tl.store(place_tile + tile_m, tl.where(selects, place, -1).to(tl.int16))
