"""Routing: which adapters each row selects, and how strongly.

A routing is an index [rows, J] of adapter handles (-1 = no adapter in that place) and a weight
[rows, J]. It is made from names on the host, or handed over as tensors. This module knows shapes
and values; which handles are alive is known to `lora_mux.slots`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentTypeError, LoraMuxError, RoutingError, UnknownAdapterError

BASE = "__base__"
NONE = -1  # the index of a place that selects no adapter

# What one row may ask for: nothing (None or "__base__"), one adapter, several, or several weighted.
Selection: TypeAlias = str | None | Sequence[str] | Mapping[str, float]


@dataclass(eq=False)
class Found:
    """What the operators found. Only written to while compiling: what is read there is guarded."""

    state: Tensor | None = None  # [rows of x] int8, of the last forward pass: 2 = became NaN


@dataclass(frozen=True, eq=False)
class Routing:
    """The adapters of each row: y[m] += sum_j weight[m, j] * delta of adapter index[m, j].

    Args:
        index: int32 or int64 [rows, J], handles of adapters; -1 = none. A handle that stands twice
            in a row adds up.
        weight: floating [rows, J] on the index's device; None = all 1.

    Raises:
        ArgumentTypeError: index or weight is no tensor, or has the wrong kind of dtype.
        RoutingError: the shapes or devices do not fit; on the CPU also an index below -1 or a
            weight that is not finite (on other devices that check would cost a sync).

    Example:
        >>> import torch
        >>> Routing(torch.tensor([[0, 2], [-1, -1]])).weight
        tensor([[1., 1.],
                [1., 1.]])
    """

    index: Tensor  # [rows, J]
    weight: Tensor = None  # type: ignore[assignment]  # [rows, J], filled in below when not given

    # The copies that are spread over rows or moved share it.
    found: Found = field(default_factory=Found, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_index(self.index)
        if self.weight is None:
            ones = torch.ones(self.index.shape, dtype=torch.float32, device=self.index.device)
            object.__setattr__(self, "weight", ones)
        else:
            _check_weight(self.weight, self.index)

    @property
    def rows(self) -> int:
        """How many rows it is for."""
        return self.index.shape[0]

    def check(self) -> None:
        """Raise if the last forward pass met a handle that no loaded adapter has; syncs.

        Where the index was read on the GPU such a row is NaN instead of an error. Elsewhere the
        forward pass itself has raised.

        Raises:
            UnknownAdapterError: names the rows (of x, flattened).
        """
        state = self.found.state
        if state is None:
            return
        rows = (state == 2).nonzero().flatten().tolist()
        if rows:
            shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            raise UnknownAdapterError(
                f"`index` must hold handles of loaded adapters or -1; in the last forward pass "
                f"{len(rows)} of {len(state)} rows did not, and are NaN: {shown}"
            )

    def repeat_interleave(self, times: int | Tensor) -> "Routing":
        """Each row `times` times in a row: a, a, b, b. An int [rows] tensor: its own times."""
        if isinstance(times, int) and times == 1:
            return self
        return self._each(lambda t: t.repeat_interleave(times, 0))

    def tile(self, times: int) -> "Routing":
        """All rows `times` times over: a, b, a, b."""
        return self if times == 1 else self._each(lambda t: t.repeat(times, 1))

    def expand_rows(self, rows: int) -> "Routing":
        """The first row of this routing as `rows` rows, without a copy."""
        return self._each(lambda t: t[:1].expand(rows, -1))

    def to(self, device: torch.device, copy: bool = False) -> "Routing":
        """The routing on a device; itself when it is there, unless a copy is wanted."""
        if self.index.device == device and not copy:
            return self
        return self._each(lambda t: t.to(device, copy=copy))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        return unchecked(change(self.index), change(self.weight), self.found)


def unchecked(index: Tensor, weight: Tensor, found: Found) -> Routing:
    """A Routing of tensors that were checked before."""
    made = object.__new__(Routing)
    object.__setattr__(made, "index", index)
    object.__setattr__(made, "weight", weight)
    object.__setattr__(made, "found", found)
    return made


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at values: not on a GPU, where it syncs, nor while compiling."""
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
            "one adapter per row is index[:, None]"
        )
    if readable(index) and bool((index < NONE).any()):
        row, place = (index < NONE).nonzero()[0].tolist()
        raise RoutingError(
            f"`index` must hold adapter handles or -1, got {int(index[row, place])} "
            f"at [{row}, {place}]"
        )


def _check_weight(weight: object, index: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ArgumentTypeError(
            f"`weight` must be a floating tensor of index's shape or None, "
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
    if readable(weight) and not bool(weight.isfinite().all()):
        row, place = (~weight.isfinite()).nonzero()[0].tolist()
        raise RoutingError(
            f"`weight` must be finite, got {float(weight[row, place])} at [{row}, {place}]"
        )


def selection(entry: object, argument: str) -> dict[str, float]:
    """The adapters that one entry names, with their weights; empty for the base model."""
    if entry is None or (isinstance(entry, str) and entry == BASE):
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if isinstance(entry, Mapping):
        return {_name(name, argument): number(w, argument) for name, w in entry.items()}
    if isinstance(entry, Sequence) and not isinstance(entry, bytes):
        names = [_name(name, argument) for name in entry]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RoutingError(
                f"`{argument}` must name each adapter once, got {repeated[0]!r} "
                f"{names.count(repeated[0])} times; use a weight: {{{repeated[0]!r}: 2.0}}"
            )
        return dict.fromkeys(names, 1.0)
    raise ArgumentTypeError(
        f"`{argument}` must be None, a name, a sequence of names or a mapping name -> weight, "
        f"got {type(entry).__name__}"
    )


def from_names(
    rows: Sequence[object], handles: Callable[[Sequence[str]], Mapping[str, int]]
) -> Routing:
    """One row for each entry of `rows`; `handles` maps names to handles and refuses unknown ones.

    Example:
        >>> handles = lambda names: {"a": 0, "b": 1}
        >>> from_names([None, "a", {"a": 0.5, "b": 2.0}], handles).index.tolist()
        [[-1, -1], [0, -1], [0, 1]]
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise ArgumentTypeError(
            f"`rows` must be a sequence with one entry per sample, or an index tensor, "
            f"got {type(rows).__name__}; for the whole batch use set_adapter"
        )
    selections = [selection(entry, f"rows[{i}]") for i, entry in enumerate(rows)]
    known = handles([name for chosen in selections for name in chosen])
    width = max([1, *map(len, selections)])
    index = [[known[name] for name in s] + [NONE] * (width - len(s)) for s in selections]
    weight = [[*s.values()] + [0.0] * (width - len(s)) for s in selections]
    shape = (len(selections), width)
    # All of it was checked on the way; numpy makes a tensor in half the time.
    return unchecked(
        torch.from_numpy(np.array(index, np.int64).reshape(shape)),
        torch.from_numpy(np.array(weight, np.float32).reshape(shape)),
        Found(),
    )


def number(value: object, argument: str, error: type[LoraMuxError] = RoutingError) -> float:
    """A finite real number, or a clear error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"`{argument}` must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise error(f"`{argument}` must be finite, got {value}")
    return float(value)


def numbers(values: object, count: int, argument: str) -> list[float]:
    """`count` finite numbers: one for each, or one for all."""
    if not isinstance(values, Sequence):
        return [number(values, argument)] * count
    if len(values) != count:
        raise RoutingError(
            f"`{argument}` must hold one number for each of the {count} adapters, got {len(values)}"
        )
    return [number(value, f"{argument}[{i}]") for i, value in enumerate(values)]


def counts(values: object, rows: int, argument: str) -> list[int]:
    """One int of at least 0 for each of `rows`, or a clear error that names the argument."""
    if not isinstance(values, Sequence) or not all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    ):
        raise ArgumentTypeError(f"`{argument}` must be a sequence of ints, got {values!r}")
    if len(values) != rows or min(values, default=0) < 0:
        raise RoutingError(
            f"`{argument}` must hold {rows} ints of at least 0, one for each row, got {values!r}"
        )
    return list(values)


def _name(name: object, argument: str) -> str:
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"`{argument}` must name adapters by str, got {type(name).__name__}"
        )
    if name == BASE:
        raise RoutingError(
            f'`{argument}` must name adapters; "{BASE}" stands for the base model only alone'
        )
    return name
