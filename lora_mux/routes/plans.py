"""The plans that the layers of a forward pass share."""

from typing import NamedTuple, TypeAlias

import torch

from .. import ops

# The layers of a pass that share a plan: by their rows, the device of x, and their method.
Layers: TypeAlias = tuple[int, torch.device, ops.Method]


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
