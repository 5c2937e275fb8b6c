"""The fields of a config, each as the type that it must have."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError, short
from . import patterns
from .patterns import PatternError, Steps

MAX_RANK = (1 << 31) - 1
MAX_ALPHA = 1e30  # which also keeps out the ints that overflow a float
MAX_NAMES = 1000

Value = TypeVar("Value")


class Fields:
    """The fields of one config, each as the type that it must have."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self._source = source
        self._values = values
        self._steps = Steps()

    def rank(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            raise self._error(name, f"an int from 1 to {MAX_RANK}", value)
        return value

    def alpha(self, name: str, value: object) -> float:
        # A bool is an int, too.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(name, "a number", value)
        if not abs(value) < MAX_ALPHA:
            raise self._error(name, "a finite number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return bool(value)

    def patterns(
        self, name: str, check: Callable[[str, object], Value]
    ) -> tuple[tuple[str, Value], ...]:
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self._error(name, "an object of pattern -> number", value)
        return tuple(
            (self._pattern(name, key), check(f"{name}[{short(key)}]", v))
            for key, v in value.items()
        )

    def modules(self, name: str) -> str | frozenset[str] | None:
        value = self._values.get(name)
        if isinstance(value, str):
            return self._pattern(name, value)
        return None if value is None else frozenset(self._strings(name, value))

    def names(self, name: str) -> tuple[str, ...]:
        names = self._strings(name, self._values.get(name) or [])
        if len(names) > MAX_NAMES:  # each path is compared with each
            raise self._error(name, f"a list of at most {MAX_NAMES} names", names)
        return tuple(sorted({*names}))

    def blocks(self, name: str) -> int:
        value = self._values.get(name) or {}
        count = value.get("nblocks", 1) if isinstance(value, dict) else 0
        if type(count) is not int or not 1 <= count <= MAX_RANK:
            raise self._error(name, "an object with a number of blocks, nblocks", value)
        return count

    def dropout(self, name: str) -> float:
        """0 for what is none: whoever serves an adapter need not know how it was trained."""
        value = self._values.get(name)
        return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0

    def tokens(self, name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        value = self._values.get(name)
        named = value if isinstance(value, dict) else {"": value} if value else {}
        for rows in named.values():
            whole = isinstance(rows, list) and all(type(n) is int and n >= 0 for n in rows)
            if not whole or len({*rows}) < len(rows):
                raise self._error(name, "a list of different ints, or names with such", value)
        return tuple((module, tuple(rows)) for module, rows in named.items())

    def layer_names(self, name: str) -> tuple[str, ...]:
        value = self._values.get(name)
        strings = self._strings(name, [value] if isinstance(value, str) else value or [])
        return tuple(self._pattern(name, pattern) for pattern in strings)

    def layers(self, name: str) -> frozenset[int] | None:
        value = self._values.get(name)
        numbers = [value] if isinstance(value, int) else value
        if numbers is None:
            return None
        if not isinstance(numbers, list) or not all(isinstance(n, int) for n in numbers):
            raise self._error(name, "an int or a list of ints", value)
        return frozenset(numbers)

    def _strings(self, name: str, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, "a string or a list of strings", value)
        return value

    def _pattern(self, name: str, pattern: str) -> str:
        """A stranger's pattern, if it is one that we match."""
        try:
            patterns.check(pattern, self._steps)
        except PatternError as error:
            raise CheckpointError(
                f"{self._source}: `{name}` must be {error}, got {short(pattern)}; list the "
                "modules' names instead of a pattern"
            ) from None
        return pattern

    def _error(self, name: str, expected: str, got: object) -> CheckpointError:
        return CheckpointError(f"{self._source}: `{name}` must be {expected}, got {short(got)}")
