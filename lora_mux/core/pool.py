"""The pool of one layer: the rank rows of all its resident adapters.

Both factors lie rank-major: A_rows [C, in_features] holds A's rows, B_rows [C, out_features] the
columns of B. An adapter of rank r occupies exactly r consecutive rank rows, whatever the ranks of
the others; one that does not touch this layer has rank 0 and occupies none.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ArgumentTypeError
from .free_runs import FreeRuns
from .streams import has_streams, to_device


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's part of one layer: delta(x) = scaling * (B (A x) + bias)."""

    A: Tensor  # [r, in_features]
    B: Tensor  # [out_features, r]
    scaling: float  # alpha / r, or alpha / sqrt(r) for rsLoRA
    bias: Tensor | None = None  # [out_features]: PEFT's lora_bias, scaled like the rest


class RankRows(NamedTuple):
    """The tensors of a pool: slot i has rank rows offset[i] .. offset[i] + rank[i] - 1."""

    A_rows: Tensor  # [C, in_features, rounded up to a multiple of ALIGNMENT with zeros]
    B_rows: Tensor  # [C, out_features, likewise]
    constant: Tensor | None  # [C] bool: a bias, whose h is 1 instead of A x; None = none is
    offset: Tensor  # [S] int32
    rank: Tensor  # [S] int32
    scaling: Tensor  # [S] at least fp32


class Span(NamedTuple):
    """Where an adapter's rank rows are, as the host knows it."""

    offset: int
    rows: int
    bias: bool  # whether the last of them is constant
    scaling: float


class Move(NamedTuple):
    """Rank rows on their way to another place: all that it takes to finish, and to begin again."""

    slot: int
    span: Span  # where they come to be
    left: slice  # the rows where none of them will be any more
    values: Mapping[str, Tensor]  # by buffer; copies, because old and new place may overlap


# Elements: every row begins at a multiple of 16 bytes, which vector loads need.
ALIGNMENT = 16

BUFFERS = ("A_rows", "B_rows", "constant")  # one row for each rank row
TABLES = ("offset", "rank", "scaling")  # one entry for each slot


class Version:
    """One state of a pool's rank rows; what is kept under it, weakly, ends when they change."""

    __slots__ = ("__weakref__",)


class Pool(nn.Module):
    """Rank rows, and for each slot where they begin, how many they are, and their scaling.

    All tensors are non-persistent buffers: they move with the layer and stay out of state_dict.
    Their names, shapes and dtypes are those of RankRows.
    """

    A_rows: Tensor
    B_rows: Tensor
    constant: Tensor
    offset: Tensor
    rank: Tensor
    scaling: Tensor

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.max_rank = 0  # at least every rank here; bounds what the kernels put in between
        self.spans: dict[int, Span] = {}  # slot -> what it has here; none = rank 0
        self.runs = FreeRuns()  # which rank rows are free
        self.fixed: int | None = None  # how many rank rows there always are; None = it grows
        self.version = Version()  # another one whenever rank rows are written or moved
        self.moving: Move | None = None

        def register(name: str, *shape: int, dtype: torch.dtype) -> None:
            empty = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty, persistent=False)

        register("A_rows", 0, _aligned(in_features), dtype=dtype)
        register("B_rows", 0, _aligned(out_features), dtype=dtype)
        register("constant", 0, dtype=torch.bool)
        register("offset", 0, dtype=torch.int32)
        register("rank", 0, dtype=torch.int32)
        register("scaling", 0, dtype=torch.promote_types(dtype, torch.float32))

    @property
    def rows(self) -> RankRows:
        """The buffers as they are now."""
        return RankRows(
            self.A_rows, self.B_rows, self.constant, self.offset, self.rank, self.scaling
        )

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
        K, N = self.in_features, self.out_features
        _check_shape(weights.A, f"{argument}.A", (None, K), "[r, in_features]")
        r = weights.A.shape[0]
        if r < 1:
            raise AdapterError(f"`{argument}.A` must have a rank of at least 1, got 0")
        _check_shape(weights.B, f"{argument}.B", (N, r), "[out_features, r]")
        if weights.bias is not None:
            _check_shape(weights.bias, f"{argument}.bias", (N,), "[out_features]")

    def check_values(self, weights: LoraWeights, argument: str) -> None:
        """Refuse factors that are not finite in the pool's dtype, or that have no values."""
        for name in ("A", "B", "bias"):
            tensor = getattr(weights, name)
            if tensor is None:
                continue
            if tensor.is_meta:
                raise AdapterError(
                    f"`{argument}.{name}` must hold values, got a tensor on the meta device"
                )
            # 0 x NaN is NaN: one tenant's bad weights could reach another tenant's rows.
            if not is_finite(tensor, self.A_rows.dtype):
                values = tensor.detach().to(self.A_rows.dtype)
                raise AdapterError(
                    f"`{argument}.{name}` must be finite in the pool's {self.A_rows.dtype}, "
                    f"got {int((~values.isfinite()).sum())} values that are not"
                )

    def check(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """`weights` in the pool's dtype and on its device, or an error that names `argument`."""
        self.check_fit(weights, argument)
        self.check_values(weights, argument)
        A, B, bias = (
            None if tensor is None else tensor.detach().to(self.A_rows.device, self.A_rows.dtype)
            for tensor in (weights.A, weights.B, weights.bias)
        )
        assert A is not None and B is not None
        return replace(weights, A=A, B=B, bias=bias)

    def fits(self, weights: LoraWeights, slot: int) -> bool:
        """Whether `write` would leave the buffers where they are."""
        used = rank_rows(weights)
        room = self.runs.largest if self.fixed is None else self.fixed
        held = room, self.rank.shape[0], self.max_rank
        return all(n <= h for n, h in zip((used, slot + 1, used), held, strict=True))

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
        if weights is None:
            self.reserve(0, slots, 0)
            return
        r, used = weights.A.shape[0], rank_rows(weights)
        if self.runs.largest < used:
            assert self.fixed is None
            self.reserve(self.runs.tail + used, slots, used)
        self.reserve(0, slots, used)
        start = self.runs.take(used)
        assert start is not None
        self.spans[slot] = Span(start, used, weights.bias is not None, weights.scaling)
        self.A_rows[start : start + r, : self.in_features] = weights.A
        self.B_rows[start : start + r, : self.out_features] = weights.B.T
        # What to_empty() has brought from the meta device holds anything beyond them.
        self.A_rows[start : start + used, self.in_features :] = 0
        self.B_rows[start : start + used, self.out_features :] = 0
        self.constant[start : start + used] = False
        if weights.bias is not None:
            self.A_rows[start + r] = 0
            self.B_rows[start + r, : self.out_features] = weights.bias
            self.constant[start + r].fill_(True)
        # Filled: what is assigned to one element comes from the host by a copy, which on a GPU
        # waits. The rank last: it is what makes the rows count.
        self.offset[slot].fill_(start)
        self.scaling[slot].fill_(weights.scaling)
        self.rank[slot].fill_(used)

    @torch.inference_mode(False)
    @torch.no_grad()
    def erase(self, slots: Iterable[int]) -> None:
        """Free the rank rows of slots that have any here; no tenant leaves values behind."""
        held = {slot: self.spans[slot] for slot in slots if slot in self.spans}
        if not held:
            return
        (those,) = to_device([torch.tensor([*held])], self.rank.device)
        self.rank.index_fill_(0, those, 0)
        for start, end in _joined(held.values()):
            self.A_rows[start:end] = 0
            self.B_rows[start:end] = 0
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
            buffer: Tensor = getattr(self, name)
            buffer[start : start + rows] = values
            buffer[move.left] = 0
        self.offset[move.slot].fill_(start)
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
        taken = ((span.offset, span.rows) for span in self.spans.values())
        self.runs = FreeRuns.rebuilt(len(self.A_rows), taken)
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
        if max_rank > self.max_rank:
            self.max_rank = max_rank

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
            setattr(self, name, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        """Move or cast with the layer; the scaling keeps at least fp32 under .half()."""
        self.version, scaling, before = Version(), self.scaling, self.A_rows.dtype
        self._synchronize()  # other streams write and read what this one moves
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._synchronize()
        dtype = torch.promote_types(self.A_rows.dtype, torch.float32)
        if self.scaling.dtype != dtype:
            self.scaling = scaling.to(self.scaling.device, dtype)
        if torch.finfo(self.A_rows.dtype).max < torch.finfo(before).max:
            self._confine()
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
                rows[held] = 0
            self.spans[slot] = span._replace(scaling=math.nan)
            self.scaling[slot].fill_(math.nan)
        if lost:
            warnings.warn(
                f"{lost} of {len(self.spans)} adapters of a layer hold values that "
                f"{self.A_rows.dtype} does not; rows that select them are NaN until they are "
                "loaded again",
                stacklevel=2,
            )


def rank_rows(weights: LoraWeights) -> int:
    """How many rank rows it takes: a bias is one more."""
    return weights.A.shape[0] + (weights.bias is not None)


def _joined(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """(start, end) of the rank rows of spans, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, rows, *_ in sorted(spans):
        begins = joined.pop()[0] if joined and joined[-1][1] == start else start
        joined.append((begins, start + rows))
    return joined


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite, in another dtype."""
    if not tensor.numel():
        return True
    # What is not shows in the smallest and the largest value: 15 times faster than isfinite().
    values = tensor.detach()
    extremes = (values.float() if values.element_size() == 1 else values).aminmax()
    limit = torch.finfo(dtype).max
    if all(-limit <= extreme.item() <= limit for extreme in extremes):
        return True
    return bool(torch.stack(extremes).to(dtype).isfinite().all())  # as it is rounded


def _check_shape(tensor: object, argument: str, shape: tuple[int | None, ...], words: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"`{argument}` must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ArgumentTypeError(f"`{argument}` must have a floating dtype, got {tensor.dtype}")
    fits = tensor.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = ", ".join("r" if n is None else str(n) for n in shape)
        raise AdapterError(
            f"`{argument}` must have shape {words} = [{want}], got {list(tensor.shape)}"
        )


def _aligned(features: int) -> int:
    return -(-features // ALIGNMENT) * ALIGNMENT
