"""Forward passes whose backward may still come."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .route import Route


class Pass(NamedTuple):
    """What a forward pass of the model was computed with."""

    route: Route | None  # None = the base model
    samples: int | None  # None = the forward did not begin at the model's top
    tokens: int
    generating: bool


class Awaited:
    """The passes whose output, or what came of it, is still kept."""

    def __init__(self) -> None:
        self._hooks: dict[int, weakref.ref[functools.partial[None]]] = {}

    def follow(self, output: Tensor, past: Pass, enter: Callable[[Pass, Tensor], None]) -> None:
        """Call `enter` with the pass when the output's gradient comes."""
        hook = functools.partial(enter, past)
        hooks, key = self._hooks, id(hook)
        hooks[key] = weakref.ref(hook, lambda _: hooks.pop(key, None))
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Pass]:
        alive = (hook() for hook in list(self._hooks.values()))
        return (hook.args[0] for hook in alive if hook is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Awaited, ()  # a copy of the model awaits nothing
