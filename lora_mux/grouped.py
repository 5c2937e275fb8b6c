"""The fast form on the CPU: the rows of an adapter side by side, one product for many adapters.

    y[m] += sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),    i = slots[m, j]

Adapters that about equally many rows select share one batched product, whose A and B are read where
they lie in the pool. When most rows select most of the adapters in use, all rows are multiplied
with all of them instead: x is read once, and no row is moved. Products are at least fp32, and y is
rounded once. There are no gradients; where those are wanted the reference is used.

What depends on the routing is looked at once for all layers, in plain Python: for the few numbers
of an index that costs a third of numpy or torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from . import reference
from .pool import Pool, Span

# Multiplying all rows with all adapters costs less than moving rows when so large a share of the
# products is wanted anyway; of few products a quarter is enough, for then both cost the same:
# docs/benchmarks.md has the figures.
DENSE, DENSE_OF_FEW, FEW = 0.5, 0.25, 1024
# Elements of x and of what is added that are moved at once: 4 MB in fp32 stay in a cache.
MOVED = 1 << 20


@dataclass(frozen=True)
class Group:
    """G slots with m rows each; a slot with fewer repeats its last one."""

    slots: list[int]
    rows: Tensor  # [G * m] int64
    weight: Tensor  # [G, m, 1] fp64
    real: Tensor | None  # [G * m] bool: those that are no repetition; None = all
    in_order: bool  # rows are 0, 1, .. M - 1
    _strengths: dict[object, Tensor] = field(default_factory=dict)

    def strength(self, spans: Sequence[Span], dtype: torch.dtype) -> Tensor:
        """weight * scaling [G, m, 1]; layers with the same scalings share it."""
        key = dtype, *(span.scaling for span in spans)
        if key not in self._strengths:
            self._strengths[key] = self.weight.to(dtype) * _scaling(spans, dtype)[:, None, None]
        return self._strengths[key]


@dataclass(frozen=True)
class Dense:
    """All M rows and all U slots in use."""

    slots: list[int]
    weight: Tensor  # [M, U] fp64; of a slot that stands twice in a row the sum
    others: Tensor | None  # [M, U] bool: the rows that do not select a slot; None = all select all
    rows: Tensor | None  # int64, those that select any slot; None = all
    _strengths: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def strength(self, spans: Sequence[Span], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """weight * scaling and others for each rank row [M, R]; layers that are alike share it."""
        key = dtype, *((span.scaling, span.rows) for span in spans)
        if key not in self._strengths:
            ranks = torch.tensor([span.rows for span in spans])
            strength = self.weight.to(dtype) * _scaling(spans, dtype)
            others = None if self.others is None else self.others.repeat_interleave(ranks, 1)
            self._strengths[key] = strength.repeat_interleave(ranks, 1), others
        return self._strengths[key]


@dataclass(frozen=True)
class HostPlan:
    """What the rows of a batch select."""

    index: Tensor  # [M, J] handles
    weight: Tensor  # [M, J]
    slots: Tensor  # [M, J] int64, -1 = none

    def stands_for(self, index: Tensor, weight: Tensor) -> bool:
        """Whether it was made of these; values are compared, so that writes are seen."""
        same = index.shape == self.index.shape and not weight.requires_grad
        return same and torch.equal(index, self.index) and torch.equal(weight, self.weight)

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
    def form(self) -> Dense | list[Group]:
        chosen: dict[int, list[tuple[int, float]]] = {}  # slot -> its rows and their weights
        batch = zip(self.slots.tolist(), self.weight.tolist(), strict=True)
        for m, (slots, weights) in enumerate(batch):
            for slot, weight in zip(slots, weights, strict=True):
                if slot >= 0:
                    chosen.setdefault(slot, []).append((m, weight))
        M, used = len(self.slots), sorted(chosen)
        products, wanted = M * len(used), sum(map(len, chosen.values()))
        if wanted >= products * (DENSE if products > FEW else DENSE_OF_FEW):
            return _dense(used, [chosen[slot] for slot in used], M)
        sizes: dict[int, list[int]] = {}
        for slot in used:
            size = (len(chosen[slot]) - 1).bit_length() + 1
            sizes.setdefault(size // 2, []).append(slot)  # 1, 2-4, 5-16, ... rows
        return [_group(slots, [chosen[slot] for slot in slots], M) for slots in sizes.values()]


def _dense(slots: list[int], chosen: list[list[tuple[int, float]]], M: int) -> Dense:
    weight = [[0.0] * len(slots) for _ in range(M)]
    others = [[True] * len(slots) for _ in range(M)]
    for u, pairs in enumerate(chosen):
        for m, strength in pairs:
            weight[m][u] += strength
            others[m][u] = False
    rows = [m for m, missing in enumerate(others) if not all(missing)]
    return Dense(
        slots,
        _tensor(weight, np.float64),
        _tensor(others, np.bool_) if any(map(any, others)) else None,
        _tensor(rows, np.int64) if len(rows) < M else None,
    )


def _group(slots: list[int], chosen: list[list[tuple[int, float]]], M: int) -> Group:
    m = max(map(len, chosen))
    padded = [pair for pairs in chosen for pair in pairs + pairs[-1:] * (m - len(pairs))]
    rows = [row for row, _ in padded]
    real = [place < len(pairs) for pairs in chosen for place in range(m)]
    return Group(
        slots,
        _tensor(rows, np.int64),
        _tensor([weight for _, weight in padded], np.float64).view(len(slots), m, 1),
        None if all(real) else _tensor(real, np.bool_),
        in_order=all(real) and rows == list(range(M)),
    )


def add_lora(y: Tensor, x: Tensor, pool: Pool, plan: HostPlan, owned: bool) -> Tensor:
    """y [M, N] plus what x [M, K] gets from its adapters; rows that select none keep every bit.

    Args:
        owned: y's storage is nobody else's, so that it may be written to.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = y.to(dtype, copy=not owned).contiguous()
    x = x.to(dtype).contiguous()
    if isinstance(plan.form, Dense):
        _add_dense(out, x, pool, plan.form)
    else:
        for group in plan.form:
            for part in _by_rank(group, pool):
                _add_group(out, x, pool, part)
    if out.dtype == y.dtype:
        return out
    rounded = out.to(y.dtype)
    return rounded if plan.partly is None else torch.where(plan.partly, rounded, y)


def _add_dense(y: Tensor, x: Tensor, pool: Pool, dense: Dense) -> None:
    here = [u for u, slot in enumerate(dense.slots) if slot in pool.spans]
    if not here:
        return
    if len(here) < len(dense.slots):
        slots, others, rows = [dense.slots[u] for u in here], dense.others, dense.rows
        if others is not None:
            others = others[:, here]
            rows = (~others.all(1)).nonzero()[:, 0]
        dense = Dense(slots, dense.weight[:, here], others, rows)
    spans = [pool.spans[slot] for slot in dense.slots]
    A, B = _factors(pool, spans, x.dtype)
    strength, others = dense.strength(spans, x.dtype)
    h = x @ A.T  # [M, R]
    if any(span.bias for span in spans):
        last = [sum(span.rows for span in spans[: u + 1]) - 1 for u in range(len(spans))]
        h[:, [at for at, span in zip(last, spans, strict=True) if span.bias]] = 1.0
    h *= strength
    if others is not None:
        # Selected, not multiplied by 0: what a row did not ask for may be infinite.
        h.masked_fill_(others, 0.0)
    if dense.rows is None:
        y.addmm_(h, B)
    else:
        y.index_add_(0, dense.rows, h.index_select(0, dense.rows) @ B)


def _add_group(y: Tensor, x: Tensor, pool: Pool, group: Group) -> None:
    spans = [pool.spans[slot] for slot in group.slots]
    G, m, _ = group.weight.shape
    A, B = (factor.view(G, spans[0].rows, -1) for factor in _factors(pool, spans, x.dtype))
    strength, biased = group.strength(spans, x.dtype), any(span.bias for span in spans)
    step = max(1, MOVED // (m * (x.shape[1] + y.shape[1])))
    for start in range(0, G, step):
        some = slice(start, start + step)
        flat = slice(start * m, (start + step) * m)
        rows = group.rows[flat]
        x_rows = x[flat] if group.in_order else x.index_select(0, rows)
        h = torch.bmm(x_rows.view(-1, m, x.shape[1]), A[some].transpose(1, 2))  # [step, m, r]
        if biased:
            h[[span.bias for span in spans[some]], :, -1] = 1.0
        h *= strength[some]
        if group.in_order:
            y[flat].view(-1, m, y.shape[1]).baddbmm_(h, B[some])
            continue
        added = torch.bmm(h, B[some]).view(-1, y.shape[1])
        if group.real is not None:
            added, rows = added[group.real[flat]], rows[group.real[flat]]
        y.index_add_(0, rows, added)


def _by_rank(group: Group, pool: Pool) -> Iterator[Group]:
    """The group's slots that have the same rank in this layer, without those that have none."""
    of_rank: dict[int, list[int]] = {}
    for g, slot in enumerate(group.slots):
        if slot in pool.spans:
            of_rank.setdefault(pool.spans[slot].rows, []).append(g)
    for members in of_rank.values():
        if len(members) == len(group.slots):
            yield group
            continue
        slots = [group.slots[g] for g in members]
        rows = group.rows.view(len(group.slots), -1)[members].flatten()
        real = group.real
        if real is not None:
            real = real.view(len(group.slots), -1)[members].flatten()
        yield Group(slots, rows, group.weight[members], real, in_order=False)


def _factors(pool: Pool, spans: Sequence[Span], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rank rows of spans, one after the other: views when they lie so, else copies."""
    runs = [(spans[0].offset, spans[0].offset + spans[0].rows)]
    for span in spans[1:]:
        start, end = runs[-1]
        if span.offset == end:
            runs[-1] = start, end + span.rows
        else:
            runs.append((span.offset, span.offset + span.rows))

    def chosen(table: Tensor, width: int) -> Tensor:
        parts = [table[start:end] for start, end in runs]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (rows if rows.shape[1] == width else rows[:, :width]).to(dtype)

    return chosen(pool.A_rows, pool.in_features), chosen(pool.B_rows, pool.out_features)


def _scaling(spans: Sequence[Span], dtype: torch.dtype) -> Tensor:
    return _tensor([span.scaling for span in spans], np.float64).to(dtype)


def _tensor(values: Sequence[object], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype))  # half the time of torch.tensor
