"""A new adapter, as PEFT would begin it: layers with ranks and scalings, and initial factors."""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ArgumentTypeError, CheckpointError, short
from . import patterns
from .fields import MAX_ALPHA, MAX_RANK
from .patterns import PathEnds, PatternError, Steps
from .peft_config import PeftConfig, Strength

Value = TypeVar("Value", int, float)


def new_strengths(
    paths: Sequence[str],
    *,
    r: int,
    alpha: float,
    targets: str | Collection[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
) -> dict[str, Strength]:
    """The layers of a new adapter, in the order of `paths`, with their ranks and scalings.

    Args mean what those of PEFT's LoraConfig do. But names and patterns that match nothing are
    refused, which PEFT passes over.

    Args:
        paths: all layers that can carry adapters.
        r: the rank.
        alpha: the scaling is alpha / r, or alpha / sqrt(r) with use_rslora.
        targets: None or "all-linear" = all of them; a string = a pattern of whole paths; several =
            paths, or their last names.
        rank_pattern: pattern of the end of a path, or with "^" of a whole one -> rank, of which the
            first that matches counts.
        alpha_pattern: likewise -> alpha.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        AdapterError: a rank is less than 1, an alpha is not finite, a name or a pattern matches no
            layer, or a pattern is beyond what is matched in bounded time.
    """
    rank, number = _rank(r, "r"), _alpha(alpha, "alpha")
    modules = _modules(targets)
    steps = Steps(len(paths))
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    for argument, given in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(given, Mapping):
            raise ArgumentTypeError(
                f"`{argument}` must be a mapping of pattern -> number, got {type(given).__name__}"
            )
        for pattern in given:
            _check_pattern(pattern, f"a key of `{argument}`", steps)
    if isinstance(modules, str):
        _check_pattern(modules, "`targets`", steps)
    config = PeftConfig(
        r=rank,
        lora_alpha=number,
        use_rslora=bool(use_rslora),
        rank_pattern=tuple((p, _rank(v, f"rank_pattern[{short(p)}]")) for p, v in ranks.items()),
        alpha_pattern=tuple(
            (p, _alpha(v, f"alpha_pattern[{short(p)}]")) for p, v in alphas.items()
        ),
        target_modules=modules,
        source="a new adapter",
    )
    try:
        targeted = config.targeted(paths)
        chosen = [path for path in paths if path in targeted]
        _check_targets(targets, modules, chosen)
        _check_used("rank_pattern", config.rank_pattern, chosen)
        _check_used("alpha_pattern", config.alpha_pattern, chosen)
        return config.strengths(chosen)
    except CheckpointError as error:  # the patterns take too long for so many paths
        raise AdapterError(str(error)) from None


def initial_factors(
    in_features: int,
    out_features: int,
    r: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A new layer's A [r, in_features] and B [out_features, r], so that it adds nothing at first.

    A is uniform in +-1 / sqrt(in_features), and B zero: PEFT's init_lora_weights=True.

    With a generator on the CPU, A has the bits that PEFT draws after torch.manual_seed() of the
    same seed, layer after layer in the order of named_modules(), without lora_bias. They are drawn
    in fp32 and then rounded. PEFT rounds them to the base's dtype, and keeps half precision in fp32
    after that: for its bits over a base in bf16, take A.to(torch.bfloat16).float().

    Returns:
        Both in `dtype`, on the generator's device.
    """

    def draw(rows: int, columns: int) -> Tensor:
        values = torch.empty(rows, columns, dtype=torch.float32, device=generator.device)
        return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

    # PEFT makes two nn.Linear, which draw weights of their own, before it draws A.
    draw(r, in_features)
    draw(out_features, r)
    A = draw(r, in_features).to(dtype)
    return A, torch.zeros(out_features, r, dtype=dtype, device=generator.device)


def _rank(value: object, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"`{argument}` must be an int, got {short(value)}")
    if not 1 <= value <= MAX_RANK:
        raise AdapterError(f"`{argument}` must be from 1 to {MAX_RANK}, got {short(value)}")
    return value


def _alpha(value: object, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"`{argument}` must be a number, got {short(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction that is larger than all floats
        number = math.inf
    if not abs(number) < MAX_ALPHA:
        raise AdapterError(
            f"`{argument}` must be finite, and less than {MAX_ALPHA:.0e} in size, got "
            f"{short(value)}"
        )
    return number


def _modules(targets: object) -> str | frozenset[str] | None:
    """What PeftConfig has as target_modules; None = all layers."""
    if targets is None or isinstance(targets, str):
        return None if targets is None or targets.lower() == "all-linear" else targets
    # A tensor or a dict is iterable, too.
    if not isinstance(targets, Collection) or isinstance(targets, bytes | Mapping):
        raise ArgumentTypeError(
            "`targets` must be None, a pattern, or a sequence of names, got "
            f"{type(targets).__name__}"
        )
    for name in targets:
        if not isinstance(name, str):
            raise ArgumentTypeError(f"`targets` must hold names, got {short(name)}")
    return frozenset(targets)


def _check_pattern(pattern: object, argument: str, steps: Steps) -> None:
    if not isinstance(pattern, str):
        raise ArgumentTypeError(f"{argument} must be a string, got {short(pattern)}")
    try:
        patterns.check(pattern, steps)
    except PatternError as error:
        raise AdapterError(
            f"{argument} must be {error}, got {short(pattern)}; name the layers instead"
        ) from None


def _check_targets(
    targets: object, modules: str | frozenset[str] | None, chosen: Sequence[str]
) -> None:
    """Refuse targets that name no layer, all together or one of them."""
    if isinstance(modules, frozenset):
        ends = {path[start:] for path in chosen for start in patterns.Path(path, Steps()).names}
        missing = sorted(modules - ends)
        if missing:
            raise AdapterError(
                "`targets` must hold paths of layers that can carry adapters, or their last names, "
                f"got {short(missing[0])}, which is the end of none; see mux.targets"
            )
    if not chosen:
        raise AdapterError(
            "`targets` must match a layer that can carry adapters, a pattern its whole path, got "
            f"{short(targets)}; give last names as a list, and see mux.targets"
        )


def _check_used(argument: str, given: tuple[tuple[str, Value], ...], chosen: Sequence[str]) -> None:
    """Refuse patterns that match none of the layers, which are mistakes."""
    steps = Steps(len(chosen) * (1 + len(given)))
    try:
        paths = [patterns.Path(path, steps) for path in chosen]
        first = PathEnds[str | None]({pattern: pattern for pattern, _ in given}, None, steps)
        unused = {pattern for pattern, _ in given} - {first[path] for path in paths}
        for pattern in sorted(unused):  # some may stand behind others that match the same
            alone = PathEnds[bool]({pattern: True}, False, steps)
            if not any(alone[path] for path in paths):
                raise AdapterError(
                    f"`{argument}` must have patterns of layers that the adapter targets, got "
                    f"{short(pattern)}, which matches none; it is matched with the end of a path"
                )
    except PatternError as error:
        raise AdapterError(
            f"`{argument}` must be {error}; name the layers instead of patterns"
        ) from None
