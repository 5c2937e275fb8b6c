"""Checks of plain arguments, by errors that name them."""

from collections.abc import Sequence
from numbers import Real

from ..errors import ArgumentTypeError, LoraMuxError, RoutingError

# Numbers from here on are infinite when they are rounded to fp32, in which weights and scalings are
# held.
FP32_OVERFLOW = 2.0**128 - 2.0**103
FINITE = "finite in fp32 (at most 3.4e38 in size)"


def check_number(value: object, argument: str, error: type[LoraMuxError] = RoutingError) -> float:
    """`value` as a float.

    Raises:
        ArgumentTypeError: it is not a real number.
        LoraMuxError: it is not finite, in fp32; raised as `error`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"`{argument}` must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        # Of an int or a fraction, which may have more digits than Python prints.
        raise error(f"`{argument}` must be {FINITE}, got a number beyond 1.7e308") from None
    if not abs(number) < FP32_OVERFLOW:
        raise error(f"`{argument}` must be {FINITE}, got {number}")
    return number


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
    """`names`, if it is a sequence of str and not a single one."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ArgumentTypeError(
            f"`{argument}` must be a sequence of names, got {type(names).__name__}; for one "
            "adapter, give [name]"
        )
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise ArgumentTypeError(f"`{argument}[{i}]` must be a str, got {type(name).__name__}")
    return names
