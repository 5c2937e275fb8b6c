"""Forward passes, and those among them whose backward may still come."""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import RoutingError
from .route import Route


class Pass(NamedTuple):
    """What a forward pass of the model is computed with."""

    route: Route | None  # None = the base model
    samples: int | None  # None = the forward did not begin at the model's top
    tokens: int
    generating: bool

    def samples_of(self, x: Tensor) -> int | None:
        """How many samples a layer's input x holds; None if a uniform route need not know.

        Raises:
            RoutingError: x does not begin with the batch, so that its rows cannot be told apart.
        """
        first = x.shape[0] if x.ndim >= 2 else 1
        if self.samples is None:
            return first
        if first == self.samples or (x.ndim == 2 and first == self.samples * self.tokens):
            return self.samples
        assert self.route is not None
        if self.route.uniform or self.route.per_token:
            return None
        raise RoutingError(
            f"a layer's input must begin with the batch of {self.samples} samples (or, flattened, "
            f"with its {self.samples} x {self.tokens} tokens), got {list(x.shape)}; "
            "use route_tokens for rows in another order"
        )


class PassesAwaitingBackward:
    """The passes whose output, or something computed from it, still exists."""

    def __init__(self) -> None:
        self._hooks: dict[int, weakref.ref[functools.partial[None]]] = {}

    def add(self, output: Tensor, past: Pass, enter: Callable[[Pass, Tensor], None]) -> None:
        """Call `enter` with the pass when the gradient of its output arrives."""
        hook = functools.partial(enter, past)
        hooks, key = self._hooks, id(hook)
        hooks[key] = weakref.ref(hook, lambda _: hooks.pop(key, None))
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Pass]:
        alive = (hook() for hook in list(self._hooks.values()))
        return (hook.args[0] for hook in alive if hook is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassesAwaitingBackward, ()  # a copy of the model awaits no backward
