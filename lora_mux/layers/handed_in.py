"""A routing that is handed to a layer: one row for each row of x, the last plan, and backward."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..core import Pool, Routing, host_may_read, slot_of
from ..errors import RoutingError, TrainingError


@dataclass(frozen=True)
class LastPlan:
    """The last plan of a layer, and the routing that it was made of: often the next one is equal.

    Only a routing on the CPU can be compared without a sync.
    """

    shape: torch.Size  # of x
    index: Tensor  # copies, so that what is written to the routing is seen
    weight: Tensor
    suspensions: int  # of the slots, when it was made
    plan: ops.AnyPlan | None

    @classmethod
    def of(
        cls, x: Tensor, routing: Routing, suspensions: int, plan: ops.AnyPlan | None
    ) -> "LastPlan":
        """The plan that was made for x and routing."""
        return cls(x.shape, routing.index.clone(), routing.weight.clone(), suspensions, plan)

    def serves(self, x: Tensor, routing: Routing, suspensions: int) -> bool:
        """Whether the plan is that of x and routing; their values are compared."""
        index, weight = routing.index, routing.weight
        return (
            x.shape == self.shape
            and suspensions == self.suspensions
            and x.is_cpu
            and index.is_cpu
            and not weight.requires_grad
            and torch.equal(index, self.index)
            and torch.equal(weight, self.weight)
        )


def spread(routing: Routing, x: Tensor) -> Routing:
    """The routing with one row per row of x. Equality decides, never divisibility."""
    rows = prod(x.shape[:-1])
    if routing.rows == rows:
        return routing
    if x.ndim >= 3 and routing.rows == x.shape[0]:
        return routing.repeat_interleave(rows // routing.rows)
    samples = f" or {x.shape[0]} (its samples)" if x.ndim >= 3 else ""
    raise RoutingError(
        f"`routing` must have {rows} rows (the rows of x {list(x.shape)}){samples}, "
        f"got {routing.rows}"
    )


def hold_to_backward(y: Tensor, routing: Routing, pool: Pool, plan: object) -> None:
    """Refuse the backward of y after an adapter that it goes back through has left, or has moved.

    Nobody keeps adapters for a routing that was handed in. Where only the device knows the index,
    any adapter of the layer may be meant.
    """
    if y.grad_fn is None or not isinstance(plan, ops.WHOLE):  # others have copies
        return
    chosen = {*pool.spans}
    if host_may_read(routing.index):
        chosen &= {slot_of(handle) for handle in routing.index.flatten().tolist() if handle >= 0}
    held = {slot: pool.spans[slot] for slot in chosen}

    def check(_: object) -> None:
        if any(pool.spans.get(slot) is not span for slot, span in held.items()):
            raise TrainingError(
                "`routing` must name adapters that stay until backward() has run, got one that was "
                "removed or moved since the forward pass; remove it later, or run the model in a "
                "route, which keeps its adapters"
            )

    y.grad_fn.register_prehook(check)
