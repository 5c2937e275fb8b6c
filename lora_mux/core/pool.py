"""The pool of one layer: the rank rows of all its resident adapters.

Both factors lie rank-major: A_rows [C, in_features] holds A's rows, B_rows [C, out_features] the
columns of B. An adapter of rank r occupies exactly r consecutive rank rows, whatever the ranks of
the others; one that does not touch this layer has rank 0 and occupies none. A bias and a gain are
one more rank row each, behind the others. The rows of all gains are read as a pool of their own.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .free_runs import FreeRuns, Move, Span, joined
from .methods import computed_once
from .streams import has_streams, to_device
from .weights import LoraWeights, Masters, is_finite, rank_of, rank_rows


class RankRows(NamedTuple):
    """The tensors of a pool: slot i has rank rows offset[i] .. offset[i] + rank[i] - 1."""

    A_rows: Tensor  # [C, in_features, rounded up to a multiple of ALIGNMENT with zeros]
    B_rows: Tensor  # [C, out_features, likewise]
    constant: Tensor | None  # [C] bool: a bias or gain, whose h is 1, not A x; None = none is
    offset: Tensor  # [S] int32
    rank: Tensor  # [S] int32
    scaling: Tensor  # [S] at least fp32


# Elements: every row begins at a multiple of 16 bytes, which vector loads need.
ALIGNMENT = 16

BUFFERS = ("A_rows", "B_rows", "constant")  # one row for each rank row
# One entry for each slot. The last two say where its gain is, and whether it has one.
TABLES = ("offset", "rank", "scaling", "gain_offset", "gain_rank")


class Version:
    """One state of a pool's rank rows; what is kept under it, weakly, ends when they change."""

    @computed_once
    def gains(self) -> "Version":
        """The same state, for what is kept of the gains alone."""
        return Version()


class Pool(nn.Module):
    """Rank rows, and for each slot where they begin, how many they are, and their scaling.

    All tensors are non-persistent buffers: they move with the layer and stay out of state_dict.
    Their names, shapes and dtypes are those of RankRows, and then come the tables of gains.
    """

    A_rows: Tensor
    B_rows: Tensor
    constant: Tensor
    offset: Tensor
    rank: Tensor
    scaling: Tensor
    gain_offset: Tensor
    gain_rank: Tensor

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.max_rank = 0  # at least every rank here; bounds what the kernels put in between
        self.has_gains = False  # whether any adapter here may have a gain; once True, it stays
        self.spans: dict[int, Span] = {}  # slot -> what it has here; none = rank 0
        self.runs = FreeRuns()  # which rank rows are free
        self.fixed: int | None = None  # how many rank rows there always are; None = it grows
        self.version = Version()  # another one whenever rank rows are written or moved
        self.moving: Move | None = None
        self.masters: dict[int, Masters] = {}  # slot -> what is trained of it here

        def register(name: str, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), False)

        register("A_rows", 0, _aligned(in_features), dtype=dtype)
        register("B_rows", 0, _aligned(out_features), dtype=dtype)
        register("constant", 0, dtype=torch.bool)
        for name in TABLES:
            wide = torch.promote_types(dtype, torch.float32)
            register(name, 0, dtype=wide if name == "scaling" else torch.int32)

    @property
    def rows(self) -> RankRows:
        """The buffers as they are now."""
        return RankRows(
            self.A_rows, self.B_rows, self.constant, self.offset, self.rank, self.scaling
        )

    def span(self, slot: int) -> Span | None:
        """Where a slot has its rank rows; None = it has none here."""
        return self.spans.get(slot)

    def fix(self, rank_rows: int) -> None:
        """Have that many rank rows, now or as soon as the layer is materialised, and never more."""
        self.fixed = rank_rows
        if not self.A_rows.is_meta:
            self.reserve(rank_rows, 0, 0)

    @property
    def row_bytes(self) -> int:
        """What one rank row takes."""
        return sum(t.element_size() * t.shape[1:].numel() for t in self.rows[:3] if t is not None)

    def check_fit(self, weights: LoraWeights, argument: str) -> None:
        """Refuse factors of other shapes than the layer's, by an error that names `argument`."""
        if self.A_rows.is_meta:
            raise AdapterError(
                f"`{argument}`: the layer is on the meta device; materialise the model before "
                "adding adapters"
            )
        weights.check_shapes(self.in_features, self.out_features, argument)

    def check(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """`weights` in the pool's dtype and on its device, or an error that names `argument`."""
        self.check_fit(weights, argument)
        weights.check_values(self.A_rows.dtype, argument)
        return weights.to(self.A_rows.device, self.A_rows.dtype)

    def fits(self, weights: LoraWeights, slot: int) -> bool:
        """Whether `write` would leave the buffers where they are, and all that passes go by."""
        room = self.runs.largest if self.fixed is None else self.fixed
        held = room, self.rank.shape[0], self.max_rank, self.has_gains
        wanted = rank_rows(weights), slot + 1, rank_of(weights), weights.gain is not None
        return all(n <= h for n, h in zip(wanted, held, strict=True))

    def expect(self, weights: LoraWeights | None, slots: int) -> None:
        """Let all but the rank rows themselves be as such an adapter needs it, in any slot."""
        self.reserve(0, slots, 0 if weights is None else rank_of(weights))
        self.has_gains |= weights is not None and weights.gain is not None

    # Outside inference_mode: a pool filled inside it can still be used with autograd.
    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, slot: int, weights: LoraWeights | None, slots: int) -> None:
        """Store checked weights under an empty slot; None: the adapter leaves this layer alone.

        They go to the first free run that holds them; where none does, the buffers grow.

        Args:
            slots: how many there should be room for, more than `slot`.
        """
        assert slot not in self.spans
        self.version = Version()
        self.expect(weights, slots)
        if weights is None:
            return
        r, rank, used = weights.A.shape[0], rank_of(weights), rank_rows(weights)
        if self.runs.largest < used:
            assert self.fixed is None
            self.reserve(self.runs.tail + used, slots, rank)
        start = self.runs.take(used)
        assert start is not None
        has_bias, has_gain = weights.bias is not None, weights.gain is not None
        self.spans[slot] = Span(start, used, has_bias, weights.scaling, has_gain)
        A_rows, B_rows, constant = self.A_rows.data, self.B_rows.data, self.constant.data
        A_rows[start : start + r, : self.in_features] = weights.A
        B_rows[start : start + r, : self.out_features] = weights.B.T
        # What to_empty() has brought from the meta device holds anything beyond them.
        A_rows[start : start + used, self.in_features :] = 0
        B_rows[start : start + used, self.out_features :] = 0
        constant[start : start + r] = False
        constant[start + r : start + used] = True
        A_rows[start + r : start + used] = 0
        if weights.bias is not None:
            B_rows[start + r, : self.out_features] = weights.bias
        if weights.gain is not None:
            B_rows[start + rank, : self.out_features] = weights.gain
        # Filled: an assigned number comes by a copy, which on a GPU waits. Ranks make rows count.
        self.offset.data[slot].fill_(start)
        self.scaling.data[slot].fill_(weights.scaling)
        if weights.gain is not None:
            self.gain_offset.data[slot].fill_(start + rank)
            self.gain_rank.data[slot].fill_(1)
        self.rank.data[slot].fill_(rank)

    def learn(self, slot: int) -> None:
        """A slot comes to hold other values, which no backward is to take for what they were."""
        self.spans[slot] = self.spans[slot]._replace()

    def held(self, slots: Iterable[int]) -> list[list[Tensor]]:
        """What is trained of each slot, as `Masters.rows`: views of the buffers."""
        A = self.A_rows.data.narrow(1, 0, self.in_features)
        B = self.B_rows.data.narrow(1, 0, self.out_features)
        held = []
        for start, r, has_bias, *_ in map(self.spans.__getitem__, slots):
            held.append([F.narrow(0, start, r - has_bias) for F in (A, B)])
            held[-1] += [B.narrow(0, start + r - 1, 1)] * has_bias
        return held

    @torch.inference_mode(False)
    @torch.no_grad()
    def rescale(self, slot: int, scaling: float) -> None:
        """Give a slot another scaling, which the host knows."""
        if scaling != self.spans[slot].scaling:
            self.scaling.data[slot].fill_(scaling)
            self.version, self.spans[slot] = Version(), self.spans[slot]._replace(scaling=scaling)

    @torch.inference_mode(False)
    @torch.no_grad()
    def erase(self, slots: Iterable[int]) -> None:
        """Free the rank rows of slots that have any here; no tenant leaves values behind."""
        held = {slot: self.spans[slot] for slot in slots if slot in self.spans}
        if not held:
            return
        (those,) = to_device([torch.tensor([*held])], self.rank.device)
        self.rank.data.index_fill_(0, those, 0)
        self.gain_rank.data.index_fill_(0, those, 0)
        for start, end in joined(held.values()):
            self.A_rows.data[start:end] = 0
            self.B_rows.data[start:end] = 0
        # The span last: what has none is known to be empty.
        for slot, span in held.items():
            del self.spans[slot]
            self.runs.give(span.offset, span.rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def slide(self, slot: int) -> None:
        """Move a slot's rank rows to the first free run that holds them, or leave them."""
        span = self.spans[slot]
        self.runs.give(span.offset, span.rows)
        start = self.runs.take(span.rows)
        assert start is not None and start <= span.offset
        if start == span.offset:
            return
        old = slice(span.offset, span.offset + span.rows)
        left = slice(max(span.offset, start + span.rows), old.stop)
        values = {name: getattr(self, name)[old].clone() for name in BUFFERS}
        self.moving = Move(slot, span._replace(offset=start), left, values)
        self._finish_move(self.moving)

    def _finish_move(self, move: Move) -> None:
        """Bring rank rows to their new place, for the first time or after an interrupt."""
        self.version = Version()
        start, rows, *_ = move.span
        for name, values in move.values.items():
            buffer: Tensor = getattr(self, name).data
            buffer[start : start + rows] = values
            buffer[move.left] = 0
        self.offset.data[move.slot].fill_(start)
        self.gain_offset.data[move.slot].fill_(start + move.span.rank)
        self.spans[move.slot] = move.span
        self.moving = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def mend(self, kept: Collection[int]) -> None:
        """Put in order what an interrupted change has left, and erase all slots but those kept.

        An interrupt can come at any line. The spans tell what is whole: one is set before anything
        is written, and goes after everything was erased.
        """
        if self.moving is not None:
            self._finish_move(self.moving)
        for names in (BUFFERS, TABLES):
            sizes = {len(getattr(self, name)) for name in names}
            if len(sizes) > 1:
                self._grow(names, max(sizes))
        self.runs = FreeRuns.rebuilt(len(self.A_rows), (s[:2] for s in self.spans.values()))
        self.erase(self.spans.keys() - kept)
        self.version = Version()

    def reserve(self, rank_rows: int, slots: int, max_rank: int) -> None:
        """Grow the buffers so that they hold that much; what is there stays as it is."""
        if rank_rows > self.runs.capacity:
            capacity = max(rank_rows, 2 * self.runs.capacity)  # doubling: n loads copy O(n) rows
            self._grow(BUFFERS, capacity)
            self.runs.grow(capacity)
        if slots > self.rank.shape[0]:
            self._grow(TABLES, max(slots, 2 * self.rank.shape[0]))
        self.max_rank = max(self.max_rank, max_rank)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grow(self, names: Sequence[str], capacity: int) -> None:
        grown = {}  # first all of them: there may be no memory for the last
        for name in names:
            old: Tensor = getattr(self, name)
            grown[name] = old.new_zeros((capacity, *old.shape[1:]))
            grown[name][: old.shape[0]] = old
        if has_streams(self.A_rows.device):  # a pass in progress on another waits for nothing new
            torch.cuda.current_stream(self.A_rows.device).synchronize()
        self.version = Version()
        for name, new in grown.items():
            setattr(self, name, new.data)  # whose counter is 0

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody else has written here: what we write goes past torch's counter."""
        return not self.rank.is_inference() and self.rank._version > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "masters": {}}  # a copy of the model trains nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rank = self.rank.clone()  # whose counter is 0, which copying and loading have raised

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        """Move or cast with the layer; scaling and masters keep at least fp32 under .half()."""
        self.version, scaling, before = Version(), self.scaling, self.A_rows.dtype
        place = self.A_rows.device
        self._synchronize()  # other streams write and read what this one moves
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = torch.promote_types(self.A_rows.dtype, torch.float32)
        if self.scaling.dtype != dtype:
            self.scaling = scaling.to(self.scaling.device, dtype)
        if torch.promote_types(self.A_rows.dtype, before) != self.A_rows.dtype:
            self.spans = {slot: span._replace(cast=True) for slot, span in self.spans.items()}
            self._confine()
        for masters in self.masters.values():
            masters.move(self.A_rows.device)
            if (place, before) != (self.A_rows.device, self.A_rows.dtype):
                # The next pass brings them here, which are exact whatever the pool has.
                torch.autograd.graph.increment_version(masters.parameters)
        self._synchronize()
        return self

    def _synchronize(self) -> None:
        if has_streams(self.A_rows.device):
            torch.cuda.synchronize(self.A_rows.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _confine(self) -> None:
        """Make NaN of the rows of adapters that have become infinite by a cast to a smaller dtype.

        Left as they are, they would reach other adapters' rows, since 0 x infinity is NaN too.
        """
        factors = self.A_rows, self.B_rows
        if self.A_rows.is_meta or all(is_finite(rows, rows.dtype) for rows in factors):
            return
        lost = 0
        for slot, span in self.spans.items():
            held = slice(span.offset, span.offset + span.rows)
            if all(is_finite(rows[held], rows.dtype) for rows in factors):
                continue
            lost += 1
            for rows in factors:
                rows.data[held] = 0
            self.spans[slot] = span._replace(scaling=math.nan)
            self.scaling.data[slot].fill_(math.nan)
        if lost:
            warnings.warn(
                f"{lost} of {len(self.spans)} adapters of a layer hold values that "
                f"{self.A_rows.dtype} does not; rows that select them are NaN until they are "
                "loaded again",
                stacklevel=2,
            )


def _aligned(features: int) -> int:
    return -(-features // ALIGNMENT) * ALIGNMENT


class Gains:
    """The gains in a pool as a pool of their own, of rank 1: c = sum_j weight * scaling * gain.

    Their input may be any x [..., 1], because all their rank rows are constant. Made for each call.
    """

    in_features = max_rank = 1
    masters: Mapping[int, Masters] = MappingProxyType({})  # DoRA is not trained here

    def __init__(self, pool: Pool) -> None:
        self._pool, self.out_features = pool, pool.out_features
        self.A_rows, self.B_rows = pool.A_rows, pool.B_rows
        tables = pool.gain_offset, pool.gain_rank, pool.scaling
        self.rows = RankRows(self.A_rows, self.B_rows, pool.constant, *tables)

    @property
    def version(self) -> Version:
        """The pool's."""
        return self._pool.version.gains

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        return self.rows._asdict()

    def span(self, slot: int) -> Span | None:
        """Where a slot has its gain; None = it has none here."""
        held = self._pool.span(slot)
        if held is None or not held.gain:
            return None
        return Span(held.offset + held.rank, 1, True, held.scaling)


AnyPool: TypeAlias = Pool | Gains  # what the forms compute with
