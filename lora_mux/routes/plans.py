"""The plans that the layers of a forward pass share."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import RoutingError
from .passes import Pass


class Layers(NamedTuple):
    """The layers of a pass that share a plan."""

    rows: int  # of x
    device: torch.device
    method: ops.Method


class Planned(NamedTuple):
    """A plan, the layers that it is for, and all that it depends on where that can be told."""

    layers: Layers
    case: object
    plan: ops.AnyPlan | None  # None = nothing to add


class Plans:
    """The plans of the forward pass in progress, and the last of the CPU's form."""

    def __init__(self) -> None:
        # A list, because the sizes of a compiled batch may be symbols, which no dict can look up.
        self._of_pass: list[Planned] = []
        self._last: Planned | None = None

    def find(self, layers: Layers, case: object) -> Planned | None:
        """What was planned for these layers in this pass, or for the same case in an earlier one.

        The next pass is often the same case, as in generate().
        """
        for planned in self._of_pass:
            if planned.layers == layers:
                return planned
        # In this order: torch.compile guards what is read, and knows no case.
        if case is None or self._last is None or self._last.case != case:
            return None
        self._of_pass.append(self._last)
        return self._last

    def add(self, layers: Layers, case: object, plan: ops.AnyPlan | None) -> Planned:
        """Keep a plan for the pass, and for a case that is not None."""
        planned = Planned(layers, case, plan)
        self._of_pass.append(planned)
        if case is not None:
            self._last = planned
        return planned

    def clear(self) -> None:
        """Forget the plans of the pass."""
        self._of_pass.clear()


def samples_of(now: Pass, x: Tensor) -> int | None:
    """How many samples a layer's input holds; None when a uniform route need not know.

    Raises:
        RoutingError: x does not begin with the batch, so that its rows cannot be told apart.
    """
    first = x.shape[0] if x.ndim >= 2 else 1
    if now.samples is None:
        return first
    if first == now.samples or (x.ndim == 2 and first == now.samples * now.tokens):
        return now.samples
    assert now.route is not None
    if now.route.uniform or now.route.per_token:
        return None
    raise RoutingError(
        f"a layer's input must begin with the batch of {now.samples} samples (or, flattened, "
        f"with its {now.samples} x {now.tokens} tokens), got {list(x.shape)}; "
        "use route_tokens for rows in another order"
    )
