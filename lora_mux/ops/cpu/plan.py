"""The form for the CPU: a batch becomes a few products, each over many rows and adapters.

    y[m] += sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),    i = slots[m, j]

A batch is cut into groups of rows and slots (groups.py), and a group becomes one product or a
few in each layer, by the ranks that its slots have there.

Products are fp32, or bf16 on a CPU that has instructions for it; then h is rounded to bf16, as in
PEFT, and inner dimensions are even. Autocast changes none of that. y is rounded once. There are no
gradients: where autograd follows, the reference computes.

What depends on the routing is found once for all layers that hold the same adapters. What depends
on a pool is found once until its rank rows are written or moved: where the base layer has emptied
the caches, each step from Python costs 2 to 10 us (docs/benchmarks.md, "As a module").
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ...core import AnyPool, Span, Version, computed_once
from .. import reference
from ..forms import tracked
from .groups import Doubles, Group, Ints, all_with_all, by_slot, multiplies_all

Rows: TypeAlias = slice | Tensor  # of a tensor: those that follow one another, or int64 [n]
Factors: TypeAlias = tuple[Tensor, Tensor]  # A^T [G, K, R] and B [G, R, N] of a Product

# Elements of x and y that are moved at once: 4 MB in fp32 stay in a cache.
MOVED = 1 << 20
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a number


@functools.cache
def bf16_is_fast() -> bool:
    """Whether this CPU has instructions for products of bf16; AMX comes with those of AVX512."""
    # Not public, so that it may be missing: products are fp32 then.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def _even(size: int, dtype: torch.dtype) -> int:
    """How long a product's inner dimension of that size is made.

    With AMX, oneDNN takes bf16 by twos and reads one element beyond an odd inner dimension: the
    next row's first, times 0, which is NaN if that is not finite. torch.mm does so as well.
    """
    return size + size % 2 if dtype == torch.bfloat16 else size


class Blocks(NamedTuple):
    """As many rank rows of each slot, that a view of the pool shows."""

    first: int
    step: int  # from where one slot's begin to where the next one's do


def blocks_of(rank_rows: Ints, G: int) -> Blocks | Tensor:
    """The rank rows of G slots as what takes them fastest."""
    each = rank_rows.reshape(G, -1)
    steps = np.diff(each[:, 0])
    even = (steps > 0).all() and (steps[1:] == steps[:-1]).all()
    if even and (np.diff(each) == 1).all():
        return Blocks(int(each[0, 0]), int(steps[0]) if G > 1 else each.shape[1])
    return torch.from_numpy(rank_rows)


def block(
    table: Tensor, where: Blocks | Tensor, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Rank rows [G, R, width] of a pool; a view where there are Blocks, and the dtype fits."""
    row, one = table.stride()
    if isinstance(where, Blocks):
        first, strides = where.first * row, (where.step * row, row, one)
        return table.as_strided(shape, strides, first).to(dtype)
    held = table.index_select(0, where).to(dtype)
    return held.as_strided(shape, (shape[1] * row, row, one))


class Product(NamedTuple):
    """What a Group adds in a layer where its J slots have R rank rows: y += alpha * h B.

    In bf16 R is even: an odd number of rank rows is followed by the last one again, masked.
    """

    shape: tuple[int, int, int]  # G, m, R; tensors have no dimension G where G = 1
    rows: Rows | None  # [G * m] of x and y; None = all, in order
    rank_rows: Blocks | Tensor  # [G * R] of the pool
    constant: Tensor | None  # [G, 1, R] bool: biases, whose h is 1; None = none is
    alpha: float  # weight * scaling where it is the same for all
    strength: Tensor | None  # [G, m, R] weight * scaling where it is not
    mask: Tensor | None  # [G, m, R] int as wide as h: -1 = selected, 0 = not; None = all are

    def factors(self, pool: AnyPool, dtype: torch.dtype) -> Factors:
        """A^T and B; views of the pool where dtype and the order of rank rows allow it."""
        (G, _, R), N = self.shape, pool.out_features
        K = _even(pool.in_features, dtype)
        A = block(pool.A_rows, self.rank_rows, (G, R, K), dtype).mT
        B = block(pool.B_rows, self.rank_rows, (G, R, N), dtype)
        return (A, B) if G > 1 else (A[0], B[0])

    def add_to(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
        """y[rows] += alpha * (x[rows] A, scaled and masked) B, for its factors."""
        (G, m, _), rows = self.shape, self.rows
        if rows is not None:
            x = taken(x, rows)
        if G > 1:
            x = x.view(G, m, x.shape[1])
        multiply = torch.bmm if G > 1 else torch.mm
        h = multiply(x, A)
        if self.constant is not None:
            h.masked_fill_(self.constant, 1.0)
        if self.strength is not None:
            h.mul_(self.strength)
        if self.mask is not None:
            # Selected, not multiplied by 0: what a row did not ask for may be infinite. By bits,
            # because masked_fill_ is no vector code: 350 us against 40 for [1024, 256] in fp32.
            h.view(self.mask.dtype).bitwise_and_(self.mask)
        if isinstance(rows, Tensor):
            added = multiply(h, B).flatten(0, -2).to(y.dtype)
            y.index_add_(0, rows, added, alpha=self.alpha)
            return
        if rows is not None:
            y = y[rows]
        if y.dtype != h.dtype:
            y.add_(multiply(h, B).flatten(0, -2), alpha=self.alpha)
        elif G > 1:
            y.view(G, m, y.shape[1]).baddbmm_(h, B, alpha=self.alpha)
        else:
            y.addmm_(h, B, alpha=self.alpha)


class Prepared(NamedTuple):
    """A plan in one pool, with all that can be done before a call."""

    A_rows: Tensor  # the pool's; torch.func.functional_call puts others there
    B_rows: Tensor
    given: tuple[torch.dtype, torch.dtype]  # of x and y
    dtype: torch.dtype  # of the products
    widening: int  # columns of zeros that x gets
    sums: torch.dtype  # of y while products are added to it
    products: list[tuple[Product, Factors | None]]  # None = to be copied for each call


@dataclass(frozen=True, eq=False)
class Plan:
    """What the rows of a batch select."""

    weight: Tensor  # [M, J]
    slots: Tensor  # [M, J] int64, -1 = none
    # By dtype, sizes and spans: layers that are alike share them.
    _products: dict[object, list[Product]] = field(default_factory=dict, init=False)
    _prepared: WeakKeyDictionary[Version, Prepared] = field(
        default_factory=WeakKeyDictionary, init=False
    )

    @property
    def strength(self) -> Tensor:
        """weight [M, J]."""
        return self.weight

    def with_strength(self, strength: Tensor) -> "Plan":
        """The plan with another tensor of equal values there."""
        return replace(self, weight=strength)

    def touches(self, pool: AnyPool) -> bool:
        """Whether a row selects what is in a pool."""
        return any(pool.span(slot) is not None for slot in self.used)

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan.

        Rows that select none keep every bit.
        """
        if torch.is_autocast_enabled("cpu"):  # it would compute products in a dtype of its own
            with torch.autocast("cpu", enabled=False):
                return self.add(y, x, pool, owned)
        if tracked(y, x, self.weight):
            return self.reference.add(y, x, pool, owned)
        if y.ndim != 2:
            y_rows, x_rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            return self.add(y_rows, x_rows, pool, owned).reshape(y.shape)
        _, _, (_, given), dtype, widening, sums, products = self._in(pool, x.dtype, y.dtype)
        if x.dtype != dtype:
            x = x.to(dtype)
        if widening:
            x = pad(x, (0, widening))
        out = y if owned and given == sums else y.to(sums, copy=True)
        for product, factors in products:
            product.add_to(out, x, *(factors or product.factors(pool, dtype)))
        if sums == given:
            return out
        rounded = out.to(given)
        return rounded if self.selecting is None else torch.where(self.selecting, rounded, y)

    @computed_once
    def reference(self) -> reference.Plan:
        """The same for the reference."""
        return reference.plan(self.slots, self.weight)

    @computed_once
    def selecting(self) -> Tensor | None:
        """[M, 1] bool: the rows that select an adapter; None = all do."""
        some = (self.slots >= 0).any(1, keepdim=True)
        return None if bool(some.all()) else some

    @computed_once
    def selections(self) -> tuple[Ints, Ints, Doubles]:
        """(row, slot, weight) of each."""
        slots, weight = self.slots.numpy(), self.weight.detach().double().numpy()
        row, place = np.nonzero(slots >= 0)
        return row, slots[row, place], weight[row, place]

    @computed_once
    def rows(self) -> int:
        """How many rows select an adapter."""
        return len(np.unique(self.selections[0]))

    @computed_once
    def used(self) -> list[int]:
        """The slots that any row selects."""
        used: list[int] = np.unique(self.selections[1]).tolist()
        return used

    def _in(self, pool: AnyPool, x: torch.dtype, y: torch.dtype) -> Prepared:
        """What is prepared in a pool for x and y of these dtypes."""
        version = pool.version  # read once: another thread may write to the pool meanwhile
        known = self._prepared.get(version)
        buffers = pool._buffers  # nn.Module's own look-up takes 10 us where caches are cold
        if (
            known is None
            or known.A_rows is not buffers["A_rows"]
            or known.B_rows is not buffers["B_rows"]
            or known.given != (x, y)
        ):
            known = self._prepared[version] = self._prepare(pool, x, y)
        return known

    def _prepare(self, pool: AnyPool, x: torch.dtype, y: torch.dtype) -> Prepared:
        A_rows, B_rows = pool.A_rows, pool.B_rows
        bf16 = x == y == A_rows.dtype == torch.bfloat16 and bf16_is_fast()
        dtype = x if bf16 else torch.promote_types(x, torch.float32)
        selections = len(self.selections[0])
        whole = multiplies_all(self.rows, len(self.used), selections, bf16)
        # Each row is rounded once: bf16 cannot hold the sum of several products.
        one_each = whole or self.rows == selections
        sums = dtype if one_each else torch.promote_types(dtype, torch.float32)

        sizes = pool.in_features, pool.out_features
        spans = {slot: span for slot in self.used if (span := pool.span(slot)) is not None}
        key = dtype, sizes, tuple(spans.items())
        if key not in self._products:
            groups = [all_with_all(*self.selections)] if whole else by_slot(*self.selections)
            self._products[key] = [
                product
                for group in groups
                for product in _products(group, spans, sum(sizes), dtype, len(self.slots))
            ]
        # Views are kept, copies are not.
        views = A_rows.dtype == dtype
        products = [
            (p, p.factors(pool, dtype) if views and isinstance(p.rank_rows, Blocks) else None)
            for p in self._products[key]
        ]
        widening = _even(pool.in_features, dtype) - pool.in_features
        return Prepared(A_rows, B_rows, (x, y), dtype, widening, sums, products)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.weight, self.slots)  # a copy prepares for pools of its own


def _products(
    group: Group, spans: Mapping[int, Span], width: int, dtype: torch.dtype, M: int
) -> Iterator[Product]:
    """A group in a layer: cut where ranks differ, and by what is moved at once.

    Args:
        spans: of the slots that have any in this layer.
        width: of x and y together.
        M: the rows of the whole batch.
    """
    alike: dict[tuple[int, ...], list[int]] = {}  # members by the ranks that their slots have here
    for g, slots in enumerate(group.slots.tolist()):
        ranks = tuple(spans[slot].rank if slot in spans else 0 for slot in slots)
        if any(ranks):
            alike.setdefault(ranks, []).append(g)
    moved = group.rows.shape[1] * width  # by each member
    at_once = max(1, MOVED // moved)
    for ranks, members in alike.items():
        here = np.flatnonzero(ranks)
        for start in range(0, len(members), at_once):
            yield _product(group.part(members[start : start + at_once], here), spans, dtype, M)


def _product(group: Group, spans: Mapping[int, Span], dtype: torch.dtype, M: int) -> Product:
    """A group in a layer that has spans of all its slots, the j-th of each with the same rank."""
    slots, rows, weight, selects = group
    if len(slots) == 1:  # rows whose slots are all in other layers keep their bits
        some = selects[0].any(1)
        rows, weight, selects = rows[:, some], weight[:, some], selects[:, some]
    (G, m), found = rows.shape, [[spans[slot] for slot in member] for member in slots.tolist()]
    ranks = [span.rank for span in found[0]]
    odd = _even(sum(ranks), dtype) - sum(ranks)  # 1: the last rank row stands there once more

    def for_rank_rows(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
        """[G, ., J] -> [G, ., R]"""
        spread = np.repeat(values, [*ranks[:-1], ranks[-1] + odd], 2)
        return torch.from_numpy(spread if G > 1 else spread[0]).to(dtype)

    strength = weight * [[[span.scaling for span in member]] for member in found]
    wanted = strength[selects]
    # torch takes no number as alpha that y cannot hold; in a tensor it is infinite.
    equal = bool((wanted == wanted[0]).all()) and abs(wanted[0]) <= torch.finfo(dtype).max
    mask = None
    if odd or not selects.all():
        mask = for_rank_rows(-selects.astype(np.int8), INTS[dtype.itemsize])
        mask[..., sum(ranks) :] = 0
    in_order = [span for member in found for span in member]
    rank_rows = np.concatenate([np.arange(s.offset, s.offset + s.rank) for s in in_order])
    constant = np.zeros(len(rank_rows), np.bool_)
    constant[np.cumsum([span.rank for span in in_order]) - 1] = [span.bias for span in in_order]
    if odd:
        rank_rows, constant = (_last_twice(v.reshape(G, -1)) for v in (rank_rows, constant))
    biases = torch.from_numpy(constant).view((G, 1, -1) if G > 1 else (1, -1))
    every = np.array_equal(rows.ravel(), np.arange(M))
    return Product(
        shape=(G, m, sum(ranks) + odd),
        rows=None if every else rows_of(rows.ravel()),
        rank_rows=blocks_of(rank_rows, G),
        constant=biases if constant.any() else None,
        alpha=float(wanted[0]) if equal else 1.0,
        strength=None
        if equal
        else for_rank_rows(strength, torch.promote_types(dtype, torch.float32)),
        mask=mask,
    )


def _last_twice(values: NDArray[Any]) -> NDArray[Any]:
    """[G, R] -> [G * (R + 1)]"""
    return np.concatenate((values, values[:, -1:]), 1).ravel()


def rows_of(rows: Ints) -> Rows:
    """The numbers of rows as what takes them fastest."""
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def taken(table: Tensor, rows: Rows) -> Tensor:
    """Those rows of a table."""
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)
