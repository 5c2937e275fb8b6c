"""transformers' generate() and continuous batching on an attached model.

They are methods of the model that run it in batches of their own making, and are wrapped on the
instance, by objects and not closures: a copy of the model gets a copy of them.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..routes import Router
from .continuous_batching import Enter, follow_requests, rows_of


class Generate:
    """A model's generate(), inside which its samples may be repeated."""

    name = "generate"

    def __init__(self, model: nn.Module, router: Router, enter: Enter) -> None:
        self.model = model
        self.router = router
        self.enter = enter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.generating(args, kwargs):
            return self._own(*args, **kwargs)

    @property
    def _own(self) -> Callable[..., Any]:
        return getattr(type(self.model), self.name).__get__(self.model)  # type: ignore[no-any-return]


class GenerateBatch(Generate):
    """A model's generate_batch(), which would only log what is wrong with its requests."""

    name = "generate_batch"

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows_of(self.router, len(inputs))
        return self._own(inputs, *args, **kwargs)


class InitContinuousBatching(Generate):
    """A model's init_continuous_batching(), on which generate_batch() stands as well."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = self._own(*args, **kwargs)
        follow_requests(manager, self.router, self.enter)
        return manager


def follow_generation(model: nn.Module, router: Router, enter: Enter) -> list[str]:
    """Wrap what the model has of the three; returns the names of what was wrapped."""
    wrapped = []
    for wrapper in (Generate, GenerateBatch, InitContinuousBatching):
        if hasattr(type(model), wrapper.name) and wrapper.name not in vars(model):
            vars(model)[wrapper.name] = wrapper(model, router, enter)
            wrapped.append(wrapper.name)
    return wrapped
