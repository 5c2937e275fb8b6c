"""DoRA: adapters that also rescale what the base answers.

    y[m] = y0 + sum_j weight[m, j] * ((g[i] - 1) * (y0 - b) + g[i] * scaling[i] * B[i] (A[i] x[m]))

for i = index[m, j] and the base's own y0 = W x[m] + b. With g = magnitude / norm, where norm holds
the length of each row of W + scaling * B A, this is PEFT's formula. g is known once the adapter is
loaded: B is kept times g and scaling, and g - 1 is the adapter's gain, one more rank row.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..core import Gains, LoraWeights, Pool
from ..errors import AdapterError
from .sharding import is_dtensor
from .targets import features

READ_AT_ONCE = 1 << 24  # elements of the base's weight: 64 MB in fp32
# Times the identity: what a base in bf16 answers is rounded after its bias was added, which may be
# a hundred times as large as the weights.
MUCH = 64.0


def add_with_gains(plan: ops.Plan, y: Tensor, x: Tensor, pool: Pool, bias: object) -> Tensor:
    """y [..., N] plus all that the adapters of a pool change, of which some may have gains.

    Args:
        y: what the base answers.
        x: [..., K].
        bias: the base's own, which a gain leaves alone; no tensor = there is none.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    zeros = torch.zeros_like(y, dtype=dtype, memory_format=torch.contiguous_format)
    gain = plan.add(zeros, x.detach()[..., :1], Gains(pool), owned=True)
    own = y.to(dtype) - bias.to(dtype) if isinstance(bias, Tensor) else y.to(dtype)
    # Rows without a gain: infinity times 0 would be NaN.
    own = torch.where((gain == 0) & ~own.isfinite(), 0.0, own)
    change = plan.add(gain * own, x, pool, owned=True)
    changed = (y + change).to(y.dtype)
    selecting = plan.selecting
    if selecting is None:
        return changed
    return torch.where(selecting.reshape(*y.shape[:-1], 1), changed, y)


@torch.no_grad()
def with_gain(
    linear: nn.Module, weights: LoraWeights, magnitude: Tensor, dtype: torch.dtype, argument: str
) -> LoraWeights:
    """The factors of a DoRA adapter as a pool holds them, in fp32 or more. Reads the base's weight.

    Args:
        linear: the base layer, or the MuxLinear that it has become.
        weights: A, B and the scaling of the adapter, without a bias.
        magnitude: [out_features].
        dtype: in which the layer computes.
        argument: what error messages call the adapter.

    Raises:
        AdapterError: the base's weight cannot be read here, shapes do not fit, or norms are 0.
        ArgumentTypeError: a factor is not a floating tensor.
    """
    _check_readable(linear, argument)
    if weights.bias is not None:
        raise AdapterError(
            f"`{argument}.bias` must be None for DoRA, got a tensor: PEFT has no formula for both"
        )
    K, N = features(linear)
    replace(weights, gain=magnitude).check_shapes(K, N, argument)
    wide = torch.promote_types(dtype, torch.float32)
    device = next(iter([*linear.parameters(), *linear.buffers()]), weights.A).device
    A, B, m = (t.detach().to(device, wide) for t in (weights.A, weights.B, magnitude))
    B = B * weights.scaling
    squares = torch.zeros(N, dtype=wide, device=device)
    with torch.autocast(device.type, enabled=False):
        for part, columns in _transposed(linear, K, N, dtype, device, argument):
            squares += (columns.to(wide) + A[:, part].T @ B.T).square().sum(0)
    g = m / squares.sqrt()
    if not g.isfinite().all():
        raise AdapterError(
            f"`{argument}`: DoRA needs rows of W + scaling * B A that are not 0, and a finite "
            f"magnitude, got {int((~g.isfinite()).sum())} of {N} rows without"
        )
    return LoraWeights(A, B * g[:, None], 1.0, gain=g - 1)


def _check_readable(linear: nn.Module, argument: str) -> None:
    """Refuse a layer whose weight is not here, or not of x W^T."""
    got = ""
    if features(linear) == (0, 0):
        got = f"a {type(linear).__name__}, which is no linear layer"
    for tensor in (*linear.parameters(), *linear.buffers()):
        if is_dtensor(tensor):
            got = "one that is split over processes"
        elif tensor.is_meta:
            got = "one that is offloaded or not materialised"
    own = linear._parameters.get("weight")
    if type(own) is nn.Parameter and own.is_floating_point() and not own.is_meta:
        K, N = features(linear)
        if not got and own.shape not in ((N, K), (K, N)):
            got = f"one of shape {list(own.shape)}, which is split or packed"
    if got:
        raise AdapterError(
            f"`{argument}`: DoRA needs the whole weight of its base layer, got {got}"
        )


def _transposed(
    linear: Any, K: int, N: int, dtype: torch.dtype, device: torch.device, argument: str
) -> Iterator[tuple[slice, Tensor]]:
    """W^T [K, N], some of its rows at a time.

    Of nn.Linear it is read. Any other layer, quantised ones among them, is asked what it answers
    to the identity.
    """
    at_once = max(1, READ_AT_ONCE // max(K, N))
    parts = [slice(start, min(start + at_once, K)) for start in range(0, K, at_once)]
    muxed, own = hasattr(linear, "mux_pool"), type(linear).forward is nn.Linear.forward
    plain = linear.mux_owns_output if muxed else own and "forward" not in vars(linear)
    weight = linear._parameters.get("weight")
    if plain and type(weight) is nn.Parameter and weight.is_floating_point():
        yield from ((part, weight[:, part].T) for part in parts)
        return
    base = linear.mux_base if muxed else linear.forward
    bias = getattr(linear, "bias", None)
    constant = base(torch.zeros(1, K, dtype=dtype, device=device))
    known = bias.to(constant) if isinstance(bias, Tensor) else torch.zeros_like(constant[0])
    if not torch.allclose(constant[0], known, rtol=2**-6, atol=1e-6):
        raise AdapterError(
            f"`{argument}`: DoRA needs a base layer that is x W^T + its `bias`, got "
            f"{type(linear).__name__}, which answers something else to zeros"
        )
    for part in parts:
        rows = torch.zeros(part.stop - part.start, K, dtype=dtype, device=device)
        rows[:, part].fill_diagonal_(MUCH)
        yield part, (base(rows).double() - constant.double()) / MUCH
