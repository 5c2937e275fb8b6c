"""Methods of transformers' and diffusers' models that mean something else on an attached model.

generate() and continuous batching run a model in batches of their own making; what diffusers does
with PEFT's layers would do nothing. They are wrapped on the instance, by objects and not by
closures, so that a copy of the model gets a copy of them.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import RoutingError, TargetError
from .continuous_batching import follow_requests, requests_due, rows_of_requests
from .given_rows import KEYWORD, GivenRows

# Of diffusers' models: they look for PEFT's layers, and do nothing where there are none.
PEFT_METHODS = (
    "set_adapters",
    "delete_adapters",
    "enable_lora",
    "disable_lora",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
)
REPETITIONS = ("num_beams", "num_return_sequences")


class Generate:
    """A model's generate(), which has the rows that it begins with to its end."""

    name = "generate"

    def __init__(self, model: nn.Module, mux: GivenRows) -> None:
        self.model = model
        self.mux = mux

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop(KEYWORD, None)
        inputs = inputs_of_generate(args, kwargs)
        shrinks = hasattr(type(self.model), KeepRows.name)
        # How often each sample is repeated, in order. A batch that shrinks says that itself.
        beams = 1 if shrinks else max(self._times(inputs, name) for name in REPETITIONS)
        with self.mux._generating(rows, beams, inputs):
            self.mux._router.check_batch(args, kwargs)
            self._check_order(inputs, beams, shrinks)
            return self._original(*args, **kwargs)

    def _setting(self, inputs: Mapping[str, Any], name: str) -> Any:
        """A setting of generate(): given with the call, by its config, or by the model's."""
        given, own = inputs.get("generation_config"), getattr(self.model, "generation_config", None)
        found = (inputs.get(name), getattr(given, name, None), getattr(own, name, None))
        return next((value for value in found if value is not None), None)

    def _times(self, inputs: Mapping[str, Any], name: str) -> int:
        return int(self._setting(inputs, name) or 1)

    def _check_order(self, inputs: Mapping[str, Any], beams: int, shrinks: bool) -> None:
        """Refuse rows whose order nobody knows in the batches that generate() makes."""
        route = self.mux._router.rows().route
        if route is None or route.uniform or route.is_alike:
            return
        temperature = self._setting(inputs, "temperature")
        if shrinks and isinstance(temperature, tuple | list) and len(temperature) > 1:
            raise RoutingError(
                f"`temperature` must be one number where samples have different rows, because some "
                f"of them would be computed again, got {temperature}; give one, or run the samples "
                "of each adapter as a batch of their own"
            )
        own = self._original.__func__.__module__ != "transformers.generation.utils"
        scale = self._setting(inputs, "guidance_scale")
        guided = scale not in (None, 1) or inputs.get("generation_mode") == "image"
        if own and guided and beams > 1 and not isinstance(route.expand, Mapping):
            raise RoutingError(
                f"`expand` must say in which order the batch is repeated where generate() has both "
                f"guidance and {beams} sequences for each sample, got {route.expand!r}; open "
                f'`with mux.route(rows, expand={{"interleave": {beams}, "tile": 2}})` around it'
            )

    @property
    def _original(self) -> Any:
        method = getattr(type(self.model), self.name)
        return method.__get__(self.model)


class KeepRows(Generate):
    """Whisper's method that drops the samples that are finished from a batch of generate()."""

    name = "_maybe_reduce_batch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reduced = getattr(type(self.model), self.name)(*args, **kwargs)  # a static method
        scope = self.mux._router.scopes.current()
        inputs = {} if scope is None else scope.inputs
        sequences, beams = (self._times(inputs, name) for name in reversed(REPETITIONS))
        # Its samples are numbered after each was repeated for its sequences.
        self.mux._router.keep([number // sequences for number in reduced[2]], beams)
        return reduced


class GenerateBatch(Generate):
    """A model's generate_batch(), which would only log what is wrong with its requests."""

    name = "generate_batch"

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = rows_of_requests(self.mux, len(inputs), kwargs.pop(KEYWORD, None))  # which raises
        with requests_due(rows):
            return self._original(inputs, *args, **kwargs)


class InitContinuousBatching(Generate):
    """A model's init_continuous_batching(), which generate_batch() calls as well."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = self._original(*args, **kwargs)
        follow_requests(manager, self.mux)
        return manager


class PeftMethod(Generate):
    """A method that would look for PEFT's layers in the model."""

    def __init__(self, model: nn.Module, mux: GivenRows, name: str) -> None:
        super().__init__(model, mux)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TargetError(
            f"`{self.name}` must be asked of the Mux, got an attached model, which holds no layers "
            "of PEFT's; use Mux.of(model): set_adapter, disable_adapter, remove, detach"
        )


def inputs_of_generate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of generate() that a forward has, too, by the names that it has there."""
    named = {**dict(zip(("input_ids", "generation_config"), args, strict=False)), **kwargs}
    if "inputs" in named:
        named.setdefault("input_ids", named["inputs"])
    return {name: value for name, value in named.items() if value is not None}


WRAPPERS = (Generate, KeepRows, GenerateBatch, InitContinuousBatching)


def follow_generation(model: nn.Module, mux: GivenRows) -> None:
    """Wrap those of the methods that the model has."""
    wrappers = [wrapper(model, mux) for wrapper in WRAPPERS]
    for wrapper in (*wrappers, *(PeftMethod(model, mux, name) for name in PEFT_METHODS)):
        if hasattr(type(model), wrapper.name) and wrapper.name not in vars(model):
            vars(model)[wrapper.name] = wrapper


def forget_generation(model: nn.Module, mux: GivenRows) -> None:
    """Take the wrappers off again, as many as there are."""
    for name in (*(wrapper.name for wrapper in WRAPPERS), *PEFT_METHODS):
        found = vars(model).get(name)
        if isinstance(found, Generate) and found.mux is mux:
            del vars(model)[name]
