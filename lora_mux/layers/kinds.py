"""Kinds of layers: how inputs, outputs and factors become those of a linear map of rows.

    linear       y = W x for rows x [K]
    embedding    a row is a one-hot vector, and given by its number: A x is a column of A
    convolution  a row is the patch of one place, and W the kernel, flattened

So routing, pools and kernels know rows of vectors only, or of numbers. PEFT's factors are cut to
them. A shard of a linear layer (sharding.py) is of this form as well.

Source: peft 0.21, src/peft/tuners/lora/layer.py (Embedding, _ConvNd).
"""

from collections.abc import Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import ops
from ..core import LoraWeights, Pool, on_diagonal
from ..errors import AdapterError, InputError, TargetError
from .sharding import is_dtensor

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kind(Protocol):
    """What a layer is, where it is not a whole linear layer."""

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features) of the linear map."""

    def cut(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """Factors as the pool holds them, of those that a user or a checkpoint gives."""

    def local(self, x: Tensor) -> Tensor:
        """The rows of an input: [..., in_features], or ints [..., 1], the numbers of one-hot rows.

        Raises:
            InputError: it is no input of such a layer.
        """

    def add(self, plan: ops.Plan, y: Any, x: Tensor, pool: Pool, weight: Any) -> Tensor:
        """y as the layer's own forward returns it, plus the adapters' part.

        Args:
            x: as `local` returns it.
            weight: of the layer.
        """


class Embedding(NamedTuple):
    """A table whose rows the numbers of tokens choose."""

    num_embeddings: int
    embedding_dim: int
    scale: float = 1.0  # what the layer multiplies its rows with, as Gemma 3 does

    @property
    def sizes(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def cut(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """A [r, num_embeddings] and B [embedding_dim, r], as PEFT has them."""
        gain = weights.gain if weights.gain is None else weights.gain / self.scale
        return replace(weights, scaling=weights.scaling * self.scale, gain=gain)

    def local(self, x: Tensor) -> Tensor:
        """[..., 1] of ids [...]."""
        if x.is_floating_point():
            raise InputError(f"`x` must hold the numbers of tokens, got {x.dtype}")
        return x[..., None]

    def add(self, plan: ops.Plan, y: Tensor, x: Tensor, pool: Pool, weight: Any) -> Tensor:
        """y [..., embedding_dim] plus the adapters' part."""
        return plan.add(y, x, pool, owned=False)


class Convolution(NamedTuple):
    """A convolution of one to three dimensions: W is applied to the patch around each place."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # of each dimension, before and after
    groups: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_channels * the kernel's size, out_channels)."""
        return self.in_channels * torch.Size(self.kernel).numel(), self.out_channels

    def cut(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """A [r, in_channels, *kernel] and B [out_channels, r / groups, 1, ...], as matrices."""
        A, B = weights.A, weights.B
        if A.ndim != 2 and A.shape[1:] != (self.in_channels, *self.kernel):
            raise AdapterError(
                f"`{argument}.A` must have shape [r, {self.in_channels}, "
                f"{', '.join(map(str, self.kernel))}] (r, in_channels, kernel), got {list(A.shape)}"
            )
        if B.ndim == 2 + len(self.kernel) and B.shape[2:].numel() == 1:
            B = B.flatten(1)
        if B.ndim == 2 and B.shape[1] * self.groups == len(A):
            B = on_diagonal(B, self.groups)
        return replace(weights, A=A.flatten(1), B=B)

    def local(self, x: Tensor) -> Tensor:
        """Patches [samples, *places, in_channels * kernel] of x [samples, in_channels, *sizes]."""
        dimensions = len(self.kernel)
        if x.ndim not in (dimensions + 1, dimensions + 2) or (
            x.shape[-dimensions - 1] != self.in_channels
        ):
            sizes = ", ".join(["size"] * dimensions)
            raise InputError(
                f"`x` must have shape [samples, {self.in_channels}, {sizes}], got {list(x.shape)}"
            )
        if x.ndim == dimensions + 1:
            x = x[None]
        if any(map(any, self.padding)):  # with zeros, whatever the layer's own mode, as in PEFT
            x = pad(x, [size for sides in reversed(self.padding) for size in sides])
        for i, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True)):
            x = x.unfold(2 + i, size, step)
        return x.movedim(1, 1 + dimensions).flatten(1 + dimensions)

    def add(self, plan: ops.Plan, y: Tensor, x: Tensor, pool: Pool, weight: Any) -> Tensor:
        """y [samples, out_channels, *places] plus the adapters' part, laid out as y is."""
        places = y.movedim(-len(self.kernel) - 1, -1)
        rows = places.contiguous()
        owned = not places.is_contiguous()  # else it is y itself
        added = plan.add(rows, x.view(*rows.shape[:-1], x.shape[-1]), pool, owned)
        added = added.movedim(-1, -len(self.kernel) - 1)
        return added.contiguous() if y.is_contiguous() else added


def own_class(module: nn.Module) -> Any:
    """The class of a layer before it became a MuxLinear."""
    kind: type = type(module)
    return kind.__bases__[1] if hasattr(module, "mux_pool") else kind


def is_plain(module: nn.Module) -> bool:
    """Whether a layer's class computes W x + b as torch's own does, and nothing else.

    Subclasses may look up positions, standardise W or pad x. Scaled embeddings are plain, too.
    """
    kind = own_class(module)
    if isinstance(module, nn.Embedding):
        return kind.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    for base in CONVOLUTIONS:
        if isinstance(module, base):
            torchs = base.forward, base._conv_forward
            return (kind.forward, kind._conv_forward) == torchs
    transformers = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return transformers or kind.forward is nn.Linear.forward


def plain_weight(layer: Any, x: Tensor) -> Tensor | None:
    """The weight of a MuxLinear whose base is x W^T + bias and no more.

    None for a forward that is not nn.Linear's own, and a parametrised or quantised weight.
    """
    if not layer.mux_owns_output:
        return None
    own = layer._parameters  # nn.Module's own look-up takes 1 us
    weight, bias = own.get("weight"), own.get("bias", x)  # x: it is none of the layer's own
    if type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, NoneType):
        return None
    if weight.device != x.device or weight.stride(1) != 1:
        return None
    if bias is not None and bias.shape[0] > 1 and bias.stride(0) != 1:
        return None
    return weight


def fusable_weight(layer: Any, x: Tensor) -> Tensor | None:
    """The weight of a MuxLinear where base and adapters can be one launch for x, else None."""
    if not layer.mux_settings.may_fuse(x) or layer.mux_kind is not None:
        return None
    weight = plain_weight(layer, x)
    return None if ops.tracked(x, weight, layer._parameters.get("bias")) else weight


def frozen_weight(layer: Any, x: Tensor, plan: ops.WholePlan) -> Tensor | None:
    """The weight where base and adapters can be one node for autograd, else None.

    Not while torch.compile traces, which then can fuse nothing with the base's product.
    """
    pool = layer.mux_pool
    if torch.compiler.is_compiling() or layer.mux_kind is not None or pool.has_gains:
        return None
    # torch adds the bias of other rows in a step of its own, which rounds once more.
    if torch.is_autocast_enabled(x.device.type) or not x.is_contiguous():
        return None
    if not plan.follows(x, pool):
        return None
    weight = plain_weight(layer, x)
    if weight is None or ops.tracked(weight, layer._parameters.get("bias")):
        return None
    return weight if weight.dtype == x.dtype else None


def kind_of(module: nn.Module, argument: str) -> Embedding | Convolution | None:
    """The kind of an embedding or a convolution; None for any other module.

    Raises:
        TargetError: it is one that PEFT cannot adapt either, or whose adapters would be wrong.
    """
    if isinstance(module, (nn.Embedding, *CONVOLUTIONS)):
        own = "a forward of its own, with which adapters would mean something else"
        _refuse(module, argument, not is_plain(module), own)
    if isinstance(module, nn.Embedding):
        _refuse(module, argument, module.max_norm is not None, "max_norm, which changes A as well")
        scale = getattr(module, "embed_scale", 1.0)
        single = isinstance(scale, int | float) or (
            isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_meta
        )
        _refuse(module, argument, not single, "an embed_scale that is not one number")
        return Embedding(module.num_embeddings, module.embedding_dim, float(scale))
    if isinstance(module, CONVOLUTIONS):
        kernel = tuple(module.kernel_size)
        dilated = any(d > 1 < size for d, size in zip(module.dilation, kernel, strict=True))
        _refuse(module, argument, dilated, "dilation, which PEFT's A does not have")
        return Convolution(
            *(module.in_channels, module.out_channels, kernel, tuple(module.stride)),
            *(_padding(module.padding, kernel), module.groups),
        )
    return None


def _refuse(module: nn.Module, argument: str, wrong: bool, why: str) -> None:
    split = is_dtensor(module._parameters.get("weight"))
    if wrong or split:
        raise TargetError(
            f"`{argument}` must be a layer that can carry adapters, got {type(module).__name__} "
            f"with {'a weight that is split over processes' if split else why}"
        )


def _padding(padding: str | Sequence[int], kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """What is added before and after each dimension."""
    if isinstance(padding, str):  # "valid", or "same", where what is odd comes after
        same = padding == "same"
        return tuple(((k - 1) // 2, k // 2) if same else (0, 0) for k in kernel)
    return tuple((size, size) for size in padding)
