"""Layers that tensor parallelism has split: each process adds the part of the delta that it holds.

    by columns, W_k = rows k of W [N, K]:      y_k = W_k x + scaling * B_k (A x)
    by rows,    W_k = columns k of W [N, K]:   y = sum_k (W_k x_k + scaling * B (A_k x_k))

The sum over processes is the engine's own: the delta joins the base's partial sums before it, so
that no communication is added. transformers splits by closures on the instance, torch's
parallelize_module by hooks and DTensors.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..core import LoraWeights, Pool
from ..errors import AdapterError, TargetError


class Shard(NamedTuple):
    """What this process holds of a layer."""

    way: Literal["columns", "rows"]
    place: int  # of this process, among
    of: int

    in_features: int  # of the whole layer
    out_features: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features) of the shard."""
        if self.way == "columns":
            return self.in_features, self.out_features // self.of
        return self.in_features // self.of, self.out_features

    def cut(self, weights: LoraWeights, argument: str) -> LoraWeights:
        """The shard's own factors, of those of the whole layer."""
        A, B, bias = weights.A, weights.B, weights.bias
        if A.shape[1:] != (self.in_features,) or B.shape[:1] != (self.out_features,):
            raise AdapterError(
                f"`{argument}` must have A [r, {self.in_features}] and B [{self.out_features}, r], "
                f"got {list(A.shape)} and {list(B.shape)}"
            )
        if self.way == "columns":
            bias = bias if bias is None else bias.chunk(self.of)[self.place]
            return replace(weights, B=B.chunk(self.of)[self.place], bias=bias)
        if bias is not None and self.place:
            bias = torch.zeros_like(bias)  # the sum over processes must hold it once
        return replace(weights, A=A.chunk(self.of, 1)[self.place], bias=bias)

    def local(self, x: Tensor) -> Tensor:
        """What this process holds of a layer's input."""
        if not is_dtensor(x):
            return x
        from torch.distributed.tensor import Partial

        gradient = [Partial()] if self.way == "columns" else None
        held: Tensor = x.to_local(grad_placements=gradient)  # type: ignore[attr-defined]
        return held

    def add(self, plan: ops.Plan, y: Any, x: Tensor, pool: Pool, weight: Any) -> Tensor:
        """y as the engine's own forward returns it, plus the shard's part of the delta.

        Args:
            x: as `local` returns it.
            weight: of the layer, a DTensor.
        """
        if ops.tracked(plan.strength):
            plan = plan.with_strength(_summing_gradients(plan.strength, weight.device_mesh))
        if not is_dtensor(y):
            return plan.add(y, x, pool, owned=False)
        from torch.distributed.tensor import DTensor, Partial

        # A row-wise y may be summed up already (a bias does that), so that the delta is a partial
        # sum of its own.
        delta = plan.add(torch.zeros_like(y.to_local()), x, pool, owned=False)
        placements = y.placements if self.way == "columns" else [Partial()]
        whole: Tensor = y + DTensor.from_local(delta, y.device_mesh, placements, run_check=False)
        return whole


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is split or replicated over processes."""
    # By name: torch.distributed may not be built in, and costs a second to import.
    return type(tensor).__name__ == "DTensor"


def shard_of(linear: nn.Module, argument: str) -> Shard | None:
    """How a linear layer is split; None when each process holds all of it.

    Raises:
        TargetError: a way of splitting that is not supported.
    """
    weight: Any = linear._parameters.get("weight")
    if not is_dtensor(weight) or all(p.is_replicate() for p in weight.placements):
        return None
    sizes = [getattr(linear, name, 0) for name in ("out_features", "in_features")]
    placement, mesh = weight.placements[-1], weight.device_mesh
    # Strided shards (packed projections) have another class than torch's own Shard.
    plain = mesh.ndim == 1 and type(placement).__name__ == "Shard" and weight.ndim == 2
    if not plain or sizes[placement.dim] % mesh.size():
        raise TargetError(
            f"`{argument}` must be split evenly by rows or by columns over one dimension of "
            f"processes, got {list(weight.placements)} of {list(weight.shape)} over "
            f"{list(mesh.shape)}"
        )
    held = closed_over(vars(linear).get("forward"))
    if "forward" in vars(linear) and not (
        "mesh" in held and hasattr(held.get("self"), "install_forward")
    ):
        raise TargetError(
            f"`{argument}`: its weight is split, and its forward patched on the instance, by "
            "something other than transformers, which is not supported"
        )
    return Shard(
        ("columns", "rows")[placement.dim], mesh.get_local_rank(), mesh.size(), *sizes[::-1]
    )


def closed_over(patched: object) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    names = getattr(getattr(patched, "__code__", None), "co_freevars", ())
    cells = getattr(patched, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def reinstall(linear: nn.Module, patched: object) -> None:
    """Put transformers' closure around the forward of the layer's present class."""
    held = closed_over(patched)
    held["self"].install_forward(linear, held["mesh"])


def _summing_gradients(strength: Tensor, mesh: Any) -> Tensor:
    """strength itself, whose gradient is the sum over the processes.

    Each knows only its own part of it: by columns <B_k^T dy_k, A x>, by rows <B^T dy, A_k x_k>.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(strength, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])
