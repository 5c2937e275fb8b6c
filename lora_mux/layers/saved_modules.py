"""Modules that an adapter saved as a whole, as what they are more than the base's.

A linear layer with weight W and bias b, in the place of one with W_0 and b_0, is an adapter of full
rank, whose weight is always 1:

    W x + b = (W_0 x + b_0) + (W - W_0) x + (b - b_0)

So is an embedding, over one-hot rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core import LoraWeights
from .targets import features


def difference(module: nn.Module, values: Mapping[str, Tensor]) -> LoraWeights | None:
    """The adapter that makes a layer the one that was saved.

    Args:
        module: a linear layer or an embedding of the base, whose parameters are plain tensors.
        values: what was saved of it, "weight" and "bias", in the shapes of the layer's own; what is
            not there is equal to the layer's.

    Returns:
        Factors in the layer's dtype: the difference W - W_0, rounded once, and an identity, which
        makes the rank the shorter side of W, or the width of an embedding. None if the layer is
        another one.
    """
    is_embedding = isinstance(module, nn.Embedding)
    K, N = _sizes(module)
    if not K or not values.keys() <= {"weight", "bias"}:
        return None
    more = {name: _more(value, module.get_parameter(name)) for name, value in values.items()}
    bias = more.get("bias")
    if bias is not None and "weight" not in more:
        return LoraWeights(bias.new_zeros(1, K), bias.new_zeros(N, 1), 1.0, bias)
    W = more["weight"]
    if not isinstance(module, nn.Linear) and W.shape == (K, N):  # an embedding, or Conv1D
        W = W.T
    is_flat = N <= K or is_embedding  # nobody multiplies with A of an embedding: it is looked up
    ones = torch.eye(N if is_flat else K, dtype=W.dtype)
    A, B = (W, ones) if is_flat else (ones, W)
    return LoraWeights(A, B, 1.0, bias)


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return features(module)


def _more(saved: Tensor, own: Tensor) -> Tensor:
    own = own.detach().cpu()
    wide = torch.promote_types(own.dtype, torch.float32)
    return (saved.detach().cpu().to(wide) - own.to(wide)).to(own.dtype)
