"""Rank rows that move, and interrupts at every line of that."""

import itertools

import torch
from interrupts import interrupted
from torch import Tensor

from lora_mux.core import LoraWeights, Pool


def a_pool() -> tuple[Pool, dict[int, tuple[Tensor, Tensor]]]:
    """Slots 1 and 2 behind a hole of 2 rows; the 4 rows of slot 1 move over their own old ones."""
    pool = Pool(6, 5, torch.float32, torch.device("cpu"))
    pool.reserve(9, 4, 4)
    given = {}
    for slot, rank in ((0, 2), (1, 4), (2, 1)):
        A, B = torch.randn(rank, 6), torch.randn(5, rank)
        pool.write(slot, LoraWeights(A, B, 0.5, None), slots=4)
        given[slot] = A, B
    pool.erase([0])
    del given[0]
    return pool, given


def held(pool: Pool, slot: int) -> tuple[Tensor, Tensor]:
    """What kernels find."""
    rows = slice(int(pool.offset[slot]), int(pool.offset[slot] + pool.rank[slot]))
    return pool.A_rows[rows, :6], pool.B_rows[rows, :5].T


def test_a_move_is_finished_whatever_line_an_interrupt_hits() -> None:
    for line in itertools.count():
        pool, given = a_pool()
        ended = not interrupted(lambda pool=pool: pool.slide(1), line)
        pool.mend({1, 2})
        for slot, factors in given.items():
            for got, want in zip(held(pool, slot), factors, strict=True):
                assert torch.equal(got, want)
        # Nothing lies anywhere else, and what is free is known to be.
        assert pool.A_rows.any(1).sum() == pool.B_rows.any(1).sum() == 5
        assert pool.moving is None and pool.runs.free == len(pool.A_rows) - 5
        if ended:
            break
    assert line > 10 and pool.spans[1].offset == 0


def test_rows_that_lie_at_the_front_stay_where_they_are() -> None:
    pool, given = a_pool()
    pool.slide(1)
    version, before = pool.version, [buffer.clone() for buffer in pool.buffers()]
    pool.slide(1)
    assert pool.version is version and pool.spans[1].offset == 0
    for buffer, was in zip(pool.buffers(), before, strict=True):
        assert torch.equal(buffer, was)
    assert list(pool.runs) == [(4, 6), (7, len(pool.A_rows))]


def test_buffers_grow_together_whatever_line_an_interrupt_hits() -> None:
    """Else a slot's rank and scaling, or a row's two factors, would be of other sizes."""
    halves = 0
    for line in itertools.count():
        pool, given = a_pool()
        ended = not interrupted(lambda pool=pool: pool.reserve(100, 20, 4), line)
        sizes = {name: len(buffer) for name, buffer in pool.named_buffers()}
        halves += len({*sizes.values()} - {len(pool.A_rows), len(pool.rank)}) > 0
        pool.mend({1, 2})
        rows, slots = len(pool.A_rows), len(pool.rank)
        assert rows == len(pool.B_rows) == len(pool.constant) == pool.runs.capacity
        assert slots == len(pool.offset) == len(pool.scaling)
        for slot, factors in given.items():
            for got, want in zip(held(pool, slot), factors, strict=True):
                assert torch.equal(got, want)
        assert pool.runs.free == rows - 5
        if ended:
            break
    assert halves > 2 and (rows, slots) == (100, 20)
