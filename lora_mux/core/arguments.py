"""Checks of plain arguments, by errors that name them."""

import math
from collections.abc import Sequence
from numbers import Real

from ..errors import ArgumentTypeError, LoraMuxError, RoutingError


def check_number(value: object, argument: str, error: type[LoraMuxError] = RoutingError) -> float:
    """`value` as a float.

    Raises:
        ArgumentTypeError: it is not a real number.
        LoraMuxError: it is not finite; raised as `error`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"`{argument}` must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise error(f"`{argument}` must be finite, got {value}")
    return float(value)


def check_numbers(values: object, count: int, argument: str) -> list[float]:
    """`values` as `count` floats: a sequence of that many, or one number for all of them."""
    if not isinstance(values, Sequence):
        return [check_number(values, argument)] * count
    if len(values) != count:
        raise RoutingError(
            f"`{argument}` must hold one number for each of the {count} adapters, got {len(values)}"
        )
    return [check_number(value, f"{argument}[{i}]") for i, value in enumerate(values)]


def check_counts(values: object, rows: int, argument: str) -> list[int]:
    """`values` as a list of `rows` ints, each at least 0."""
    if not isinstance(values, Sequence) or not all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    ):
        raise ArgumentTypeError(f"`{argument}` must be a sequence of ints, got {values!r}")
    if len(values) != rows or min(values, default=0) < 0:
        raise RoutingError(
            f"`{argument}` must hold {rows} ints of at least 0, one for each row, got {values!r}"
        )
    return list(values)


def check_names(names: object, argument: str) -> Sequence[str]:
    """`names`, if it is a sequence of names and not a single one."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ArgumentTypeError(
            f"`{argument}` must be a sequence of names, got {type(names).__name__}"
        )
    return names
