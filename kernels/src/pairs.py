"""Pairs: the rows of each trained adapter, found again from what the rows select.

A pair is a row and a place, (m, j), at which it selects an adapter. The pairs of one adapter lie
one after the other, in the order of the rows, so that a sum over them depends on nothing else in
the batch. They are found once for all layers of a pass.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import ITEM, RANK_BLOCK


class Pairs(NamedTuple):
    """The pairs of T trained adapters, which go by their numbers, 0 to T - 1.

    Those of t are pair[start[t]] .. pair[start[t + 1] - 1].
    """

    pair: Tensor  # [M * J] int32: m * J + j; behind the last adapter's come all the others
    start: Tensor  # [T + 1] int32


class Numbers(NamedTuple):
    """The numbers of trained adapters, by their slots."""

    number: Tensor  # [capacity + 1] int32: T for those that are not trained, and for -1, the last
    bounds: Tensor  # [T + 1] int32: 0 to T

    @classmethod
    def of(cls, trained: Tensor, capacity: int) -> "Numbers":
        """Those of trained [T] int32, slots that differ; capacity is more than any slot."""
        bounds = torch.arange(len(trained) + 1, dtype=torch.int32, device=trained.device)
        number = trained.new_full((capacity + 1,), len(trained))
        number[trained.long()] = bounds[:-1]
        return cls(number, bounds)


def pairs_of(slots: Tensor, trained: Tensor, capacity: int) -> Pairs:
    """The pairs of trained adapters: stable order, shapes alone, no sync, fit for a CUDA graph.

    A slot that a row names twice counts at its first place, where h and the strength are.

        slots    [[3, 7], [-1, -1], [7, 7], [5, 3]]     trained    [7, 3]
        pair     [1, 4, 0, 7, 2, 3, 5, 6]               start      [0, 2, 4]

    Args:
        slots: [M, J] int32, -1 = none.
        trained: [T] int32, slots that differ.
        capacity: more than any slot.
    """
    return pairs_by(slots, Numbers.of(trained, capacity))


def pairs_by(slots: Tensor, numbers: Numbers) -> Pairs:
    """`pairs_of` of slots [M, J] by numbers."""
    key = numbers.number[slots]
    if slots.shape[1] > 1:
        named_before = (slots[:, :, None] == slots[:, None, :]).tril(-1).any(2)
        key = torch.where(named_before, len(numbers.bounds) - 1, key)
    # What is not trained sorts behind the end.
    ordered, pair = key.flatten().sort(stable=True)
    return Pairs(pair.to(torch.int32), torch.searchsorted(ordered, numbers.bounds, out_int32=True))


def numbers_on(device: torch.device, trained: tuple[int, ...], capacity: int) -> Numbers:
    """The numbers of slots on a device; kept, as `items_on` keeps items."""
    numbers = _kept_numbers(device, trained, capacity)
    for tensor in numbers:
        hold_for_graphs(device, tensor)
    return numbers


@lru_cache(maxsize=64)
def _kept_numbers(device: torch.device, trained: tuple[int, ...], capacity: int) -> Numbers:
    made = Numbers.of(torch.tensor(trained, dtype=torch.int32), capacity)
    return Numbers(*(tensor.to(device) for tensor in made))


def items_of(
    ranks: Sequence[tuple[int, int]], group: int, constant: Sequence[int] = ()
) -> tuple[Tensor, int]:
    """What the host knows of the work: an item for each group of rank blocks of an adapter.

    Args:
        ranks: (number, rank rows) of each adapter that a layer trains.
        group: rank blocks that a program takes at once.
        constant: how many of each one's last rank rows get 0; () = none.

    Returns:
        Items [I, ITEM] int32 (the adapter's number, the item's first rank row in the adapter and in
        the result, how many are left from there, and how many of those are not constant), and the
        rows of the result.
    """
    items: list[tuple[int, ...]] = []
    row = 0
    for (number, rank), zeros in zip(ranks, constant or [0] * len(ranks), strict=True):
        for first in range(0, rank, RANK_BLOCK * group):
            left = rank - first
            items.append((number, first, row + first, left, left - zeros))
        row += rank
    return torch.tensor(items, dtype=torch.int32).reshape(-1, ITEM), row


# By their ids. A graph reads the items and numbers that it was captured with while it lives.
_CAPTURED: dict[int, Tensor] = {}


def items_on(
    device: torch.device,
    ranks: Sequence[tuple[int, int]],
    group: int,
    constant: Sequence[int] = (),
) -> Tensor:
    """The items of `items_of` on a device.

    They are kept, because a copy from the host waits for all that was launched before; while a
    graph is captured it may not be made at all.
    """
    items = _kept(device, tuple(ranks), group, tuple(constant))
    hold_for_graphs(device, items)
    return items


def hold_for_graphs(device: torch.device, kept: Tensor) -> None:
    """Let a graph that is being captured keep what it reads."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[id(kept)] = kept


@lru_cache(maxsize=1024)
def _kept(
    device: torch.device, ranks: tuple[tuple[int, int], ...], group: int, constant: tuple[int, ...]
) -> Tensor:
    return items_of(ranks, group, constant)[0].to(device)
