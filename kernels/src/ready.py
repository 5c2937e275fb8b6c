"""Launches again: without what triton looks for in each call, and with numbers for tensors.

Triton looks at every argument of every call, to find the variant of the kernel that was compiled
for such ones, and at every tensor once more, to find its memory. That takes several times as long
as the launch itself. Here the variant is kept with all arguments but the pointers. For which
tensors it is right, its keeper has to know; and holds them until the launch is made.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from .tensors import ALIGNMENT, Plan

# The versions whose way from a call to the launch was read.
KNOWN = [3, 6] <= [int(number) for number in triton.__version__.split(".")[:2]] <= [3, 9]

STATE = Plan._fields.index("state")
Pointers: TypeAlias = tuple[int | None, ...]


class Ready(NamedTuple):
    """A launch of a compiled kernel, complete but for its pointers.

    It is right for tensors on the same device, of the same shapes, strides and dtypes, whose
    pointers are multiples of ALIGNMENT.
    """

    run: Any  # triton's launcher
    grid: tuple[int, ...]
    compiled: tuple[Any, ...]  # the kernel's handle, its metadata, and nobody to tell of launches
    others: tuple[Any, ...]  # the arguments that are no tensors

    def __call__(self, stream: int, pointers: tuple[int | Pointers | None, ...]) -> None:
        """Launch on a stream of the current device."""
        self.run(*self.grid, stream, *self.compiled, *pointers, *self.others)


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
    return Ready(
        compiled.run,
        (*grid, 1, 1)[:3],
        (compiled.function, compiled.packed_metadata, None, None, None),
        tuple(options[name] for name in kernel.arg_names[len(tensors) :]),
    )


def watched() -> bool:
    """Whether launches have to be triton's own: profilers see them by a hook, or one debugs."""
    knobs = triton.knobs.runtime
    before, after = knobs.launch_enter_hook, knobs.launch_exit_hook
    # Chains of hooks, or what somebody has put in their place.
    hooks = getattr(before, "calls", before) or getattr(after, "calls", after)
    return bool(hooks or knobs.add_stages_inspection_hook or knobs.debug)


def in_order(device: int, *launches: tuple[Ready, tuple[int | Pointers | None, ...]]) -> None:
    """Make launches on the current stream of a device, by its number; -1 = the CPU."""
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            in_order(device, *launches)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    for ready, pointers in launches:
        ready(stream, pointers)


class Layout(NamedTuple):
    """The tensors of Plans of one case, in one piece of memory."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]  # bytes
    size: int  # bytes, of all

    @classmethod
    def of(cls, plan: Plan) -> "Layout":
        """The layout of Plans like this one."""
        starts, size = [], 0
        for tensor in plan:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        shapes, dtypes = zip(*((tuple(t.shape), t.dtype) for t in plan), strict=True)
        return cls(shapes, dtypes, tuple(starts), size)

    def tensor(self, memory: Tensor, i: int) -> Tensor:
        """The i-th tensor of the Plan in `memory`."""
        start, shape, dtype = self.starts[i], self.shapes[i], self.dtypes[i]
        numbers = memory[start : start + dtype.itemsize * torch.Size(shape).numel()]
        return numbers.view(dtype).view(shape)


class PlanNow:
    """A Plan in one piece of memory: its pointers, and tensors for those who ask for them."""

    __slots__ = ("_layout", "_memory", "_tensors", "case", "device", "pointers")

    def __init__(self, memory: Tensor, layout: Layout, case: object) -> None:
        first = memory.data_ptr()
        self.pointers: Pointers = tuple([first + start for start in layout.starts])
        self.device = memory.get_device()
        self.case = case  # tells it from Plans of other shapes and dtypes, and on other devices
        self._memory, self._layout = memory, layout
        self._tensors: Plan | None = None

    watched = staticmethod(watched)  # for those who may not import this file

    @classmethod
    def of(cls, plan: Plan) -> "PlanNow":
        """A Plan that was made otherwise."""
        made, layout = object.__new__(cls), Layout.of(plan)
        made.pointers = tuple(tensor.data_ptr() for tensor in plan)
        made.device = plan.slots.get_device()
        made.case = made.device, *layout.shapes[:1], *layout.shapes[4:5], layout.dtypes[1]
        made._tensors = plan
        return made

    @property
    def tensors(self) -> Plan:
        """All of it."""
        if self._tensors is None:
            cut = (self._layout.tensor(self._memory, i) for i in range(len(Plan._fields)))
            self._tensors = Plan(*cut)
        return self._tensors

    @property
    def state(self) -> Tensor:
        """The one that each pass asks for."""
        if self._tensors is not None:
            return self._tensors.state
        start, (rows,) = self._layout.starts[STATE], self._layout.shapes[STATE]
        return self._memory[start : start + rows]  # of its own dtype already

    @property
    def slots(self) -> Tensor:
        """The one that passes ask for in which adapters are trained."""
        if self._tensors is not None:
            return self._tensors.slots
        return self._layout.tensor(self._memory, 0)


class PlanAgain(NamedTuple):
    """What makes the Plan of another batch that differs in values alone."""

    ready: Ready
    layout: Layout
    case: object

    def watched(self) -> bool:
        """`watched`, for those who may not import this file."""
        return watched()

    def __call__(self, index: Tensor, weight: Tensor, live: Tensor) -> PlanNow:
        memory = torch.empty(self.layout.size, dtype=torch.int8, device=index.device)
        made = PlanNow(memory, self.layout, self.case)
        given = index.data_ptr(), weight.data_ptr(), live.data_ptr()
        in_order(made.device, (self.ready, (*given, made.pointers)))
        return made


class AddAgain(NamedTuple):
    """What adds adapters to another y, for tensors that differ in values alone; returns h."""

    h_shape: tuple[int, ...]
    shrink: Ready
    expand: Ready

    def __call__(self, y: Tensor, x: Tensor, plan: PlanNow, pool: Pointers) -> Tensor:
        h = torch.empty(self.h_shape, dtype=torch.float32, device=x.device)
        at, with_plan = h.data_ptr(), (plan.pointers, pool)
        in_order(
            plan.device,
            (self.shrink, (x.data_ptr(), at, *with_plan)),
            (self.expand, (at, y.data_ptr(), *with_plan)),
        )
        return h


class LinearAgain(NamedTuple):
    """What computes another layer and its adapters, for tensors that differ in values alone."""

    h_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    fused: Ready

    def __call__(
        self, x: Tensor, W: Tensor, bias: Tensor | None, plan: PlanNow, pool: Pointers
    ) -> Tensor:
        h = torch.empty(self.h_shape, dtype=torch.float32, device=x.device)
        y = torch.empty(self.y_shape, dtype=x.dtype, device=x.device)
        inputs = x.data_ptr(), W.data_ptr(), None if bias is None else bias.data_ptr()
        given = (*inputs, h.data_ptr(), y.data_ptr(), plan.pointers, pool)
        in_order(plan.device, (self.fused, given))
        return y
