"""The model that a checkpoint is for: which layers may be adapted, by which names, and its weights.

Keys of other times and of wrappers mean the same modules. A name is changed only if it is not one
of the model's own and the changed one is, so that nothing is ever guessed.
"""

import importlib
import math
import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core import computed_once
from ..errors import AdapterError, ArgumentTypeError
from ..layers import common_dtype, dtype_of, in_features, input_embedding, is_dtensor, with_gain
from .stored_adapter import StoredAdapter

PREFIX = "base_model.model."  # of keys of PEFT's
# What torch.compile, FSDP and checkpointing put into paths; and data parallelism, in front of them.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PARALLEL = "module."
# CLIPTextModel lost this level in transformers 5, and its LoRA files kept it.
TEXT_MODEL = "text_model."


class BaseModel:
    """What a reader of checkpoints asks of a model.

    Args:
        targets: the paths of all layers that can carry adapters.
        model: the model itself, whose weights and former names count; None = there are none.
        key_mapping: patterns of keys without PEFT's prefix -> replacements, of which the first that
            matches counts, as in PEFT's load_adapter.

    Raises:
        ArgumentTypeError: key_mapping is no mapping of patterns.
    """

    def __init__(
        self,
        targets: Iterable[str] = (),
        model: nn.Module | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        self.targets = tuple(targets)
        self._model = model
        self._known = frozenset(self.targets)
        self._mapping = _patterns(key_mapping)
        # All that names depend on beside the keys.
        mapping = tuple((pattern.pattern, text) for pattern, text in self._mapping)
        self.meaning: Hashable = (self.targets, type(model), mapping)

    def renamed(self, key: str) -> str:
        """A key without PEFT's prefix, as the user's mapping has it."""
        prefix = PREFIX if key.startswith(PREFIX) else ""
        rest = key.removeprefix(prefix)
        for pattern, replacement in self._mapping:
            changed, count = pattern.subn(replacement, rest)
            if count:
                return prefix + changed
        return key

    def path(self, name: str) -> str:
        """The target that a key means by this name, else the name without PEFT's prefix."""
        return self._first(name, self._known)

    def _first(self, name: str, known: frozenset[str]) -> str:
        plain = name.removeprefix(PREFIX)
        if plain in known or not known:
            return plain
        return next((other for other in self._others(name) if other in known), plain)

    def _others(self, name: str) -> Iterator[str]:
        """The names that this one may stand for, in the order that counts."""
        bare = WRAPPERS.sub("", f"{name}.").removesuffix(".")
        bare = bare.removeprefix(PARALLEL).removeprefix(PREFIX).removeprefix(PARALLEL)
        yield bare
        if self._model is None:
            return
        own = getattr(self._model, "_checkpoint_conversion_mapping", None) or {}  # transformers 4
        for pattern, replacement in own.items():
            changed, count = re.subn(pattern, replacement, bare)
            if count:
                yield changed
                break
        rename, renamings = self._renamings
        if renamings:
            yield rename(f"{bare}.weight", renamings, [])[0].removesuffix(".weight")
        yield bare.removeprefix(TEXT_MODEL)
        yield TEXT_MODEL + bare

    @computed_once
    def _renamings(self) -> tuple[Any, list[Any]]:
        """transformers' own tables of former names, as PEFT uses them."""
        if "transformers" not in sys.modules:
            return None, []
        try:
            loading = importlib.import_module("transformers.core_model_loading")
            tables = importlib.import_module("transformers.conversion_mapping")
            found = tables.get_model_conversion_mapping(self._model)
            plain = [entry for entry in found if isinstance(entry, loading.WeightRenaming)]
            return loading.rename_source_key, plain
        except (ImportError, AttributeError, TypeError):  # of another version, or no model of its
            return None, []

    def fits(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether an A of this shape could be of a target."""
        if self._model is None:
            return True
        return math.prod(shape[1:]) == self.in_features(path)

    def in_features(self, path: str) -> int:
        """The size of a target's input."""
        assert self._model is not None
        return in_features(self._model.get_submodule(path))

    def with_gains(self, stored: StoredAdapter) -> StoredAdapter:
        """An adapter with gains in place of DoRA's magnitudes; one without these as it is.

        Raises:
            AdapterError: its modules are no targets, or their weights cannot be read.
        """
        paths = [path for path, parts in stored.outline.keys.items() if "gain" in parts]
        unknown = [path for path in paths if path not in self._known]
        if unknown or (paths and self._model is None):
            raise AdapterError(
                f"`{stored.source}`: {(unknown or paths)[0]!r} must be a target of the attached "
                "model, whose weight DoRA needs, but is not"
            )
        if not paths:
            return stored
        model: Any = self._model
        weights = stored.weights(stored.read(False))
        for path in paths:
            layer, given = model.get_submodule(path), weights[path]
            dtype, argument = dtype_of(layer, common_dtype(model)), f"{stored.source}[{path!r}]"
            plain, magnitude = replace(given, gain=None), given.tensors()["gain"]
            weights[path] = with_gain(layer, plain, magnitude, dtype, argument)
        return stored.holding(weights)

    @computed_once
    def _parameters(self) -> Mapping[str, nn.Parameter]:
        model = self._model
        return {} if model is None else dict(model.named_parameters(remove_duplicate=False))

    def parameter(self, name: str) -> str | None:
        """The model's parameter that a key means by this name, a copy of which it may be of."""
        path, _, part = name.rpartition(".")
        owners = self._owners.get(part)
        found = f"{self._first(path, owners)}.{part}" if owners else ""
        return found if found in self._parameters else None

    def with_its_tokens(self, path: str) -> list[str]:
        """The modules that have the trained tokens of one: itself, and what is tied to it.

        As in PEFT, tokens are those of tied modules as well if they are the input embedding's, and
        the model's config ties it.
        """
        model: Any = self._model
        is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        if not is_tied or model.get_submodule(path) is not input_embedding(model):
            return [path]
        return [name.removesuffix(".weight") for name in self.tied(f"{path}.weight")]

    def tied(self, name: str) -> Iterator[str]:
        """All names of a parameter, which several modules may share."""
        it = self._parameters[name]
        return (other for other, parameter in self._parameters.items() if parameter is it)

    def parameters(self) -> Iterable[str]:
        """The names of all parameters."""
        return self._parameters

    def module(self, path: str) -> nn.Module:
        """One of the model's modules."""
        assert self._model is not None
        return self._model.get_submodule(path)

    @computed_once
    def _owners(self) -> Mapping[str, frozenset[str]]:
        """The name of parameters -> the paths of the modules that have one."""
        owners: dict[str, set[str]] = {}
        for name in self._parameters:
            path, _, part = name.rpartition(".")
            owners.setdefault(part, set()).add(path)
        return {part: frozenset(paths) for part, paths in owners.items()}

    def value(self, name: str) -> Tensor | None:
        """The value of a parameter; None if it is quantised, split, or not there."""
        found = self._parameters[name]
        plain = type(found) is nn.Parameter and not is_dtensor(found) and not found.is_meta
        return found.detach() if plain and found.is_floating_point() else None


def _patterns(key_mapping: object) -> list[tuple[re.Pattern[str], str]]:
    if key_mapping is None:
        return []
    if not isinstance(key_mapping, Mapping):
        raise ArgumentTypeError(
            "`key_mapping` must map patterns of keys to replacements, got "
            f"{type(key_mapping).__name__}"
        )
    try:
        pairs = [(re.compile(pattern), text) for pattern, text in key_mapping.items()]
        for pattern, text in pairs:
            pattern.sub(text, "")
    except (re.error, TypeError, IndexError) as error:
        raise ArgumentTypeError(
            f"`key_mapping` must map patterns of `re` to replacements, got {error}"
        ) from None
    return pairs
