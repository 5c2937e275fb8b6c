"""The config of an adapter that is written: the fewest fields that mean its ranks and scalings."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError
from .peft_config import PeftConfig, Strength, parse_config

SOURCE = "adapter_config.json"  # what error messages call it


def config_fields(
    strengths: Mapping[str, Strength], modules: Iterable[str] | None = None
) -> dict[str, Any]:
    """The fields of a LoraConfig by which layers have these ranks and scalings, and no others have.

    Those are r, lora_alpha, use_rslora, rank_pattern, alpha_pattern and target_modules. A scaling
    comes back exactly if there is an alpha for it, as there is for each that was made of one. Else
    it comes back within one unit in the last place of a double.

    Args:
        strengths: path -> rank and scaling, of one layer at least.
        modules: the paths of all modules of the base model, so that last names stand for layers
            where no others have them. None = unknown: all paths are written, which then also mean
            layers whose paths end in them.

    Raises:
        CheckpointError: a path or a number is beyond what is read in bounded time.
    """
    use_rslora = min((False, True), key=lambda root: _awkward(strengths, root))
    alphas = {path: _alpha(strength, use_rslora) for path, strength in strengths.items()}
    pairs = Counter((strength.rank, alphas[path]) for path, strength in strengths.items())
    (r, alpha), _ = pairs.most_common(1)[0]
    wanted = {
        path: Strength(rank, alphas[path] / (math.sqrt(rank) if use_rslora else rank))
        for path, (rank, _) in strengths.items()
    }

    def fields(exact: bool) -> dict[str, Any]:
        def key(path: str) -> str:
            return f"^{re.escape(path)}" if exact else path

        return {
            "r": r,
            "lora_alpha": alpha,
            "use_rslora": use_rslora,
            "rank_pattern": {key(p): s.rank for p, s in strengths.items() if s.rank != r},
            "alpha_pattern": {key(p): a for p, a in alphas.items() if a != alpha},
        }

    # Plain paths are what people and older versions of PEFT read, which do not know "^". But as
    # patterns they also match ends of other paths, such as "1" that of "layers.1".
    found = fields(exact=False)
    if not _means(found, wanted):
        found = fields(exact=True)
        parse_config({"peft_type": "LORA", **found}, SOURCE).strengths(strengths)
        assert _means(found, wanted)
    return {**found, "target_modules": _targets(strengths, modules)}


def _awkward(strengths: Mapping[str, Strength], use_rslora: bool) -> tuple[int, int]:
    """How many scalings have no exact alpha, and how many alphas are no whole numbers."""
    inexact = broken = 0
    for strength in {*strengths.values()}:
        alpha = _alpha(strength, use_rslora)
        root = math.sqrt(strength.rank) if use_rslora else strength.rank
        inexact += alpha / root != strength.scaling
        broken += not isinstance(alpha, int)
    return inexact, broken


def _alpha(strength: Strength, use_rslora: bool) -> float:
    """The alpha that gives back a scaling, a whole one if there is; else the nearest.

    The nearest gives back the scaling wherever any alpha does: all others are further from it.
    """
    divisor = math.sqrt(strength.rank) if use_rslora else strength.rank
    near = strength.scaling * divisor
    return round(near) if round(near) / divisor == strength.scaling else near


def _means(fields: Mapping[str, Any], wanted: Mapping[str, Strength]) -> bool:
    """Whether fields are read as these ranks and scalings."""
    try:
        config = parse_config({"peft_type": "LORA", **fields}, SOURCE)
        return config.strengths(wanted) == wanted
    except CheckpointError:
        return False


def _targets(paths: Collection[str], modules: Iterable[str] | None) -> str | list[str]:
    """What target_modules must be for these layers alone: names, else a pattern."""
    if modules is None:
        return list(paths)
    known = {*modules, *paths} - {""}  # which is the model itself
    others = {_last(path) for path in known.difference(paths)}
    named = (path if _last(path) in others else _last(path) for path in paths)
    names = list(dict.fromkeys(named))
    config = PeftConfig(target_modules=frozenset(names), source=SOURCE)
    if config.targeted(known) == {*paths}:
        return names
    return "|".join(map(re.escape, paths))  # a name is also the end of another module's path


def _last(path: str) -> str:
    return path.rpartition(".")[2]
