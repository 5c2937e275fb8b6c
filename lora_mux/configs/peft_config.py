"""adapter_config.json: what PEFT's LoraConfig says about a saved adapter, field by field.

A field is honoured, or ignored because it does not matter to the forward pass of a trained adapter,
or refused because it means another formula. An unknown field that is set is refused as well,
because it may be a variant that this version does not know, unless its name says that it is about
training or about the file.

Source: peft 0.21, src/peft/tuners/lora/config.py and utils/other.py (get_pattern_key).
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import CheckpointError, short, warn
from . import patterns
from .fields import Fields
from .patterns import PathEnds, PatternError, Steps

HONOURED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern lora_bias target_modules "
    "exclude_modules layers_to_transform layers_pattern init_lora_weights bias modules_to_save "
    "lora_dropout ensure_weight_tying trainable_token_indices use_bdlora use_dora".split()
)
# Training, initialisation, storage and metadata: the trained factors already hold their effect.
IGNORED = frozenset(
    "fan_in_fan_out velora_config monteclora_config loftq_config eva_config "
    "corda_config lora_ga_config runtime_config task_type auto_mapping "
    "base_model_name_or_path revision inference_mode peft_version megatron_core "
    "qalora_group_size".split()
)
REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "use_qalora": "QA-LoRA pools its inputs",
    "arrow_config": "Arrow is a router over other adapters",
    "kasa_config": "KaSA changes the base weights",
    "target_parameters": "LoRA on parameters (fused experts) is not supported",
    "layer_replication": "it changes the layers of the base model",
    "megatron_config": "Megatron layers are not supported",
}
# Fields of trainers (ms-swift, unsloth) and of PEFT's first versions, and others that by their name
# are about training or about the file. No variant of the formula would be named like that.
HARMLESS = re.compile(
    r"lora_dtype|merge_weights|unsloth_\w+|(?:swift|trl|torch|transformers|axolotl|python)_version"
    r"|\w*(?:learning_rate|_lr|_lr_ratio|_dropout|optimizer|scheduler|_epochs?|dataset|_author|_license)"
)
# Initialisations that shift the base model, which PEFT repeats on load. Once converted, an adapter
# says true instead.
SHIFTED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 20  # of the values in a config
MAX_DIGITS = 30  # of an int; reading a million digits takes Python seconds
MAX_NAMES_IN_WARNING = 3


class Strength(NamedTuple):
    """What a module's factors must have, and what their product is multiplied with."""

    rank: int
    scaling: float  # alpha / rank, or alpha / sqrt(rank) with rsLoRA


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a LoraConfig that a loaded adapter depends on.

    Two configs that mean the same are equal: lists of names and of layers are sets, and patterns,
    of which the first that matches counts, are in their order.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    bias: str = "none"  # else biases of the base were trained along
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    target_modules: str | frozenset[str] | None = None
    exclude_modules: str | frozenset[str] | None = None
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()  # sorted
    blocks: int = 1  # on the diagonal of A or of B, beside which BD-LoRA has zeros
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name -> rows of its weight
    ensure_weight_tying: bool = False  # what is tied to a saved parameter was saved as well
    lora_dropout: float = 0.0  # of training alone
    source: str = field(default="", compare=False)  # what error messages call it

    def strengths(self, paths: Collection[str]) -> dict[str, Strength]:
        """Path -> rank and scaling, of all modules of an adapter at once.

        Raises:
            CheckpointError: a path is too long, or the patterns take too long for so many paths.
        """
        with self._bounded(paths) as steps:
            ranks = PathEnds(dict(self.rank_pattern), self.r, steps)
            alphas = PathEnds(dict(self.alpha_pattern), self.lora_alpha, steps)
            found = {}
            for text in paths:
                path = patterns.Path(text, steps)
                rank, alpha = ranks[path], alphas[path]
                found[text] = Strength(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        return found

    def saves(self, name: str) -> bool:
        """Whether a module or a parameter lies in a module that was saved as a whole.

        PEFT asks for the end of the path, dot or not: "score" saves "my_score".
        """
        ends = [i for i, c in enumerate(name) if c == "."]
        paths = (name[:end] for end in [*ends, len(name)])
        return any(path.endswith(self.modules_to_save) for path in paths)

    def tokens(self, path: str) -> tuple[int, ...]:
        """The rows of a module's weight that were trained, if some were.

        PEFT asks for the end of the path, and without a name means the embedding of the input.
        """
        found = {rows for name, rows in self.trainable_tokens if path.endswith(name)}
        if len(found) > 1:
            raise CheckpointError(
                f"{self.source}: `trainable_token_indices` must name each module once, got several "
                f"for {path!r}"
            )
        return found.pop() if found else ()

    def targeted(self, paths: Collection[str]) -> set[str]:
        """Those of the paths that the config targets, by PEFT's rules.

        Raises:
            CheckpointError: a path is too long, or the patterns take too long for so many paths.
        """
        modules = self.target_modules
        if isinstance(modules, str) and modules.lower() == "all-linear":
            modules = None  # PEFT chose for the model; the keys of the file show what
        names = modules if isinstance(modules, frozenset) else frozenset()
        with self._bounded(paths) as steps:
            included = None if modules is None else _Modules(modules, steps)
            excluded = _Modules(self.exclude_modules or frozenset(), steps)
            layers = None
            if names and self.layers_to_transform:
                layers = _Layers(self.layers_to_transform, self.layers_pattern, steps)
            return {
                path.text
                for path in (patterns.Path(text, steps) for text in paths)
                if not excluded.hold(path)
                and (included is None or included.hold(path))
                and (layers is None or path.text in names or layers.hold(path))
            }

    @contextmanager
    def _bounded(self, paths: Collection[str]) -> Iterator[Steps]:
        try:
            yield Steps(len(paths))
        except PatternError as error:
            raise CheckpointError(
                f"{self.source}: the config's patterns and module paths must be {error}; list the "
                "modules' names instead of patterns"
            ) from None


class _Modules:
    """The modules that a pattern names by their whole paths, or names by their paths' ends."""

    def __init__(self, modules: str | frozenset[str], steps: Steps) -> None:
        self._names = frozenset() if isinstance(modules, str) else modules
        self._pattern = patterns.parse(modules, steps) if isinstance(modules, str) else None

    def hold(self, path: patterns.Path) -> bool:
        if self._pattern is not None:
            return self._pattern.before(path, 1) & path.start != 0
        return any(path.text[start:] in self._names for start in path.names)


class _Layers:
    r"""The modules in layers of some numbers: `re.match(rf"(?:^|.*?\.){p}\.(\d+)\.")`, of each
    pattern p in turn."""

    def __init__(self, numbers: frozenset[int], names: tuple[str, ...], steps: Steps) -> None:
        self._numbers = numbers
        # Without a pattern PEFT wants a dot before the layers' name.
        sources = [rf"(?:.*\.)?(?:{p})" for p in names] or [r".*\.[^.]*"]
        self._patterns = [patterns.parse(source, steps) for source in sources]

    def hold(self, path: patterns.Path) -> bool:
        numbers = list(re.finditer(r"\.(\d+)(?=\.)", path.text))
        for pattern in self._patterns:
            for number in numbers:
                end = path.start >> number.start()
                if pattern.before(path, end) & path.start:
                    return int(number[1]) in self._numbers
        return False


def parse_config(
    values: Mapping[str, Any], source: str, biases: Collection[str] = ("none",)
) -> PeftConfig:
    """The config in the fields of a LoraConfig.

    Args:
        values: the fields.
        source: what error messages call it.
        biases: what `bias` may be.

    Raises:
        CheckpointError: begins with `source`, and names a field that has a wrong value or means
            more than LoRA.
    """
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f'{source}: `peft_type` must be "LORA", got {short(values.get("peft_type"))}'
        )
    _refuse_other_formulas(source, values, biases)
    _refuse_unknown_fields(source, values)
    check = Fields(source, values)
    use_dora = check.flag("use_dora")
    if use_dora and check.flag("lora_bias"):
        raise CheckpointError(
            f"{source}: `lora_bias` must be unset with DoRA, got true: PEFT has no formula for both"
        )
    return PeftConfig(
        r=check.rank("r", values.get("r", 8)),
        lora_alpha=check.alpha("lora_alpha", values.get("lora_alpha", 8)),
        use_rslora=check.flag("use_rslora"),
        lora_bias=check.flag("lora_bias"),
        use_dora=use_dora,
        bias=values.get("bias") or "none",
        rank_pattern=check.patterns("rank_pattern", check.rank),
        alpha_pattern=check.patterns("alpha_pattern", check.alpha),
        target_modules=check.modules("target_modules"),
        exclude_modules=check.modules("exclude_modules"),
        layers_to_transform=check.layers("layers_to_transform"),
        layers_pattern=check.layer_names("layers_pattern"),
        modules_to_save=check.names("modules_to_save"),
        blocks=check.blocks("use_bdlora"),
        trainable_tokens=check.tokens("trainable_token_indices"),
        ensure_weight_tying=check.flag("ensure_weight_tying"),
        lora_dropout=check.dropout("lora_dropout"),
        source=source,
    )


def parse_fields(text: str | bytes, source: str) -> dict[str, Any]:
    """The fields in the JSON of a config.

    Raises:
        CheckpointError: begins with `source`. The text is too long, is not JSON, or holds a name
            twice, of which PEFT takes the last and others the first.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{source} must be at most {MAX_CONFIG_BYTES} bytes, got more")
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_int=_int)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{source} must be JSON, got {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold a JSON object, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
    if level:
        raise CheckpointError(f"{source} must be nested at most {MAX_DEPTH} deep, got more")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {short(name)} twice")
        values[name] = value
    return values


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an int of {len(digits)} digits")
    return int(digits)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_other_formulas(source: str, values: Mapping[str, Any], biases: Collection[str]) -> None:
    for name, reason in REFUSED.items():
        if values.get(name):
            raise CheckpointError(
                f"{source}: `{name}` must be unset, got {short(values[name])}: {reason}"
            )
    bias = values.get("bias") or "none"
    if not isinstance(bias, str) or bias not in biases:
        raise CheckpointError(
            f"{source}: `bias` must be {' or '.join(map(repr, biases))}, got {short(bias)}: it "
            "changes the biases of the base model, which all adapters share"
        )
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init not in PLAIN_INITS:
        shifted = init.startswith(SHIFTED_BASE)
        raise CheckpointError(
            f"{source}: `init_lora_weights` must be a plain initialisation, got {short(init)}"
            + (": it is relative to a changed base model; convert it with PEFT" if shifted else "")
        )


def _refuse_unknown_fields(source: str, values: Mapping[str, Any]) -> None:
    known = HONOURED | IGNORED | REFUSED.keys()
    unknown = [name for name in values if name not in known]
    for name in unknown:
        harmless = HARMLESS.fullmatch(name) and not isinstance(values[name], dict | list)
        if values[name] and not harmless:
            raise CheckpointError(
                f"{source}: `{short(name)}` must be a field of LoraConfig that lora_mux knows, "
                f"got {short(values[name])}"
            )
    if unknown:
        names = ", ".join(map(short, unknown[:MAX_NAMES_IN_WARNING]))
        more = ", ..." if len(unknown) > MAX_NAMES_IN_WARNING else ""
        count = f"ignored {len(unknown)} unknown fields that change nothing here"
        warn(f"{source}: {count}: {names}{more}")
