"""Routing: which adapters each row selects, and how strongly.

A routing is an index [rows, J] of adapter handles (-1 = no adapter in that place) and a weight
[rows, J]. It is made from names on the host (`selections`), or from tensors that the user hands
over. This module checks shapes and values; `slots` knows which handles belong to an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, RoutingError, UnknownAdapterError
from .arguments import FINITE
from .streams import has_streams, to_device

BASE = "__base__"  # the name that stands for the base model
NONE = -1  # the index of a place that selects no adapter
DEAD = 2  # the state of a row with a handle that no adapter has; see the operator `plan`
MAX_ROWS_IN_ERROR = 10


@dataclass(eq=False)
class LastPass:
    """What the operators noted about the rows of the last forward pass.

    Code that torch.compile sees must only write to it, because a graph guards whatever it reads.
    """

    row_states: Tensor | None = None  # int8 [rows of x]; DEAD = the row's output is NaN


@dataclass(frozen=True, eq=False)
class Routing:
    """The adapters that each row selects, and how strongly.

        y[m] += sum_j weight[m, j] * delta of adapter index[m, j]

    Args:
        index: int32 or int64 [rows, J]. Handles of adapters; -1 selects none. A handle that
            appears twice in a row is added twice.
        weight: floating [rows, J], on the index's device. None means 1 everywhere.

    Raises:
        ArgumentTypeError: index or weight is not a tensor, or has the wrong kind of dtype.
        RoutingError: the shapes or the devices do not fit. On the CPU also: an index below -1, or
            a weight that is not finite in fp32, whatever its dtype is: a routing does not know in
            which dtype layers will compute. On other devices that check would cost a sync.

    Examples:
        >>> import torch
        >>> Routing(torch.tensor([[0, 2], [-1, -1]])).weight
        tensor([[1., 1.],
                [1., 1.]])
    """

    index: Tensor  # [rows, J]
    weight: Tensor = None  # type: ignore[assignment]  # [rows, J]; filled in below if not given

    # Copies of the routing, moved or spread over more rows, share it.
    last_pass: LastPass = field(default_factory=LastPass, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_index(self.index)
        if self.weight is None:
            ones = torch.ones(self.index.shape, dtype=torch.float32, device=self.index.device)
            object.__setattr__(self, "weight", ones)
        else:
            _check_weight(self.weight, self.index)

    @property
    def rows(self) -> int:
        """How many rows the routing has."""
        return self.index.shape[0]

    def check(self) -> None:
        """Raise if the last forward pass met a handle that no loaded adapter has.

        A GPU cannot raise: where the index is read there, the output of such a row is NaN. On the
        CPU the forward pass itself raises. This call waits for the GPU.

        Raises:
            UnknownAdapterError: names the rows, counted over x with all its dimensions but the
                last flattened.
        """
        states = self.last_pass.row_states
        if states is None:
            return
        if has_streams(states.device):
            torch.cuda.synchronize(states.device)  # the pass may have run on another stream
        rows = (states == DEAD).nonzero().flatten().tolist()
        if rows:
            listed = ", ".join(map(str, rows[:MAX_ROWS_IN_ERROR]))
            raise UnknownAdapterError(
                f"`index` must hold handles of loaded adapters or -1; in the last forward pass "
                f"{len(rows)} of {len(states)} rows did not, and their output is NaN: {listed}"
                + (", ..." if len(rows) > MAX_ROWS_IN_ERROR else "")
            )

    def repeat_interleave(self, times: int | Tensor) -> "Routing":
        """Repeat each row in place: a, b becomes a, a, b, b.

        Args:
            times: how often to repeat each row; an int [rows] tensor gives each row its own number.

        Returns:
            The longer routing.
        """
        if isinstance(times, int) and times == 1:
            return self
        return self._map(lambda t: t.repeat_interleave(times, 0))

    def tile(self, times: int) -> "Routing":
        """Repeat all rows as a whole: a, b becomes a, b, a, b.

        Args:
            times: how often to repeat them.

        Returns:
            The longer routing.
        """
        return self if times == 1 else self._map(lambda t: t.repeat(times, 1))

    def expand_rows(self, rows: int) -> "Routing":
        """Give every row the adapters of the first one, without a copy.

        Args:
            rows: how many rows the result has.

        Returns:
            A routing whose tensors are views of this one's first row.
        """
        return self._map(lambda t: t[:1].expand(rows, -1))

    def to(self, device: torch.device, copy: bool = False) -> "Routing":
        """Move the routing to a device.

        Args:
            device: where index and weight should be.
            copy: copy even if they are there already.

        Returns:
            The routing on the device: this very object if nothing was copied.
        """
        if self.index.device == device and not copy:
            return self
        if host_may_read(self.index) and has_streams(device) and not self.weight.requires_grad:
            index, weight = to_device([self.index, self.weight], device)
            return unchecked_routing(index, weight, self.last_pass)
        return self._map(lambda t: t.to(device, copy=copy))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        return unchecked_routing(change(self.index), change(self.weight), self.last_pass)


def unchecked_routing(index: Tensor, weight: Tensor, last_pass: LastPass) -> Routing:
    """A Routing of tensors that were checked before."""
    made = object.__new__(Routing)
    object.__setattr__(made, "index", index)
    object.__setattr__(made, "weight", weight)
    object.__setattr__(made, "last_pass", last_pass)
    return made


def value_of(routing: Routing) -> object:
    """Equal for routings of equal values, as far as the host may read them."""
    given = routing.index, routing.weight
    if not all(map(host_may_read, given)):
        return object()
    # Cloned: contiguous() leaves the strides of a column, which then has no view as bytes.
    flat = [t.detach().clone(memory_format=torch.contiguous_format) for t in given]
    return [(t.shape, t.dtype, t.view(torch.uint8).numpy().tobytes()) for t in flat]


def host_may_read(tensor: Tensor) -> bool:
    """Whether the host may read a tensor's values.

    It may not on a GPU, where that costs a sync, nor while torch.compile traces.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_index(index: object) -> None:
    if not isinstance(index, Tensor):
        raise ArgumentTypeError(
            f"`index` must be an int tensor of shape [rows, J], got {type(index).__name__}"
        )
    if index.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"`index` must have dtype int32 or int64, got {index.dtype}")
    if index.ndim != 2:
        raise RoutingError(
            f"`index` must have shape [rows, J], got {list(index.shape)}; "
            "for one adapter per row, give index[:, None]"
        )
    if host_may_read(index) and bool((index < NONE).any()):
        row, place = (index < NONE).nonzero()[0].tolist()
        raise RoutingError(
            f"`index` must hold adapter handles or -1, got {int(index[row, place])} "
            f"at [{row}, {place}]"
        )


def _check_weight(weight: object, index: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ArgumentTypeError(
            f"`weight` must be None or a floating tensor of index's shape, "
            f"got {type(weight).__name__}"
        )
    if not weight.is_floating_point():
        raise ArgumentTypeError(f"`weight` must have a floating dtype, got {weight.dtype}")
    if weight.shape != index.shape:
        raise RoutingError(
            f"`weight` must have index's shape {list(index.shape)}, got {list(weight.shape)}"
        )
    if weight.device != index.device:
        raise RoutingError(
            f"`weight` must be on index's device {index.device}, got {weight.device}"
        )
    if not host_may_read(weight):
        return
    finite = weight.detach().to(torch.float32).isfinite()
    if not bool(finite.all()):
        row, place = (~finite).nonzero()[0].tolist()
        got = weight.detach()[row, place].item()
        raise RoutingError(f"`weight` must be {FINITE}, got {got} at [{row}, {place}]")
