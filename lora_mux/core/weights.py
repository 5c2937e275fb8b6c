"""One adapter's part of one layer, what must be true of it, and what is trained of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ArgumentTypeError, RoutingError, TrainingError
from .routing import host_may_read
from .streams import is_capturing, to_device


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's part of one layer, where y is the base's own output:

    delta(x) = scaling * (B (A x) + bias + gain * (y - the base's bias))
    """

    A: Tensor  # [r, in_features]
    B: Tensor  # [out_features, r]
    scaling: float  # alpha / r, or alpha / sqrt(r) for rsLoRA
    bias: Tensor | None = None  # [out_features]: PEFT's lora_bias
    gain: Tensor | None = None  # [out_features]: DoRA's, magnitude / norm - 1

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {"A": self.A, "B": self.B, "bias": self.bias, "gain": self.gain}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device, dtype: torch.dtype) -> "LoraWeights":
        """The same on a device, in a dtype."""
        moved: dict[str, Any] = {
            name: tensor.detach().to(device, dtype) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def cloned(self) -> "LoraWeights":
        """The same values in tensors of their own."""
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return replace(self, **copies)

    def check_shapes(self, in_features: int, out_features: int, argument: str) -> None:
        """Refuse factors of other shapes than the layer's, by an error that names `argument`."""
        K, N = in_features, out_features
        check_shape(self.A, f"{argument}.A", (None, K), "[r, in_features]")
        r = self.A.shape[0]
        if r < 1:
            raise AdapterError(f"`{argument}.A` must have a rank of at least 1, got 0")
        check_shape(self.B, f"{argument}.B", (N, r), "[out_features, r]")
        for name in ("bias", "gain"):
            if getattr(self, name) is not None:
                check_shape(getattr(self, name), f"{argument}.{name}", (N,), "[out_features]")

    def check_values(self, dtype: torch.dtype, argument: str) -> None:
        """Refuse factors that are not finite in a pool's dtype, or that have no values."""
        for name, tensor in self.tensors().items():
            if tensor.is_meta:
                raise AdapterError(
                    f"`{argument}.{name}` must hold values, got a tensor on the meta device"
                )
            # 0 x NaN is NaN: one tenant's bad weights could reach another tenant's rows.
            if not is_finite(tensor, dtype):
                values = tensor.detach().to(dtype)
                raise AdapterError(
                    f"`{argument}.{name}` must be finite in the pool's {dtype}, got "
                    f"{int((~values.isfinite()).sum())} values that are not"
                )


class Masters(NamedTuple):
    """What is trained of one adapter in one layer: parameters of PEFT's shapes, in fp32 or more.

    The rank rows of the pool are these, rounded.
    """

    A: nn.Parameter  # [r, in_features]
    B: nn.Parameter  # [out_features, r]; it lies rank-major, as the pool and the gradients do
    bias: nn.Parameter | None  # [out_features]: PEFT's lora_bias
    scaling: float

    @classmethod
    @torch.inference_mode(False)  # else no pass could tell whether they have changed
    def of(cls, weights: LoraWeights, device: torch.device) -> "Masters":
        """Parameters that begin with the values of factors."""

        def parameter(values: Tensor) -> nn.Parameter:
            dtype = torch.promote_types(values.dtype, torch.float32)
            return nn.Parameter(values.detach().to(device, dtype, copy=True))

        A, B, bias = weights.A.contiguous(), weights.B.T.contiguous(), weights.bias
        rows = parameter(B)
        rows.data = rows.data.T
        return cls(parameter(A), rows, None if bias is None else parameter(bias), weights.scaling)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that there are, in PEFT's order."""
        return [self.A, self.B, *([] if self.bias is None else [self.bias])]

    @property
    def weights(self) -> LoraWeights:
        """The factors as they are now; not copies."""
        bias = None if self.bias is None else self.bias.detach()
        return LoraWeights(self.A.detach(), self.B.detach(), self.scaling, bias)

    @property
    def rows(self) -> list[Tensor]:
        """The values as a pool has them: A [r, in_features], B [r, out_features], bias [1, ...]."""
        rows = [self.A.data, self.B.data.T]
        return rows if self.bias is None else [*rows, self.bias.data[None]]

    def move(self, device: torch.device) -> None:
        """Bring the values to a device; the parameters stay the ones that optimizers hold."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(device)


def dropout_of_rows(dropout: Mapping[int, float], slots: Tensor) -> Tensor:
    """How large a share of each row of x is dropped, [M, 1], before the A of trained adapters.

    Adapters of one row have one x. Where theirs are unequal it is NaN, if the host may not read the
    slots.

    Args:
        dropout: of slots, from above 0 to below 1. No class of ours: torch.compile knows of no
            other mapping than dict whether it is empty, before torch 2.7.
        slots: [M, J].

    Raises:
        RoutingError: the host may, and there is such a row.
        TrainingError: a CUDA graph is being captured, which nothing can be copied into.
    """
    if is_capturing(slots.device):
        raise TrainingError(
            "a CUDA graph must be captured of a pass that drops nothing, got one of a model in "
            "train() beside adapters with dropout; call eval() on the model, or on what "
            "train(name) returned, before capturing"
        )
    highest = max([0, *dropout])  # no default=, which torch.compile does not know
    table = torch.zeros(highest + 1, dtype=torch.float32)
    for slot, rate in dropout.items():
        table[slot] = rate
    (rates,) = to_device([table], slots.device)
    known = (slots >= 0) & (slots < len(table))
    each = torch.where(known, rates[torch.where(known, slots, 0).long()], 0.0)
    most = each.amax(1, True)
    if slots.shape[1] == 1:
        return most
    unequal = ((each != most) & (slots >= 0)).any(1, True)
    if host_may_read(slots) and bool(unequal.any()):
        row = int(unequal.flatten().nonzero()[0])
        raise RoutingError(
            "`rows` must name adapters of one dropout in each row while they are trained, got "
            f"{sorted(each[row][slots[row] >= 0].tolist())}; give them the same, or call "
            "eval() on what train() returned"
        )
    return torch.where(unequal, torch.nan, most)


def on_diagonal(factor: Tensor, blocks: int) -> Tensor:
    """A matrix [n, blocks * m] of a factor [n, m] whose rows hold the blocks of its diagonal."""
    whole: Tensor = torch.block_diag(*factor.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


def rank_of(weights: LoraWeights) -> int:
    """The rank that kernels see: a bias is one more."""
    return weights.A.shape[0] + (weights.bias is not None)


def rank_rows(weights: LoraWeights) -> int:
    """How many rank rows it takes: those of its rank, and one for a gain."""
    return rank_of(weights) + (weights.gain is not None)


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


def check_shape(tensor: object, argument: str, shape: tuple[int | None, ...], words: str) -> None:
    """Refuse what is no floating tensor of a shape, in which None is any number.

    Args:
        argument: what error messages call it.
        words: what they call the shape.
    """
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
