"""Targets: which layers of a model can carry adapters, and which of them the user means."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ArgumentTypeError, TargetError
from .kinds import CONVOLUTIONS, Kind, kind_of
from .sharding import is_dtensor, shard_of

# The names of the head in transformers' sequence classifiers. PEFT's "all-linear" skips it too.
CLASSIFIER_HEADS = ("score", "classifier")


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; (0, 0) of any other module."""
    if type(module).__name__ in ("Conv1D", "MuxConv1D") and hasattr(module, "nx"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]  # transformers' name for it
    sizes = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    ints = all(isinstance(size, int) and size > 0 for size in sizes)
    return (sizes[0], sizes[1]) if ints else (0, 0)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: one that says its in_features and out_features."""
    return features(module) != (0, 0)


class Target(NamedTuple):
    """A layer that can carry adapters."""

    linear: nn.Module
    kind: Kind | None = None  # what it is, if not a whole linear layer

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features) of what its pool holds."""
        return features(self.linear) if self.kind is None else self.kind.sizes


def check_target(module: object, argument: str, gathered: bool = False) -> Target:
    """The layer as a target.

    Args:
        module: what should become a MuxLinear.
        argument: what error messages call it.
        gathered: FSDP2 gathers the layer's weight before it calls the layer.

    Raises:
        ArgumentTypeError: it is not a module.
        TargetError: it is no plain layer that can carry adapters, or is split in a way that is not
            supported.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"`{argument}` must be a linear layer, got {type(module).__name__}")
    if hasattr(module, "mux_pool"):
        raise TargetError(f"`{argument}` must be a plain linear layer, got a MuxLinear")
    if type(module).__module__.startswith("peft."):
        raise TargetError(
            f"`{argument}` must be a plain linear layer, got PEFT's {type(module).__name__}; "
            "attach to the base model without the PeftModel around it, or use attach_peft"
        )
    if is_linear(module):
        return Target(module, None if gathered else shard_of(module, argument))
    kind = kind_of(module, argument)
    if kind is None:
        raise TargetError(
            f"`{argument}` must be a linear layer (nn.Linear, Conv1D, or one with in_features and "
            f"out_features), an nn.Embedding or a convolution, got {type(module).__name__}"
        )
    return Target(module, kind)


def in_features(module: nn.Module) -> int:
    """The size of the rows of a layer that can carry adapters, whether it does so or not."""
    if is_linear(module):
        return features(module)[0]
    kind = kind_of(module, "module")
    assert kind is not None
    return kind.sizes[0]


def device_of(module: nn.Module) -> torch.device:
    """Where the layer computes. Its weight may be elsewhere, have any type, or not exist."""
    # accelerate keeps weights on the meta device or the CPU between calls.
    offloaded = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if offloaded is not None:
        return torch.device(offloaded)
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a plain layer computes in; `default` for a quantised one, which hides it."""
    # From the registry, because a quantised layer's `weight` may be a property that unpacks it.
    weight = module._parameters.get("weight")
    # Only a plain Parameter, or one that is split, has the dtype of the computation: torchao's
    # tensors report float32 as well.
    if not isinstance(weight, nn.Parameter):
        return default
    plain = type(weight) is nn.Parameter or is_dtensor(weight)
    if plain and weight.is_floating_point() and weight.element_size() > 1:
        return weight.dtype
    return default


def common_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the first plain layer of a model computes in, else torch's default.

    Quantised layers hide theirs, and most likely compute in the same.
    """
    dtypes = (dtype_of(module, torch.int8) for module in model.modules())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, Target]:
    """Path -> layer, of the layers that `targets` means; `lora_mux.attach` has its three forms.

    Raises:
        TargetError: nothing matches, or a match cannot carry adapters.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    skipped = bypassed(modules)
    if _is_all_linear(targets):
        skipped |= _heads(model, modules)
        found = {p: m for p, m in modules.items() if p not in skipped and is_linear(m)}
    else:
        matches = _matcher(targets)
        found = {p: m for p, m in modules.items() if matches(p)}
        hidden = sorted(skipped & found.keys())
        if hidden:
            raise TargetError(
                f"`targets` must match layers that are called, got {hidden[0]!r}, whose parent "
                "reads its weight instead, which would silently hide the adapters; leave it out"
            )
    if not found:
        examples = [p for p, m in modules.items() if is_linear(m)][:3]
        raise TargetError(
            f"`targets` must match at least one linear layer of the model, got {targets!r}; "
            f"its linear layers: {', '.join(examples) or 'none'}{', ...' if examples else ''}"
        )
    return as_targets(model, found)


def find_heads(model: nn.Module, targets: object) -> dict[str, nn.Module]:
    """The linear layers that "all-linear" does not mean, but that an adapter may touch.

    They are the output heads. Other `targets` say all that may carry adapters.
    """
    if not _is_all_linear(targets):
        return {}
    modules = {path: module for path, module in model.named_modules() if path}
    heads = _heads(model, modules) - bypassed(modules)
    return {path: modules[path] for path in sorted(heads) if is_linear(modules[path])}


def find_others(model: nn.Module, targets: object) -> dict[str, nn.Module]:
    """The embeddings of tokens, and convolutions, which "all-linear" does not mean either."""
    if not _is_all_linear(targets):
        return {}
    tables = token_embeddings(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, CONVOLUTIONS)
        # Others may be parameters that nobody calls, or be asked for positions.
        or (isinstance(module, nn.Embedding) and (not tables or module in tables))
    }


def token_embeddings(model: nn.Module) -> set[nn.Module]:
    """The embeddings of tokens, where a model, or one in it, says which they are."""
    found = (input_embedding(module) for module in model.modules())
    return {module for module in found if isinstance(module, nn.Embedding)}


def input_embedding(module: Any) -> nn.Module | None:
    """The embedding of a model's tokens, or what is in its place, as transformers' models say."""
    try:
        found: nn.Module | None = module.get_input_embeddings()
    except Exception:  # a module of whatever make, which may have none
        return None
    return found


def as_targets(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Target]:
    """Path -> layer, checked.

    Raises:
        TargetError: a layer cannot carry adapters.
    """
    gathering = [path for path, module in model.named_modules() if _is_fsdp(module)]

    def gathered(path: str) -> bool:
        return any(not p or f"{path}.".startswith(f"{p}.") for p in gathering)

    return {p: check_target(m, f"targets: {p}", gathered(p)) for p, m in layers.items()}


def _is_all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _matcher(targets: object) -> Callable[[str], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(
                f"`targets` must be a regular expression, got {targets!r}: {error}"
            ) from None
        return lambda path: pattern.fullmatch(path) is not None
    if not isinstance(targets, Sequence | set | frozenset) or not all(
        isinstance(target, str) for target in targets
    ):
        raise ArgumentTypeError(
            f"`targets` must be 'all-linear', a regular expression or a list of path suffixes, "
            f"got {targets!r}"
        )
    suffixes = tuple(f".{target}" for target in targets)
    return lambda path: f".{path}".endswith(suffixes)


def _heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The paths of the output head, which "all-linear" leaves out, as PEFT does."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        return {path for path, module in modules.items() if module is head}
    if type(model).__name__.endswith("ForSequenceClassification"):
        return {path for path in CLASSIFIER_HEADS if path in modules}
    return set()


def _is_fsdp(module: nn.Module) -> bool:
    """Whether fully_shard was applied to a module, which changes its class."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def bypassed(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of layers whose weight torch's attention and fast path read without a call.

    Adapters would be hidden there, without a word.
    """
    return {
        f"{path}.{child}"
        for path, module in modules.items()
        for child in ("out_proj", "linear1", "linear2")
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        and hasattr(module, child)
    }
