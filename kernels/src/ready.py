"""Launches: by triton the first time, and then without what it looks for in each call.

Triton looks at every argument of every call, to find the variant of the kernel that was compiled
for such ones. That takes 30 to 60 us, several times as long as the launch itself. Here the variant
is kept with all arguments but the tensors; for which tensors it is right, its keeper has to know.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .tensors import Plan, Pool

# The versions whose way from a call to the launch was read.
KNOWN = [3, 6] <= [int(number) for number in triton.__version__.split(".")[:2]] <= [3, 9]


class Ready(NamedTuple):
    """A launch of a compiled kernel, complete but for its tensors.

    It is right for tensors on the same device, of the same shapes, strides and dtypes, whose
    pointers are multiples of ALIGNMENT.
    """

    kernel: Any
    grid: tuple[int, int, int]
    options: Mapping[str, Any]  # the arguments that are no tensors, and what the compiler was told
    run: Callable[..., None]  # triton's launcher
    compiled: tuple[Any, ...]  # the kernel's handle, its metadata, and nobody to tell of launches
    others: tuple[Any, ...]  # the arguments that are no tensors, in their order

    def __call__(self, first: Tensor, *tensors: Any) -> None:
        """Launch on the current stream of the first tensor's device."""
        device = first.get_device()  # -1 on the CPU
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(first, *tensors)
        elif _watched():
            self.kernel[self.grid](first, *tensors, **self.options)
        else:
            stream = triton.runtime.driver.active.get_current_stream(device)
            self.run(*self.grid, stream, *self.compiled, first, *tensors, *self.others)


def launch(kernel: Any, grid: tuple[int, ...], *tensors: Any, **options: Any) -> Ready | None:
    """Launch by triton; None where that is the only way.

    Args:
        kernel: whose first arguments are the tensors.
        grid: of one to three numbers.
        tensors: the first arguments.
        options: the other ones by their names, and what the compiler is told.
    """
    compiled = kernel[grid](*tensors, **options)
    # None in the interpreter. On ROCm variants also differ in how large their tensors may be.
    if compiled is None or compiled.metadata.target.backend != "cuda" or not KNOWN:
        return None
    x, y, z = (*grid, 1, 1)[:3]
    return Ready(
        kernel,
        (x, y, z),
        options,
        compiled.run,
        (compiled.function, compiled.packed_metadata, None, None, None),
        tuple(options[name] for name in kernel.arg_names[len(tensors) :]),
    )


def _watched() -> bool:
    """Whether launches have to be triton's own: profilers see them by a hook, or one debugs."""
    knobs = triton.knobs.runtime
    hooks = knobs.launch_enter_hook, knobs.launch_exit_hook, knobs.add_stages_inspection_hook
    return knobs.debug or any(getattr(hook, "calls", hook) for hook in hooks)


class PlanAgain(NamedTuple):
    """What made a Plan, for another batch that differs in values alone."""

    ready: Ready
    layout: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # of the Plan's tensors

    def __call__(self, index: Tensor, weight: Tensor, live: Tensor) -> Plan:
        device = index.device
        made = Plan(*(torch.empty(s, dtype=dtype, device=device) for s, dtype in self.layout))
        self.ready(index, weight, live, made)
        return made


class AddAgain(NamedTuple):
    """What added adapters to y, for other tensors that differ in values alone."""

    h_shape: tuple[int, ...]
    shrink: Ready
    expand: Ready

    def __call__(self, y: Tensor, x: Tensor, plan: Plan, pool: Pool) -> None:
        h = torch.empty(self.h_shape, dtype=torch.float32, device=x.device)
        self.shrink(x, h, plan, pool)
        self.expand(h, y, plan, pool)


class LinearAgain(NamedTuple):
    """What computed a layer and its adapters, for other tensors that differ in values alone."""

    h_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    shrink: Ready | None  # that goes before
    fused: Ready

    def __call__(
        self, x: Tensor, W: Tensor, bias: Tensor | None, plan: Plan, pool: Pool
    ) -> Tensor:
        h = torch.empty(self.h_shape, dtype=torch.float32, device=x.device)
        y = torch.empty(self.y_shape, dtype=x.dtype, device=x.device)
        if self.shrink is not None:
            self.shrink(x, h, plan, pool)
        self.fused(x, W, bias, h, y, plan, pool)
        return y
