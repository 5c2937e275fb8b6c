"""The pool of one layer: the rank rows of all its resident adapters.

Both factors lie rank-major: A_rows [C, in_features] holds A's rows, B_rows [C, out_features] the
columns of B. An adapter of rank r occupies exactly r consecutive rank rows, whatever the ranks of
the others; one that does not touch this layer has rank 0 and occupies none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import AdapterError, ArgumentTypeError


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


# Elements: every row begins at a multiple of 16 bytes, which vector loads need.
ALIGNMENT = 16


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

    def check(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """`weights` in the pool's dtype and on its device, or an error that names `argument`."""
        if self.A_rows.is_meta:
            raise AdapterError(
                f"`{argument}`: the layer is on the meta device; materialise the model before "
                "adding adapters"
            )
        K, N = self.in_features, self.out_features
        A = self._checked(weights.A, f"{argument}.A", (None, K), "[r, in_features]")
        r = A.shape[0]
        if r < 1:
            raise AdapterError(f"`{argument}.A` must have a rank of at least 1, got 0")
        B = self._checked(weights.B, f"{argument}.B", (N, r), "[out_features, r]")
        bias = weights.bias
        if bias is not None:
            bias = self._checked(bias, f"{argument}.bias", (N,), "[out_features]")
        return replace(weights, A=A, B=B, bias=bias)

    def _checked(
        self, tensor: object, argument: str, shape: tuple[int | None, ...], words: str
    ) -> Tensor:
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
        if tensor.is_meta:
            raise AdapterError(f"`{argument}` must hold values, got a tensor on the meta device")
        tensor = tensor.detach().to(self.A_rows.device, self.A_rows.dtype)
        # 0 x NaN is NaN: one tenant's bad weights could reach another tenant's rows.
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"`{argument}` must be finite in the pool's {self.A_rows.dtype}, "
                f"got {int((~tensor.isfinite()).sum())} values that are not"
            )
        return tensor

    def fits(self, weights: LoraWeights, slot: int) -> bool:
        """Whether `write` would leave the buffers where they are."""
        used = _rank_rows(weights)
        held = self.A_rows.shape[0], self.rank.shape[0], self.max_rank
        needed = self._gap(used) + used, slot + 1, used
        return all(n <= h for n, h in zip(needed, held, strict=True))

    # Outside inference_mode, so that a pool filled inside it can still be used with autograd.
    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, slot: int, weights: LoraWeights | None, slots: int) -> None:
        """Store checked weights under an empty slot; None: the adapter leaves this layer alone.

        Args:
            slots: how many there should be room for, more than `slot`.
        """
        assert slot not in self.spans
        if weights is None:
            self.reserve(0, slots, 0)
            return
        r, used = weights.A.shape[0], _rank_rows(weights)
        start = self._gap(used)
        self.reserve(start + used, slots, used)
        self.A_rows[start : start + r, : self.in_features] = weights.A
        self.B_rows[start : start + r, : self.out_features] = weights.B.T
        self.constant[start : start + used] = False
        if weights.bias is not None:
            self.A_rows[start + r] = 0
            self.B_rows[start + r, : self.out_features] = weights.bias
            self.constant[start + r] = True
        # The rank last: it is what makes the rows count.
        self.offset[slot], self.scaling[slot] = start, weights.scaling
        self.rank[slot] = used
        self.spans[slot] = Span(start, used, weights.bias is not None, weights.scaling)

    @torch.inference_mode(False)
    @torch.no_grad()
    def erase(self, slot: int) -> None:
        """Free the rank rows of a slot, if it has any here; no tenant leaves values behind."""
        if slot not in self.spans:
            return
        start, used, *_ = self.spans.pop(slot)
        self.rank[slot] = 0
        self.A_rows[start : start + used] = 0
        self.B_rows[start : start + used] = 0

    def _gap(self, rows: int) -> int:
        """The first rank row of the first gap that holds `rows`; the end of all when none does."""
        start = 0
        for offset, used, *_ in sorted(self.spans.values()):
            if offset - start >= rows:
                break
            start = offset + used
        return start

    @torch.inference_mode(False)
    @torch.no_grad()
    def reserve(self, rank_rows: int, slots: int, max_rank: int) -> None:
        """Grow the buffers so that they hold that much; what is there stays as it is."""
        for names, needed in (
            (("A_rows", "B_rows", "constant"), rank_rows),
            (("offset", "rank", "scaling"), slots),
        ):
            held = getattr(self, names[0]).shape[0]
            if held >= needed:
                continue
            capacity = max(needed, 2 * held)  # doubling: n loads copy O(n) rows in all
            for name in names:
                old: Tensor = getattr(self, name)
                new = old.new_zeros((capacity, *old.shape[1:]))
                new[:held] = old
                setattr(self, name, new)
        self.max_rank = max(self.max_rank, max_rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        """Move or cast with the layer; the scaling keeps at least fp32 under .half()."""
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = torch.promote_types(self.A_rows.dtype, torch.float32)
        if self.scaling.dtype != dtype:
            self.scaling = scaling.to(self.scaling.device, dtype)
        return self


def _rank_rows(weights: LoraWeights) -> int:
    """How many rank rows it takes: a bias is one more."""
    return weights.A.shape[0] + (weights.bias is not None)


def _aligned(features: int) -> int:
    return -(-features // ALIGNMENT) * ALIGNMENT
