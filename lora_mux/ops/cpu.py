"""The fast form on the CPU: a batch cut into a few products, each over many rows and adapters.

    y[m] += sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),    i = slots[m, j]

Where enough of them is wanted, all rows are multiplied with all adapters in use, and what a row did
not select is masked: x and y are read once, and no row is moved. Else the rows of an adapter are
brought side by side, and adapters with about as many rows share a batched product.

Products are fp32, or bf16 on a CPU that has instructions for it; then h is rounded to bf16, as in
PEFT. y is rounded once. There are no gradients; where those are wanted the reference is used.

What depends on the routing is looked at once for all layers that hold the same adapters.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import Pool, Span
from . import reference

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Doubles: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = slice | Tensor  # of a tensor: those that follow each other, or int64 [n]
Factors: TypeAlias = tuple[Tensor, Tensor]  # A^T [G, K, R] and B [G, R, N] of a Part

# For products in fp32, and in bf16, whose instructions are many times as fast while moving rows
# costs about the same: docs/benchmarks.md has the figures.
DENSE = (1 / 4, 1 / 16)  # all are multiplied with all when so large a share of that is wanted
FEW = (256, 1024)  # or when it is so little that nothing else is worth its calls
# Adapters share a product when no more rows than so many times the wanted ones are multiplied;
# many rows are worth a product of their own.
PADDED, PADDED_MANY, MANY = 2.0, 1.25, 32
# Elements of x and y that are moved at once: 4 MB in fp32 stay in a cache.
MOVED = 1 << 20
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a number


@dataclass(frozen=True)
class Group:
    """G times m rows, each of which selects from the same J slots."""

    slots: Ints  # [G, J]
    rows: Ints  # [G, m]
    weight: Doubles  # [G, m, J]; of a slot that stands twice in a row the sum
    selects: Bools  # [G, m, J]


class Part(NamedTuple):
    """A Group in a layer, where its J slots have R rank rows; without a dimension G where G = 1."""

    size: tuple[int, int, int]  # G, m, R
    rows: Rows | None  # [G * m] of x and y; None = all, in order
    rank_rows: Rows  # [G * R] of the pool
    constant: Tensor | None  # [G, 1, R] bool: the biases; None = none is
    alpha: float  # weight * scaling where it is the same for all
    strength: Tensor | None  # [G, m, R] weight * scaling where it is not
    bits: Tensor | None  # [G, m, R] int as wide as h: -1 = selected, 0 = not; None = all are


class Cut(NamedTuple):
    """A batch in a layer."""

    parts: list[Part]
    sums: torch.dtype  # of y while parts are added to it


class Bound(NamedTuple):
    """A plan in one pool, with all that can be done before a call.

    Where the base layer has emptied the caches, each step from Python costs 2 to 10 us.
    """

    plan: "HostPlan"
    A_rows: Tensor  # the pool's; torch.func.functional_call puts others there
    B_rows: Tensor
    given: tuple[torch.dtype, torch.dtype]  # of x and y
    dtype: torch.dtype  # of the products
    sums: torch.dtype
    parts: list[tuple[Part, Factors | None]]  # None = are copied for each call


@dataclass(frozen=True)
class HostPlan:
    """What the rows of a batch select."""

    weight: Tensor  # [M, J]
    slots: Tensor  # [M, J] int64, -1 = none
    _cuts: dict[object, Cut] = field(default_factory=dict)

    @cached_property
    def reference(self) -> reference.Plan:
        """The same for the reference."""
        return reference.plan(self.slots, self.weight)

    @cached_property
    def partly(self) -> Tensor | None:
        """[M, 1] bool: the rows that select an adapter; None = all do."""
        some = (self.slots >= 0).any(1, keepdim=True)
        return None if bool(some.all()) else some

    @cached_property
    def used(self) -> list[int]:
        """The slots that any row selects."""
        slots = self.slots.numpy()
        used: list[int] = np.unique(slots[slots >= 0]).tolist()
        return used

    def cut(self, pool: Pool, dtype: torch.dtype) -> Cut:
        """The batch cut for a layer and products in dtype; layers that are alike share it."""
        sizes = pool.in_features, pool.out_features
        key = dtype, sizes, tuple(map(pool.spans.get, self.used))
        cut = self._cuts.get(key)
        if cut is None:
            spans = {slot: pool.spans[slot] for slot in self.used if slot in pool.spans}
            groups, repeated = self.groups(bf16=dtype == torch.bfloat16)
            parts = [p for group in groups for p in _parts(group, spans, dtype, sum(sizes))]
            every = slice(0, len(self.slots))
            parts = [p._replace(rows=None if p.rows == every else p.rows) for p in parts]
            # Each row is rounded once: bf16 can not hold the sum of several products.
            cut = Cut(parts, torch.promote_types(dtype, torch.float32) if repeated else dtype)
            self._cuts[key] = cut
        return cut

    def groups(self, bf16: bool) -> tuple[list[Group], bool]:
        """The batch cut for products in bf16 or fp32, and whether a row is in several groups."""
        slots, weight = self.slots.numpy(), self.weight.detach().double().numpy()
        row, place = np.nonzero(slots >= 0)
        pairs = row, slots[row, place], weight[row, place]
        rows = np.unique(row)
        products = len(rows) * len(self.used)
        if products <= FEW[bf16] or len(row) >= products * DENSE[bf16]:
            return [_dense(rows, np.array(self.used), *pairs)], False
        return list(_by_slot(*pairs)), len(rows) < len(row)


def _dense(rows: Ints, used: Ints, row: Ints, slot: Ints, strength: Doubles) -> Group:
    """One product for all rows and slots, of which the pairs (row, slot) are wanted."""
    weight, selects = np.zeros((len(rows), len(used))), np.zeros((len(rows), len(used)), np.bool_)
    wanted = np.searchsorted(rows, row), np.searchsorted(used, slot)
    np.add.at(weight, wanted, strength)
    selects[wanted] = True
    return Group(used[None], rows[None], weight[None], selects[None])


def _by_slot(row: Ints, slot: Ints, strength: Doubles) -> Iterator[Group]:
    """Products for slots that about equally many of the pairs (row, slot) want."""
    order = np.argsort(slot, kind="stable")
    slots, starts, counts = np.unique(slot[order], return_index=True, return_counts=True)
    sizes = np.zeros_like(counts)
    most = int(counts.max())
    if most * len(counts) > len(slot) * (PADDED if most < MANY else PADDED_MANY):
        sizes = (np.frexp(counts - 1)[1] + 1) // 2  # 1, 2 to 4, 5 to 16, .. rows
        many = counts >= MANY
        sizes[many] = -1 - np.flatnonzero(many)  # each by itself
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        count = counts[members, None]
        place = np.arange(count.max())
        # A slot with fewer rows repeats its last one, which does not select it again.
        pairs = order[starts[members, None] + np.minimum(place, count - 1)]
        selects = (place < count)[:, :, None]
        yield Group(slots[members, None], row[pairs], strength[pairs][:, :, None], selects)


def _parts(
    group: Group, spans: Mapping[int, Span], dtype: torch.dtype, width: int
) -> Iterator[Part]:
    """A group in a layer that has these spans: cut where ranks differ, and by what is moved."""
    of_ranks: dict[tuple[int, ...], list[int]] = {}
    for g, slots in enumerate(group.slots.tolist()):
        ranks = tuple(spans[slot].rows if slot in spans else 0 for slot in slots)
        if any(ranks):
            of_ranks.setdefault(ranks, []).append(g)
    step = max(1, MOVED // (group.rows.shape[1] * width))
    for ranks, members in of_ranks.items():
        here = np.flatnonzero(ranks)
        for start in range(0, len(members), step):
            some = np.array(members[start : start + step])
            found = [[spans[slot] for slot in s] for s in group.slots[some][:, here].tolist()]
            weight, selects = (t[some][:, :, here] for t in (group.weight, group.selects))
            yield _part(group.rows[some], found, weight, selects, dtype)


def _part(
    rows: Ints, spans: list[list[Span]], weight: Doubles, selects: Bools, dtype: torch.dtype
) -> Part:
    """Rows [G, m] and their spans [G][J], where the j-th of all have the same rank."""
    if len(rows) == 1:  # rows whose slots are all in other layers keep their bits
        some = selects[0].any(1)
        rows, weight, selects = rows[:, some], weight[:, some], selects[:, some]
    (G, m), ranks = rows.shape, [span.rows for span in spans[0]]

    def for_rank_rows(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
        """[G, ., J] -> [G, ., R]"""
        spread = torch.from_numpy(np.repeat(values, ranks, 2)).to(dtype)
        return spread if G > 1 else spread[0]

    strength = weight * [[[span.scaling for span in item]] for item in spans]
    wanted = strength[selects]
    alike = bool((wanted == wanted[0]).all())
    all_spans = [span for item in spans for span in item]
    rank_rows = np.concatenate([np.arange(s.offset, s.offset + s.rows) for s in all_spans])
    last = np.cumsum([span.rows for span in all_spans]) - 1
    constant = np.zeros(len(rank_rows), np.bool_)
    constant[last] = [span.bias for span in all_spans]
    biases = torch.from_numpy(constant).view((G, 1, -1) if G > 1 else (1, -1))
    return Part(
        (G, m, sum(ranks)),
        _rows(rows.ravel()),
        _rows(rank_rows),
        biases if constant.any() else None,
        float(wanted[0]) if alike else 1.0,
        None if alike else for_rank_rows(strength, torch.promote_types(dtype, torch.float32)),
        None if selects.all() else for_rank_rows(-selects.astype(np.int8), INTS[dtype.itemsize]),
    )


def _rows(rows: Ints) -> Rows:
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


@functools.cache
def bf16_is_fast() -> bool:
    """Whether this CPU has instructions for products of bf16; AMX comes with those of AVX512."""
    # Not public, so that it may be missing: products are fp32 then.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def add_lora(y: Tensor, x: Tensor, pool: Pool, plan: HostPlan, owned: bool) -> Tensor:
    """y [M, N] plus what x [M, K] gets from its adapters; rows that select none keep every bit.

    Args:
        owned: y's storage is nobody else's, so that it may be written to.
    """
    bound: Bound | None = pool.bound
    buffers = pool._buffers  # past nn.Module's own look-up, which takes 10 us where caches are cold
    if (
        bound is None
        or bound.plan is not plan
        or bound.A_rows is not buffers["A_rows"]
        or bound.B_rows is not buffers["B_rows"]
        or bound.given != (x.dtype, y.dtype)
    ):
        bound = pool.bound = _bind(plan, pool, x.dtype, y.dtype)
    given, dtype, sums = y.dtype, bound.dtype, bound.sums
    if x.dtype != dtype:
        x = x.to(dtype)
    out = y if owned and given == sums else y.to(sums, copy=True)
    for part, factors in bound.parts:
        _add(out, x, part, *(factors or _factors(pool, part, dtype)))
    if sums == given:
        return out
    rounded = out.to(given)
    return rounded if plan.partly is None else torch.where(plan.partly, rounded, y)


def _bind(plan: HostPlan, pool: Pool, x: torch.dtype, y: torch.dtype) -> Bound:
    A_rows, B_rows = pool.A_rows, pool.B_rows
    fast = x == y == A_rows.dtype == torch.bfloat16 and bf16_is_fast()
    dtype = x if fast else torch.promote_types(x, torch.float32)
    parts, sums = plan.cut(pool, dtype)
    views = A_rows.dtype == dtype
    # Views are kept and copies are not; pool.bound ends when rank rows are written or moved.
    bound = [
        (part, _factors(pool, part, dtype) if views and isinstance(part.rank_rows, slice) else None)
        for part in parts
    ]
    return Bound(plan, A_rows, B_rows, (x, y), dtype, sums, bound)


def _factors(pool: Pool, part: Part, dtype: torch.dtype) -> Factors:
    (G, _, R), rank_rows = part.size, part.rank_rows
    A, B = _taken(pool.A_rows, rank_rows).to(dtype), _taken(pool.B_rows, rank_rows).to(dtype)
    K, N = pool.in_features, pool.out_features
    if A.shape[1] != K or B.shape[1] != N:  # rounded up in the pool
        A, B = A[:, :K], B[:, :N]
    if G > 1:
        A, B = A.view(G, R, K), B.view(G, R, N)
    return A.mT, B


def _add(y: Tensor, x: Tensor, part: Part, A: Tensor, B: Tensor) -> None:
    """y += alpha * (x A, masked and scaled) B for the rows of a part."""
    (G, m, _), rows, _, constant, alpha, strength, bits = part
    if rows is not None:
        x = _taken(x, rows)
    if G > 1:
        x = x.view(G, m, x.shape[1])
    product = torch.bmm if G > 1 else torch.mm
    h = product(x, A)
    if constant is not None:
        h.masked_fill_(constant, 1.0)
    if strength is not None:
        h.mul_(strength)
    if bits is not None:
        # Selected, not multiplied by 0: what a row did not ask for may be infinite. By bits, for
        # masked_fill_ is no vector code: 350 us against 40 for [1024, 256] in fp32.
        h.view(bits.dtype).bitwise_and_(bits)
    if rows is not None:
        if isinstance(rows, Tensor):
            y.index_add_(0, rows, product(h, B).flatten(0, -2).to(y.dtype), alpha=alpha)
            return
        y = y[rows]
    if y.dtype != h.dtype:
        y.add_(product(h, B).flatten(0, -2), alpha=alpha)
    elif G > 1:
        y.view(G, m, y.shape[1]).baddbmm_(h, B, alpha=alpha)
    else:
        y.addmm_(h, B, alpha=alpha)


def _taken(table: Tensor, rows: Rows) -> Tensor:
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)
