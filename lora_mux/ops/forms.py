"""The forms in which adapters are computed, and what a plan of any form can do."""

from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..core import AnyPool

# "operators" is the reference behind operators, "triton" the kernels behind the same ones, and
# "fused" the kernels with the base layer in the same launch.
Form: TypeAlias = Literal["reference", "cpu", "operators", "triton", "fused"]


class Method(NamedTuple):
    """How the adapters of a layer are computed; layers with the same method share a plan."""

    form: Form
    block_m: int = 0  # rows of a tile; the host's forms have none
    batch_invariant: bool = False
    trained: bool = False  # there are adapters whose parameters autograd may follow

    @property
    def on_host(self) -> bool:
        """Whether the host reads the index, and raises for a handle that is not alive."""
        return self.form in ("reference", "cpu")


class Plan(Protocol):
    """Which rows of a batch get which adapters: made once for all layers of a forward pass."""

    @property
    def strength(self) -> Tensor:
        """What autograd follows back to the routing's weights."""

    def with_strength(self, strength: Tensor) -> "Plan":
        """The plan with another tensor of equal values there."""

    @property
    def selecting(self) -> Tensor | None:
        """[M, 1] bool: the rows that select an adapter; None = all do."""

    def touches(self, pool: AnyPool) -> bool:
        """Whether a row may select what is in a pool; True where only the device knows."""

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; y itself when no adapter is here.

        Args:
            owned: nobody else holds y's storage, so that it may be written to.
        """


def plain(one: Tensor, other: Tensor) -> bool:
    """Whether torch's dispatcher would do no more than call what computes.

    Not for subclasses, nor where something looks on or takes a call for another: torch.compile and
    export, torch.jit.trace, modes (FakeTensorMode, selective checkpointing), functorch. What
    autograd follows is told by `tracked`.
    """
    return (
        type(one) is type(other) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is computed from them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def dropped(x: Tensor, rates: Tensor) -> Tensor:
    """x [..., K] with a share of it at 0, and the rest larger by as much: nn.Dropout, row by row.

    Args:
        x: whose rows are M.
        rates: [M, 1], from 0 (every bit stays) to below 1; NaN makes all of a row NaN.
    """
    p = rates.view(*x.shape[:-1], 1)
    # Of torch's own generator, whose state checkpointing restores.
    kept = torch.rand(x.shape, device=x.device) >= p
    return torch.where(kept, x / (1 - p).to(x.dtype), torch.where(p.isnan(), p, 0.0).to(x.dtype))
