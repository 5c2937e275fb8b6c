"""transformers' generate() and continuous batching on an attached model.

These methods of a model run it in batches of their own making. They are wrapped on the instance, by
objects and not by closures, so that a copy of the model gets a copy of them.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapters import Adapters
from ..routes import Router
from .continuous_batching import follow_requests, rows_of_requests


class Generate:
    """A model's generate(), inside which its samples may be repeated."""

    name = "generate"

    def __init__(self, model: nn.Module, router: Router, adapters: Adapters) -> None:
        self.model = model
        self.router = router
        self.adapters = adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.generating(args, kwargs):
            return self._original(*args, **kwargs)

    @property
    def _original(self) -> Callable[..., Any]:
        method = getattr(type(self.model), self.name)
        return method.__get__(self.model)  # type: ignore[no-any-return]


class GenerateBatch(Generate):
    """A model's generate_batch(), which would only log what is wrong with its requests."""

    name = "generate_batch"

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows_of_requests(self.router, len(inputs))  # which raises
        return self._original(inputs, *args, **kwargs)


class InitContinuousBatching(Generate):
    """A model's init_continuous_batching(), which generate_batch() calls as well."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = self._original(*args, **kwargs)
        follow_requests(manager, self.router, self.adapters)
        return manager


def follow_generation(model: nn.Module, router: Router, adapters: Adapters) -> list[str]:
    """Wrap those of the three methods that the model has; returns their names."""
    wrapped = []
    for wrapper in (Generate, GenerateBatch, InitContinuousBatching):
        if hasattr(type(model), wrapper.name) and wrapper.name not in vars(model):
            vars(model)[wrapper.name] = wrapper(model, router, adapters)
            wrapped.append(wrapper.name)
    return wrapped
