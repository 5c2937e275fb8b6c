"""Tensors that belong together: operators, launchers and kernels hand them on whole.

In a kernel they are pointers under the same names. Importing this file needs neither Triton nor
torch: operators are defined from these fields where Triton is missing, and
tests/support/codegen.py compiles the kernels where torch is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SLOT_MASK = 0xFFFF  # a handle is generation << 16 | slot
# Plan.state of a row: it selects nothing; it selects adapters; it names a handle that is not alive.
BASE, SELECTS, DEAD = 0, 1, 2
# Bytes. Kernels are compiled for pointers that are multiples of it, and once more for any other;
# torch allocates at multiples of 64 and more.
ALIGNMENT = 16
# Fused launches of one forward pass may be on 64 streams. Each has counters of its own: 16 bytes,
# of which the first two numbers are used.
STREAMS, COUNTERS = 64, 4
# The least that a tensor core takes: K = 16 of expand's product (16-bit types), N = 16 on AMD.
RANK_BLOCK = 16
ITEM = 5  # numbers of an item of the weight gradient: see pairs.items_of


class Plan(NamedTuple):
    """What the rows of a batch select, for all layers of a forward pass; formulas are in plan.py.

    M rows have J places each, and lie in T tiles of BLOCK_M rows; U is room for a tile's union.
    """

    slots: Tensor  # [M, J] int32, -1 = none
    strength: Tensor  # [M, J] at least fp32, at the first place of each slot in a row
    union: Tensor  # [T, U] int32, up to length
    length: Tensor  # [T] int32
    place: Tensor  # [T, U, BLOCK_M] int16, -1 = not selected; up to length
    state: Tensor  # [M] int8: BASE, SELECTS or DEAD
    counters: Tensor  # [STREAMS, COUNTERS] int32 zeros; fused launches leave them 0

    @property
    def block_m(self) -> int:
        """The rows of a tile."""
        return self.place.shape[2]


class Pool(NamedTuple):
    """The adapters of a layer: slot i has the rank rows offset[i] .. offset[i] + rank[i] - 1.

    Rows of A begin every stride(0) >= K elements, with zeros from K on; those of B likewise.

    Or B stands by columns, as engines keep it: in blocks of R rank rows, a multiple of 8, each with
    one adapter from its first row on. What lies past a rank, up to a multiple of 8, must be finite
    there, since it is multiplied by 0. Only expand reads B so.
    """

    A_rows: Tensor  # [C, at least K]
    B_rows: Tensor  # [C, at least N]; or [C / R, N, R] without gaps
    constant: Tensor | None  # [C] bool: a rank row that carries a bias; None = no row does
    offset: Tensor  # [S] int32
    rank: Tensor  # [S] int32
    scaling: Tensor  # [S] at least fp32


def tiles_and_union(rows: int, places: int, capacity: int, block_m: int) -> tuple[int, int]:
    """(T, U) of a Plan: one more than the tiles, and the most slots that a union can hold.

    One tile more, so that T is not 1 for few rows and 2 or more for others: torch.export and
    dynamic graphs would make that two cases.

    Args:
        capacity: of the slots; more than any slot in use.
    """
    import torch

    most: int = torch.sym_min(block_m * places, capacity)  # type: ignore[no-untyped-call]
    union: int = torch.sym_max(most, 1)  # type: ignore[no-untyped-call]
    return (rows + block_m - 1) // block_m + 1, union


def empty_plan(index: Tensor, weight: Tensor, capacity: int, block_m: int) -> Plan:
    """A Plan for index and weight [M, J], whose tensors hold nothing yet."""
    import torch

    M, J = index.shape
    T, U = tiles_and_union(M, J, capacity, block_m)
    return Plan(
        slots=index.new_empty((M, J), dtype=torch.int32),
        strength=weight.new_empty((M, J), dtype=torch.promote_types(weight.dtype, torch.float32)),
        union=index.new_empty((T, U), dtype=torch.int32),
        length=index.new_empty((T,), dtype=torch.int32),
        place=index.new_empty((T, U, block_m), dtype=torch.int16),
        state=index.new_empty((M,), dtype=torch.int8),
        counters=index.new_empty((STREAMS, COUNTERS), dtype=torch.int32),
    )
