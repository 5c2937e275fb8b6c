"""Modules that an adapter saved as a whole, as what they are more than the base's.

A linear layer with weight W and bias b, in the place of one with W_0 and b_0, is an adapter of full
rank, whose weight is always 1:

    W x + b = (W_0 x + b_0) + (W - W_0) x + (b - b_0)

So is an embedding, over one-hot rows, and a convolution, over patches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core import LoraWeights
from .kinds import CONVOLUTIONS, is_plain
from .targets import features, in_features


def difference(module: nn.Module, values: Mapping[str, Tensor]) -> LoraWeights | None:
    """The adapter that makes a layer the one that was saved.

    Args:
        module: a layer of the base, whose parameters are plain tensors.
        values: what was saved of it, "weight" and "bias", in the shapes of the layer's own; what is
            not there is equal to the layer's.

    Returns:
        Factors in the layer's dtype, in PEFT's shapes: the difference W - W_0, rounded once, and an
        identity. That makes the rank the shorter side of W, or the width of an embedding or a
        convolution; or the number of rows of the weight that differ, where those are fewer. None if
        no factors make a layer of this kind another one.
    """
    if not values.keys() <= {"weight", "bias"} or not _is_one_product(module):
        return None
    more = {name: _more(value, module.get_parameter(name)) for name, value in values.items()}
    bias = more.get("bias")
    if bias is not None and "weight" not in more:
        K, N = in_features(module), len(bias)
        return LoraWeights(bias.new_zeros(1, K), bias.new_zeros(N, 1), 1.0, bias)
    W = more["weight"]
    is_embedding, transposed = isinstance(module, nn.Embedding), hasattr(module, "nx")  # Conv1D
    changed = W.flatten(1).any(1).nonzero()[:, 0]
    if W.ndim == 2 and not transposed and len(changed) < min(W.shape):  # new tokens, above all
        return _of_rows(W, changed, is_embedding, bias)
    if is_embedding or transposed:
        W = W.T
    is_flat = not features(module)[0] or len(W) <= W.shape[1]
    ones = torch.eye(len(W) if is_flat else W.shape[1], dtype=W.dtype)
    A, B = (W, ones) if is_flat else (ones, W)
    return LoraWeights(A, B, 1.0, bias)


def with_rows(weight: Tensor, rows: Sequence[int], trained: Tensor) -> Tensor:
    """A copy of a weight in which some rows are trained ones, in the wider dtype of both."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, trained.dtype), copy=True)
    wide[list(rows)] = trained.to(wide)
    return wide


def _of_rows(W: Tensor, changed: Tensor, is_embedding: bool, bias: Tensor | None) -> LoraWeights:
    """The factors of a difference that is 0 but for a few rows of a weight."""
    if not len(changed):  # by rounding
        changed = torch.zeros(1, dtype=torch.long)
    rows, places = W[changed], W.new_zeros(len(changed), len(W))
    places[torch.arange(len(changed)), changed] = 1
    A, B = (places, rows.T) if is_embedding else (rows, places.T)
    return LoraWeights(A, B, 1.0, bias)


def _is_one_product(module: nn.Module) -> bool:
    """Whether a layer is W x + b, with the same x for W as for an adapter's A."""
    if not is_plain(module):
        return False
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Embedding) or features(module)[0] > 0


def _more(saved: Tensor, own: Tensor) -> Tensor:
    wide = torch.promote_types(own.dtype, torch.float32)
    more = saved.detach().to("cpu", wide, copy=True)
    return more.sub_(own.detach().cpu()).to(own.dtype)
