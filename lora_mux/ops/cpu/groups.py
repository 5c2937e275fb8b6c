"""How the CPU's form cuts a batch: which rows and slots share a product.

Either all rows are multiplied with all adapters in use, and what a row did not select is masked: x
and y are read once, and no row is moved. Or the rows of each slot are brought side by side, and
slots with about as many rows share a batched product. This file knows no layer: ranks and sizes
come later.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Doubles: TypeAlias = NDArray[np.float64]

# For products in fp32, and in bf16, whose instructions are many times as fast while moving rows
# costs about the same: docs/benchmarks.md has the figures.
WANTED = (1 / 4, 1 / 16)  # all rows times all slots, where so large a share of it is wanted
FEW = (256, 1024)  # or where it is so little that nothing else is worth its calls
# Slots share a product when at most so many times the wanted rows are multiplied for it; from MANY
# rows on, a product by itself costs less than the padding.
PADDED, PADDED_MANY, MANY = 2.0, 1.25, 32


def multiplies_all(rows: int, slots: int, selections: int, bf16: bool) -> bool:
    """Whether one product of all rows with all slots in use is faster than products by slot.

    Args:
        rows: how many select an adapter.
        slots: how many distinct ones they select.
        selections: how many of all rows * slots are wanted.
        bf16: whether products are bf16, else fp32.
    """
    products = rows * slots
    return products <= FEW[bf16] or selections >= products * WANTED[bf16]


def sharing(counts: Ints) -> Ints:
    """A number for each slot, of which counts[u] rows are wanted: equal ones share a product."""
    most = int(counts.max())
    if most * len(counts) <= counts.sum() * (PADDED if most < MANY else PADDED_MANY):
        return np.zeros_like(counts)
    shared = (np.frexp(counts - 1)[1] + 1) // 2  # 1, 2 to 4, 5 to 16, .. rows
    alone = counts >= MANY
    shared[alone] = -1 - np.flatnonzero(alone)
    return shared


class Group(NamedTuple):
    """G times m rows of a batch; the m rows of one g select from the same J slots."""

    slots: Ints  # [G, J]
    rows: Ints  # [G, m]
    weight: Doubles  # [G, m, J]; of a slot that stands twice in a row the sum
    selects: Bools  # [G, m, J]

    def part(self, members: list[int], places: Ints) -> "Group":
        """Some of the G, with some of their J slots."""
        return Group(
            self.slots[members][:, places],
            self.rows[members],
            self.weight[members][:, :, places],
            self.selects[members][:, :, places],
        )


def all_with_all(row: Ints, slot: Ints, weight: Doubles) -> Group:
    """One product for all rows and slots, of which the pairs (row, slot) are wanted."""
    rows, slots = np.unique(row), np.unique(slot)
    weights, selects = np.zeros((len(rows), len(slots))), np.zeros((len(rows), len(slots)), bool)
    wanted = np.searchsorted(rows, row), np.searchsorted(slots, slot)
    np.add.at(weights, wanted, weight)
    selects[wanted] = True
    return Group(slots[None], rows[None], weights[None], selects[None])


def by_slot(row: Ints, slot: Ints, weight: Doubles) -> Iterator[Group]:
    """Products for slots that about equally many of the pairs (row, slot) want."""
    order = np.argsort(slot, kind="stable")
    slots, starts, counts = np.unique(slot[order], return_index=True, return_counts=True)
    shared = sharing(counts)
    for number in np.unique(shared):
        members = np.flatnonzero(shared == number)
        count = counts[members, None]
        place = np.arange(count.max())
        # A slot with fewer rows repeats its last one, which does not select it again.
        pairs = order[starts[members, None] + np.minimum(place, count - 1)]
        selects = (place < count)[:, :, None]
        yield Group(slots[members, None], row[pairs], weight[pairs][:, :, None], selects)
