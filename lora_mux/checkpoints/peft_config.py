"""adapter_config.json: what PEFT's LoraConfig says about a saved adapter, field by field.

A field is honoured, or ignored because it does not matter to the forward pass of a trained adapter,
or refused because it means another formula. An unknown field that is set is refused as well,
because it may be a variant that this version does not know.

Source: peft 0.21, src/peft/tuners/lora/config.py and utils/other.py (get_pattern_key).
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import CheckpointError

HONOURED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern lora_bias target_modules "
    "exclude_modules layers_to_transform layers_pattern init_lora_weights bias".split()
)
# Training, initialisation, storage and metadata: the trained factors already hold their effect.
IGNORED = frozenset(
    "lora_dropout fan_in_fan_out velora_config monteclora_config loftq_config eva_config "
    "corda_config lora_ga_config ensure_weight_tying runtime_config task_type auto_mapping "
    "base_model_name_or_path revision inference_mode peft_version megatron_core "
    "qalora_group_size".split()
)
REFUSED = {
    "modules_to_save": "it replaces whole modules, which is not a sum of adapters",
    "trainable_token_indices": "it replaces rows of the embedding",
    "use_dora": "DoRA rescales the base's own output",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow is a router over other adapters",
    "kasa_config": "KaSA changes the base weights",
    "target_parameters": "LoRA on parameters (fused experts) is not supported",
    "layer_replication": "it changes the layers of the base model",
    "megatron_config": "Megatron layers are not supported",
}
# Initialisations that shift the base model, which PEFT repeats on load. Once converted, an adapter
# says true instead.
SHIFTED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")

MAX_CONFIG_BYTES = 1 << 20
MAX_ALPHA = 1e30  # which also keeps out the ints that overflow a float
MAX_PATTERN_LENGTH = 1000
MAX_REPEATS = 4  # with five, a path of 100 characters can take 10^8 steps
MAX_TEXT_IN_ERROR = 80

Value = TypeVar("Value")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a LoraConfig that a loaded adapter depends on."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] | None = None

    def rank(self, path: str) -> int:
        """The rank of the module at `path`."""
        return _first_match(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """alpha / r of the module at `path`, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank(path)
        alpha = _first_match(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether the config targets the module at `path`, by PEFT's rules."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        modules = self.target_modules
        if modules is None or (isinstance(modules, str) and modules.lower() == "all-linear"):
            return True  # PEFT chose for the model; the keys of the file show what
        if not _matches(modules, path):
            return False
        if self.layers_to_transform is None or isinstance(modules, str) or path in modules:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        matches = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", path) for p in patterns)
        layer = next((match for match in matches if match), None)
        return layer is not None and int(layer[1]) in self.layers_to_transform


def read_json(content: bytes, source: str) -> dict[str, Any]:
    """The fields in an adapter_config.json.

    Raises:
        CheckpointError: begins with `source`; it is no JSON object, or too long.
    """
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{source} must be at most {MAX_CONFIG_BYTES} bytes, got more")
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{source} must be JSON, got {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold a JSON object, got {type(values).__name__}")
    return values


def parse_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """The config in the fields of a LoraConfig.

    Raises:
        CheckpointError: begins with `source`, and names a field that has a wrong value or means
            more than LoRA.
    """
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f'{source}: `peft_type` must be "LORA", got {values.get("peft_type")!r}'
        )
    _refuse_other_formulas(source, values)
    _refuse_unknown_fields(source, values)
    check = _Checker(source, values)
    return PeftConfig(
        r=check.rank("r", values.get("r", 8)),
        lora_alpha=check.alpha("lora_alpha", values.get("lora_alpha", 8)),
        use_rslora=check.flag("use_rslora"),
        lora_bias=check.flag("lora_bias"),
        rank_pattern=check.patterns("rank_pattern", check.rank),
        alpha_pattern=check.patterns("alpha_pattern", check.alpha),
        target_modules=check.modules("target_modules"),
        exclude_modules=check.modules("exclude_modules"),
        layers_to_transform=check.layers("layers_to_transform"),
        layers_pattern=check.layer_names("layers_pattern"),
    )


def _refuse_other_formulas(source: str, values: Mapping[str, Any]) -> None:
    for name, reason in REFUSED.items():
        if values.get(name):
            raise CheckpointError(
                f"{source}: `{name}` must be unset, got {_short(values[name])}: {reason}"
            )
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f'{source}: `bias` must be "none", got {_short(values["bias"])}: it changes the biases '
            "of the base model, which all adapters share"
        )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init not in PLAIN_INITS:
        shifted = init.startswith(SHIFTED_BASE)
        raise CheckpointError(
            f"{source}: `init_lora_weights` must be a plain initialisation, got {_short(init)}"
            + (": it is relative to a changed base model; convert it with PEFT" if shifted else "")
        )


def _refuse_unknown_fields(source: str, values: Mapping[str, Any]) -> None:
    for name in values.keys() - HONOURED - IGNORED - REFUSED.keys():
        if values[name]:
            raise CheckpointError(
                f"{source}: `{_short(name)}` must be a field of LoraConfig that lora_mux knows, "
                f"got {_short(values[name])}"
            )
        warnings.warn(f"{source}: ignored unknown field {_short(name)}", stacklevel=5)


class _Checker:
    """The fields of one config, each as the type that it must have."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self._source = source
        self._values = values

    def rank(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(name, "an int of at least 1", value)
        return value

    def alpha(self, name: str, value: object) -> float:
        # A bool is an int, too.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(name, "a number", value)
        if not abs(value) < MAX_ALPHA:
            raise self._error(name, "a finite number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return bool(value)

    def patterns(self, name: str, check: Callable[[str, object], Value]) -> dict[str, Value]:
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self._error(name, "an object of pattern -> number", value)
        return {
            self._pattern(name, key): check(f"{name}[{_short(key)}]", v) for key, v in value.items()
        }

    def modules(self, name: str) -> str | list[str] | None:
        value = self._values.get(name)
        if isinstance(value, str):
            return self._pattern(name, value)
        return self._strings(name, value)

    def layer_names(self, name: str) -> list[str] | None:
        value = self._values.get(name)
        strings = self._strings(name, [value] if isinstance(value, str) else value)
        return strings and [self._pattern(name, pattern) for pattern in strings]

    def layers(self, name: str) -> list[int] | None:
        value = self._values.get(name)
        numbers = [value] if isinstance(value, int) else value
        if numbers is None:
            return None
        if not isinstance(numbers, list) or not all(isinstance(n, int) for n in numbers):
            raise self._error(name, "an int or a list of ints", value)
        return numbers

    def _strings(self, name: str, value: object) -> list[str] | None:
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, "a string or a list of strings", value)
        return value

    def _pattern(self, name: str, pattern: str) -> str:
        """A stranger's regular expression, if it is valid and cannot run for ever.

        Backtracking explodes with repeated groups, and with many unbounded repeats.
        """
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._error(name, f"a regular expression ({error})", pattern) from None
        bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "c", pattern, flags=re.DOTALL)
        if (
            len(pattern) > MAX_PATTERN_LENGTH
            or re.search(r"\)[*+{]", bare)
            or len(re.findall(r"[*+{]", bare)) > MAX_REPEATS
        ):
            simple = f"no repeated groups, at most {MAX_REPEATS} repeats"
            raise self._error(name, f"a simple regular expression ({simple})", pattern)
        return pattern

    def _error(self, name: str, expected: str, got: object) -> CheckpointError:
        return CheckpointError(f"{self._source}: `{name}` must be {expected}, got {_short(got)}")


def _first_match(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern that matches a path's end, from a dot on: PEFT's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _matches(modules: str | Sequence[str], path: str) -> bool:
    """Whether a pattern matches the whole path, or one of several names is the end of it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    parts = path.split(".")
    return not {".".join(parts[i:]) for i in range(len(parts))}.isdisjoint(modules)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_TEXT_IN_ERROR else f"{text[: MAX_TEXT_IN_ERROR - 3]}..."
