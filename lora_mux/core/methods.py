"""What methods are wrapped in: a lock, and values that are computed once."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Value = TypeVar("Value")


def holding(lock: AbstractContextManager[Any], work: Callable[[], Result]) -> Result:
    """What `work` returns, which runs with the lock held."""
    # The one place where a lock is taken, and on one line. Python runs nothing between a lock's own
    # __enter__ or __exit__ and the line, so that no interrupt leaves the lock held. A block of
    # several lines has such a place, its end, where a tracer may raise.
    with lock: return work()  # fmt: skip  # noqa: E701


def synchronized(
    method: Callable[Concatenate[Any, Parameters], Result],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """A method that holds its object's `_lock` while it runs."""

    @functools.wraps(method)
    def held(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._lock: return method(self, *args, **kwargs)  # fmt: skip  # noqa: E701

    return held


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
