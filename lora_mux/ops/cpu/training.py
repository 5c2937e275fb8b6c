"""Gradients on the CPU: of x, of the routing's weights, and of the adapters that are trained.

    g[m] = B[i]^T dy[m],  h[m] = A[i] x[m],  gain[m] = weight[m, j] * scaling[i]     i = slots[m, j]
    dx[m] += gain g A[i]        dA[i] = sum_m gain g x[m]^T        dB[i]^T = sum_m gain h dy[m]^T

The forward pass is that of plan.py, so that rows have the same bits whether others are trained or
not. In the backward the rows of each slot are brought side by side, and slots of one rank with
about as many rows share batched products, of so many rows at once that they stay in a cache. A
slot's products see its own rows only: those of others may hold NaN.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core import AnyPool, Pool, Span, computed_once
from ..forms import tracked
from ..operands import check_unchanged, refuse_second_derivatives
from .groups import by_slot
from .plan import MOVED, Blocks, Plan, Rows, block, blocks_of, rows_of, taken


class Share(NamedTuple):
    """Slots of equal rank, each with m rows: what their products need."""

    slots: list[int]  # [G]
    rows: Rows  # [G * m] of x and y
    rank: int  # R, a bias included
    rank_rows: Blocks | Tensor  # [G * R] of the pool
    gain: Tensor  # [G, m, 1]; 0 where a row only fills up
    selects: Tensor | None  # [G, m, 1] bool; None = no row only fills up
    scaling: Tensor  # [G, 1]
    bias: bool  # whether the last rank row of each is constant

    def bring(self, table: Tensor) -> Tensor:
        """The rows [G, m, .] of x or dy."""
        return taken(table, self.rows).view(*self.gain.shape[:2], table.shape[1])

    def factor(self, rank_rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """A or B^T of each slot, [G, R, width]; where possible a view of the pool."""
        return block(rank_rows, self.rank_rows, (len(self.slots), self.rank, width), dtype)

    def only(self, values: Tensor) -> Tensor:
        """Zeros where a row only fills up: selected, since 0 times NaN is NaN."""
        return values if self.selects is None else torch.where(self.selects, values, 0.0)


@dataclass(frozen=True, eq=False)
class TrainingPlan(Plan):
    """A plan some of whose adapters are trained."""

    trained: tuple[int, ...] = ()  # slots that a row selects
    _shares: dict[object, list[Share]] = field(default_factory=dict, init=False)

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        if not (tracked(y) or self.follows(x, pool)):
            return super().add(y, x, pool, owned)
        flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        added: Tensor = _Layer.apply(*flat, None, None, *self._arguments(pool))  # type: ignore[no-untyped-call]
        return added.reshape(y.shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K]: one node for autograd."""
        flat, given = x.reshape(-1, x.shape[-1]), self._arguments(pool)
        y: Tensor = _Layer.apply(None, flat, weight, bias, *given)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def follows(self, x: Tensor, pool: AnyPool) -> bool:
        """Whether autograd follows what the adapters add to a layer."""
        return tracked(x, self.strength) or tracked(*self._parameters(pool))

    def _arguments(self, pool: AnyPool) -> tuple[Any, ...]:
        return self.strength, self, pool, *self._parameters(pool)

    def _parameters(self, pool: AnyPool) -> list[Tensor]:
        own = (pool.masters[slot] for slot in self.trained if slot in pool.masters)
        return [parameter for masters in own for parameter in masters.parameters]

    def shares(self, spans: Mapping[int, Span], width: int, dtype: torch.dtype) -> list[Share]:
        """The products of a layer; layers that are alike share them.

        Args:
            spans: of the slots that have rank rows there.
            width: of x and y together.
            dtype: of the products.
        """
        key = dtype, width, tuple(spans.items())
        if key not in self._shares:
            self._shares[key] = [*self._made(spans, width, dtype)]
        return self._shares[key]

    def _made(self, spans: Mapping[int, Span], width: int, dtype: torch.dtype) -> Iterator[Share]:
        row, slot, weight = self._pairs
        for mine in (True, False):  # apart: of the others no factors are wanted
            here = [s for s in spans if (s in self.trained) == mine]
            at = np.isin(slot, here)
            if not at.any():
                continue
            for group in by_slot(row[at], slot[at], weight[at]):
                alike: dict[tuple[int, bool], list[int]] = {}
                for g, (one,) in enumerate(group.slots.tolist()):
                    alike.setdefault((spans[one].rank, spans[one].bias), []).append(g)
                at_once = max(1, MOVED // (group.rows.shape[1] * width))
                for (_, bias), members in alike.items():
                    for start in range(0, len(members), at_once):
                        part = group.part(members[start : start + at_once], np.array([0]))
                        yield _share([*part.slots[:, 0].tolist()], part, spans, bias, dtype)

    @computed_once
    def _pairs(self) -> tuple[Any, Any, Any]:
        """(row, slot, weight) of each slot of a row; of one that stands there twice, the sum."""
        row, slot, weight = self.selections
        pairs, place = np.unique(np.stack([row, slot], 1), axis=0, return_inverse=True)
        return pairs[:, 0], pairs[:, 1], np.bincount(place.ravel(), weight, len(pairs))


def _share(
    slots: list[int], group: Any, spans: Mapping[int, Span], bias: bool, dtype: torch.dtype
) -> Share:
    held = [spans[slot] for slot in slots]
    scaling = torch.tensor([span.scaling for span in held], dtype=dtype)[:, None]
    all_rank_rows = np.concatenate([np.arange(s.offset, s.offset + s.rank) for s in held])
    selects = None if group.selects.all() else torch.from_numpy(group.selects)
    gain = torch.from_numpy(group.weight).to(dtype) * scaling[:, :, None]
    if selects is not None:
        gain = torch.where(selects, gain, 0.0)
    rows = rows_of(group.rows.ravel())
    rank_rows = blocks_of(all_rank_rows, len(held))
    return Share(slots, rows, held[0].rank, rank_rows, gain, selects, scaling, bias)


class _Layer(torch.autograd.Function):
    """y, or x W^T + bias where y is None, plus the adapters' part."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        strength: Tensor,
        training: TrainingPlan,
        pool: AnyPool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.training, ctx.parameters = training, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        # Not saved: torch would refuse a backward after another adapter came or went. The rank rows
        # of those in use stay as they are until it is over, in these buffers.
        ctx.A_rows, ctx.B_rows = pool.A_rows, pool.B_rows
        used = training.used
        ctx.spans = {slot: span for slot in used if (span := pool.span(slot)) is not None}
        ctx.save_for_backward(x, weight)
        if y is not None:
            return training.add(y, x, pool, owned=False)
        assert weight is not None
        return training.add(torch.nn.functional.linear(x, weight, bias), x, pool, owned=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        with torch.autocast("cpu", enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    training: TrainingPlan = ctx.training
    check_unchanged(ctx.parameters, ctx.versions)
    x, weight = ctx.saved_tensors
    to_y, to_x, _, _, to_strength, _, _, *to_parameters = ctx.needs_input_grad
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx = None
    if to_x:
        base = torch.zeros_like(x) if weight is None else torch.mm(grad.to(x.dtype), weight)
        dx = base.to(dtype)
    slots, wanted = training.slots, any(to_parameters)
    of_strength = torch.zeros(slots.shape, dtype=dtype) if to_strength else None
    wide_x, dy = x.to(dtype), grad.to(dtype)
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for share in training.shares(ctx.spans, x.shape[1] + grad.shape[1], dtype):
        A = share.factor(ctx.A_rows, x.shape[1], dtype)
        B = share.factor(ctx.B_rows, grad.shape[1], dtype)
        dy_rows = share.bring(dy)
        g = share.only(_product(dy_rows, B.mT))  # [G, m, R]
        gained = g * share.gain
        if dx is not None:
            _add_rows(dx, share.rows, _product(gained, A).flatten(0, 1))
        trained = wanted and share.slots[0] in training.trained
        if not (trained or to_strength):
            continue
        x_rows = share.bring(wide_x)
        h = share.only(_product(x_rows, A.mT))
        if share.bias:
            h[..., -1] = 1.0
            h = share.only(h)
        if of_strength is not None:
            of_pair = (g * h).sum(2) * share.scaling  # [G, m]
            rows = _numbers(share.rows)
            mine = slots[rows].view(*of_pair.shape, -1) == torch.tensor(share.slots)[:, None, None]
            of_rows = torch.where(mine, of_pair[:, :, None], 0.0).flatten(0, 1)
            of_strength.index_add_(0, rows, of_rows)
        if trained:
            of_A = _product(gained.mT, x_rows).unbind()
            of_B = _product(h.mul_(share.gain).mT, dy_rows).unbind()
            factors.update(zip(share.slots, zip(of_A, of_B, strict=True), strict=True))
    of_strength = None if of_strength is None else of_strength.to(training.strength.dtype)
    return (
        *(grad if to_y else None, None if dx is None else dx.to(x.dtype), None, None),
        *(of_strength, None, None, *_split(ctx, factors)),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of each slot; torch.bmm takes longer for one alone."""
    return torch.bmm(a, b) if len(a) > 1 else torch.mm(a[0], b[0])[None]


def _split(ctx: Any, factors: Mapping[int, tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """The gradient of each parameter: A, B and, if any, a bias of each adapter in order."""
    if not factors:
        return [None] * len(ctx.parameters)
    found: list[Tensor] = []
    for slot in ctx.training.trained:
        if slot in ctx.spans and len(found) < len(ctx.parameters):
            of_A, of_B = factors[slot]
            if ctx.spans[slot].bias:
                found += of_A[:-1], of_B[:-1].T, of_B[-1]
            else:
                found += of_A, of_B.T
    return [of.to(parameter.dtype) for of, parameter in zip(found, ctx.parameters, strict=True)]


def _add_rows(table: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        table[rows] += values
    else:
        table.index_add_(0, rows, values)


def _numbers(rows: Rows) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
