"""Attributes that are computed when they are first read."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class computed_once(Generic[Value]):
    """As functools.cached_property, without a lock.

    Up to Python 3.11 that one holds a lock of all instances while it computes. A process that is
    forked meanwhile would wait for it for ever.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "computed_once[Value]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self._name] = self._compute(instance)
        return value
