"""A routing that is handed to a layer, and adapters whose backward is still to come.

A routing is made one row for each row of x, and its plan is kept for the next equal one. Of no
layer's answer, whoever routed it, does a backward take other adapters than the forward pass had.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .. import ops
from ..core import Pool, Routing
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


def hold_to_backward(node: Node, pool: Pool, plan: object) -> None:
    """Refuse a backward through adapters that have left, moved or learnt since the forward pass.

    Passes of a route keep their adapters; a layer that is called by itself, or whose model's output
    is dropped, does not. Where only the device knows the index, any adapter may be meant.

    Args:
        node: of what the layer answered.
        pool: the layer's.
        plan: by which it did so.
    """
    if not isinstance(plan, ops.WHOLE):  # others have copies
        return
    spans, used = pool.spans, plan.used
    held = {slot: spans[slot] for slot in (spans if used is None else used) if slot in spans}

    def check(_: object) -> None:
        for slot, span in held.items():
            now = pool.spans.get(slot)
            if now is span:
                continue
            if now == span:  # but the rank rows hold something else
                raise ops.has_changed()
            raise TrainingError(
                "`routing` must name adapters that stay until backward() has run, got one that was "
                "removed or moved since the forward pass; remove it later, or run the whole model "
                "in a route, and backward() from its output, which keeps its adapters"
            )

    if held:
        node.register_prehook(check)
