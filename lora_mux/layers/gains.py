"""DoRA: adapters that also rescale what the base answers.

    y[m] = y0 + sum_j weight[m, j] * ((g[i] - 1) * (y0 - b) + g[i] * scaling[i] * B[i] (A[i] x[m]))

for i = index[m, j] and the base's own y0 = W x[m] + b. With g = magnitude / norm, where norm holds
the length of each row of W + scaling * B A, this is PEFT's formula. g is known once the adapter is
loaded: B is kept times g and scaling, and g - 1 is the adapter's gain, one more rank row.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..core import AnyPool, Gains, LoraWeights, Pool, check_shape
from ..errors import AdapterError
from .kinds import Convolution, Embedding, Kind
from .sharding import is_dtensor
from .targets import check_target

READ_AT_ONCE = 1 << 24  # elements of the base's weight: 64 MB in fp32
# Times the identity: what a base in bf16 answers is rounded after its bias was added, which may be
# a hundred times as large as the weights.
MUCH = 64.0


class Rescaling(NamedTuple):
    """A plan for a layer whose adapters may have gains: it adds all that they change."""

    plan: ops.Plan
    bias: object  # the base's own, which a gain leaves alone; no tensor = there is none

    @property
    def strength(self) -> Tensor:
        """The plan's."""
        return self.plan.strength

    def with_strength(self, strength: Tensor) -> "Rescaling":
        """With another tensor of equal values there."""
        return self._replace(plan=self.plan.with_strength(strength))

    @property
    def selecting(self) -> Tensor | None:
        """The plan's."""
        return self.plan.selecting

    def touches(self, pool: AnyPool) -> bool:
        """The plan's."""
        return self.plan.touches(pool)

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N], as the base answers it, plus all that the adapters change; see ops.Plan."""
        assert isinstance(pool, Pool)
        dtype, bias = torch.promote_types(y.dtype, torch.float32), self.bias
        zeros = torch.zeros_like(y, dtype=dtype, memory_format=torch.contiguous_format)
        gain = self.plan.add(zeros, zeros.new_zeros((*y.shape[:-1], 1)), Gains(pool), owned=True)
        own = y.to(dtype) - bias.to(dtype) if isinstance(bias, Tensor) else y.to(dtype)
        # Rows without a gain: infinity times 0 would be NaN.
        own = torch.where((gain == 0) & ~own.isfinite(), 0.0, own)
        change = self.plan.add(gain * own, x, pool, owned=True)
        changed, selecting = (y + change).to(y.dtype), self.selecting
        if selecting is None:
            return changed
        return torch.where(selecting.reshape(*y.shape[:-1], 1), changed, y)


def rescaling(plan: ops.Plan, pool: Pool, layer: nn.Module) -> ops.Plan:
    """The plan for a layer, whose pool may hold gains: itself if it reaches none of them."""
    return Rescaling(plan, getattr(layer, "bias", None)) if plan.touches(Gains(pool)) else plan


@torch.no_grad()
def with_gain(
    layer: nn.Module, weights: LoraWeights, magnitude: Tensor, dtype: torch.dtype, argument: str
) -> LoraWeights:
    """The factors of a DoRA adapter as a layer takes them, in fp32 or more.

    The base's weight is read for it: once, and a part of it at a time.

    Args:
        layer: the base layer, or the MuxLinear that it has become.
        weights: A, B and the scaling of the adapter, without a bias.
        magnitude: [out_features], or as PEFT has those of convolutions, [1, out_channels, 1, ...].
        dtype: in which the layer computes.
        argument: what error messages call the adapter.

    Raises:
        AdapterError: the base's weight cannot be read here, shapes do not fit, or norms are 0.
        ArgumentTypeError: a factor is not a floating tensor.
        TargetError: the layer cannot carry adapters.
    """
    base = _Base.of(layer, dtype, argument)
    if weights.bias is not None:
        raise AdapterError(
            f"`{argument}.bias` must be None for DoRA, got a tensor: PEFT has no formula for both"
        )
    given, groups = (weights.A, weights.B, magnitude), 1
    if isinstance(base.kind, Convolution) and all(isinstance(t, Tensor) for t in given):
        groups = base.kind.groups
        weights = base.kind.cut(weights, argument)
        if magnitude.shape == (1, base.N, *[1] * len(base.kind.kernel)):
            magnitude = magnitude.flatten()
    weights.check_shapes(base.K, base.N, argument)
    check_shape(magnitude, f"{argument}.magnitude", (base.N,), "[out_features]")
    wide = torch.promote_types(dtype, torch.float32)
    replace(weights, gain=magnitude).check_values(wide, argument)
    A, B, m = (t.detach().to(base.device, wide) for t in (weights.A, weights.B, magnitude))
    B = B * weights.scaling
    squares = torch.zeros(base.N, dtype=wide, device=base.device)
    with torch.autocast(base.device.type, enabled=False):
        if groups > 1 and base.weight is not None:
            # As PEFT does, which takes B's numbers in another order than the convolution.
            delta = (given[1].detach().to(B) * weights.scaling).reshape(-1, len(A)) @ A
            squares = (base.weight.to(wide).flatten() + delta.flatten()).square()
            squares = squares.view(base.N, -1).sum(1)
        else:
            for part, columns in base.columns(argument):
                squares += (columns.to(wide) + A[:, part].T @ B.T).square().sum(0)
    g = m / squares.sqrt()
    if not g.isfinite().all():
        raise AdapterError(
            f"`{argument}`: DoRA needs rows of W + scaling * B A that are not 0, got "
            f"{int((~g.isfinite()).sum())} of {base.N} that are"
        )
    return LoraWeights(A, B * g[:, None], 1.0, gain=g - 1)


class _Base(NamedTuple):
    """A base layer whose weight can be read: a linear map of rows [K] to [N]."""

    layer: Any
    kind: Kind | None
    K: int
    N: int
    weight: Tensor | None  # the layer's own, if it is plain and nothing else is computed with it
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype, argument: str) -> "_Base":
        """The layer, if its whole weight is here."""
        muxed = isinstance(getattr(layer, "mux_pool", None), Pool)
        held: Any = layer
        if muxed:
            kind, sizes = held.mux_kind, (held.mux_pool.in_features, held.mux_pool.out_features)
            plain = held.mux_owns_output or isinstance(held, nn.Linear)
        else:
            _, kind = target = check_target(layer, argument)
            sizes = target.sizes
            plain = isinstance(held, nn.Linear)
        tensors = [*layer.parameters(), *layer.buffers()]
        own = layer._parameters.get("weight")
        floating = type(own) is nn.Parameter and own.is_floating_point()
        groups = kind.groups if isinstance(kind, Convolution) else 1
        got = ""
        if any(map(is_dtensor, tensors)):
            got = "one that is split over processes"
        elif any(tensor.is_meta for tensor in tensors):
            got = "one that is offloaded or not materialised"
        elif floating and own is not None and own.numel() * groups != sizes[0] * sizes[1]:
            got = f"one of shape {list(own.shape)}, which is split or packed"
        elif kind is not None and not floating:
            got = "one that is quantised"
        if got:
            raise AdapterError(
                f"`{argument}`: DoRA needs the whole weight of its base layer, got {got}"
            )
        readable = floating and (plain or kind is not None)
        device = tensors[0].device if tensors else torch.device("cpu")
        return cls(layer, kind, *sizes, own if readable else None, dtype, device)

    def columns(self, argument: str) -> Iterator[tuple[slice, Tensor]]:
        """W^T [K, N], some of its rows at a time.

        Of a layer that is not plain, as quantised ones, it is what it answers to the identity.
        """
        at_once = max(1, READ_AT_ONCE // max(self.K, self.N))
        parts = [slice(k, min(k + at_once, self.K)) for k in range(0, self.K, at_once)]
        if self.weight is not None:
            flat = self.weight if isinstance(self.kind, Embedding) else self.weight.flatten(1).T
            yield from ((part, flat[part]) for part in parts)
            return
        base = getattr(self.layer, "mux_base", self.layer.forward)
        made = functools.partial(torch.zeros, dtype=self.dtype, device=self.device)
        constant, bias = base(made(1, self.K)), getattr(self.layer, "bias", None)
        known = bias.to(constant) if isinstance(bias, Tensor) else torch.zeros_like(constant[0])
        if not torch.allclose(constant[0], known, rtol=2**-6, atol=1e-6):
            raise AdapterError(
                f"`{argument}`: DoRA needs a base layer that is x W^T + its `bias`, got "
                f"{type(self.layer).__name__}, which answers something else to zeros"
            )
        for part in parts:
            rows = made(part.stop - part.start, self.K)
            rows[:, part].fill_diagonal_(MUCH)
            yield part, (base(rows).double() - constant.double()) / MUCH
