"""The pool of one layer: the rank rows of all its resident adapters.

Both factors lie rank-major: A_rows [C, in_features] holds A's rows, B_rows [C, out_features] the
columns of B. An adapter of rank r occupies exactly r consecutive rank rows, whatever the ranks of
the others; one that does not touch this layer has rank 0 and occupies none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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


class Pool(nn.Module):
    """Rank rows, and for each slot where they begin, how many they are, and their scaling.

    All tensors are non-persistent buffers: they move with the layer and stay out of state_dict.
    A bias is one more rank row, whose h is 1 instead of A x: `constant` marks it.
    """

    A_rows: Tensor  # [C, in_features]
    B_rows: Tensor  # [C, out_features]
    constant: Tensor  # [C] bool
    offset: Tensor  # [S] int64
    rank: Tensor  # [S] int64
    scaling: Tensor  # [S] at least fp32

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._spans: dict[int, tuple[int, int]] = {}  # slot -> (offset, rank rows)

        def register(name: str, *shape: int, dtype: torch.dtype) -> None:
            empty = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty, persistent=False)

        register("A_rows", 0, in_features, dtype=dtype)
        register("B_rows", 0, out_features, dtype=dtype)
        register("constant", 0, dtype=torch.bool)
        register("offset", 0, dtype=torch.int64)
        register("rank", 0, dtype=torch.int64)
        register("scaling", 0, dtype=torch.promote_types(dtype, torch.float32))

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

    # Outside inference_mode, so that a pool filled inside it can still be used with autograd.
    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, slot: int, weights: LoraWeights | None) -> None:
        """Store checked weights under an empty slot; None: the adapter leaves this layer alone."""
        assert slot not in self._spans
        if weights is None:
            self._reserve(rows=0, slots=slot + 1)
            return
        r = weights.A.shape[0]
        used = r if weights.bias is None else r + 1
        start = self._gap(used)
        self._reserve(rows=start + used, slots=slot + 1)
        self.A_rows[start : start + r] = weights.A
        self.B_rows[start : start + r] = weights.B.T
        self.constant[start : start + used] = False
        if weights.bias is not None:
            self.A_rows[start + r] = 0
            self.B_rows[start + r] = weights.bias
            self.constant[start + r] = True
        self.offset[slot], self.rank[slot], self.scaling[slot] = start, used, weights.scaling
        self._spans[slot] = (start, used)

    @torch.inference_mode(False)
    @torch.no_grad()
    def erase(self, slot: int) -> None:
        """Free the rank rows of a slot, if it has any here; no tenant leaves values behind."""
        if slot not in self._spans:
            return
        start, used = self._spans.pop(slot)
        self.rank[slot] = 0
        self.A_rows[start : start + used] = 0
        self.B_rows[start : start + used] = 0

    def _gap(self, rows: int) -> int:
        """The first rank row of the first gap that holds `rows`; the end of all when none does."""
        start = 0
        for offset, used in sorted(self._spans.values()):
            if offset - start >= rows:
                break
            start = offset + used
        return start

    def _reserve(self, rows: int, slots: int) -> None:
        """Grow the buffers so that they hold that many rank rows and slots."""
        for names, needed in (
            (("A_rows", "B_rows", "constant"), rows),
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Pool":
        """Move or cast with the layer; the scaling keeps at least fp32 under .half()."""
        scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = torch.promote_types(self.A_rows.dtype, torch.float32)
        if self.scaling.dtype != dtype:
            self.scaling = scaling.to(self.scaling.device, dtype)
        return self
