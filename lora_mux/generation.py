"""transformers' generate() and continuous batching on an attached model.

Both are methods of the model that run it in batches of their own making. They are wrapped on the
instance, by objects and not closures: a copy of the model gets a copy of them.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import RoutingError
from .router import Router


class Generate:
    """A model's generate(), inside which its samples may be repeated."""

    name = "generate"

    def __init__(self, model: nn.Module, router: Router) -> None:
        self.model = model
        self.router = router

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.generating(args, kwargs):
            return self._own(*args, **kwargs)

    @property
    def _own(self) -> Callable[..., Any]:
        return getattr(type(self.model), self.name).__get__(self.model)  # type: ignore[no-any-return]


class ContinuousBatching(Generate):
    """A model's init_continuous_batching(), on which generate_batch() stands as well.

    Its batches are the tokens of whatever requests are due, and do not say whose. Blocks of its
    cache are shared between requests that begin alike, which their adapters would not.
    """

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.router.uniform:
            raise RoutingError(
                "continuous batching mixes the tokens of all requests, so that `rows` can not be "
                "one entry per sample; use set_adapter, which is for all of them, or generate()"
            )
        manager = self._own(*args, **kwargs)
        config = manager.continuous_batching_config
        if self.router.slots.handles and config.allow_block_sharing:
            raise RoutingError(
                "`continuous_batching_config` must have allow_block_sharing=False, got True: "
                "requests with other adapters would read what this one's put into the cache"
            )
        return manager


def follow_generation(model: nn.Module, router: Router) -> list[str]:
    """Wrap what the model has of the two; returns the names of what was wrapped."""
    wrapped = []
    for wrapper in (Generate, ContinuousBatching):
        if hasattr(type(model), wrapper.name) and wrapper.name not in vars(model):
            vars(model)[wrapper.name] = wrapper(model, router)
            wrapped.append(wrapper.name)
    return wrapped
