"""Which layers of a model have the routed batch, found once from their paths.

A model that takes text together with images or sounds has sub-models whose batch is one of images.
Only the layers on its text side are known to have the routed batch.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..layers import token_embeddings
from ..routes import MEDIA_ARGUMENT, TEXT_ARGUMENTS, Layout, Place

# The names of sub-models, as parts of a path.
TEXT = re.compile(
    r"language_model|text_model|text_decoder|text_encoder|text_projection|lm_head|enc_to_dec_proj"
    r"|generation_head|generation_aligner|(.*_)?ll?m|language|text"
)
WRITES_IMAGES = re.compile(r"(.*\.)?(generation_head|generation_aligner)(\..*)?")  # token by token
PICTURE = re.compile(r"(.*_)?(vision|visual|image|img|pixel|vit|sam|vq\w*)(_.*)?")
FILM = re.compile(r"(.*_)?videos?(_.*)?")
SOUND = re.compile(r"(.*_)?(audio|speech|sound|codec)(_.*)?|depth_decoder")
PROJECTOR = re.compile(r".*(project|connector|merger|resampl|perceiver|qformer|align).*")
MEDIA = {"picture": PICTURE, "film": FILM, "sound": SOUND}
PICKED = re.compile(r"(.*\.)?experts\.\d+(\..*)?")

# Embeddings of other numbers than tokens, in models that do not say which theirs are.
NO_TOKENS = re.compile(
    r"(.*_)?(w?pos\w*|wpe|relative\w*|time\w*|token_type\w*|type|segment\w*)(_.*)?"
)

# By model_type, from the sources of transformers 5.23.
FLATTENED_IMAGES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
PADDED_IMAGES = {"idefics2", "idefics3", "smolvlm"}
# Of these modules, the layers whose inputs begin with the tokens.
TOKENS_FIRST = {
    "LongformerSelfAttention": r"(query|key|value)",
    "LEDEncoderSelfAttention": r"(query|key|value)",
    "XLNetLayer": r".*",
    "XLNetModel": r"word_embedding",
    "FSMTEncoder": r"layers\..*",
    "FSMTDecoder": r"layers\..*",
    "Mask2FormerMaskedAttentionDecoder": r"layers\..*",
}


def find_layout(model: nn.Module, targets: Collection[str]) -> tuple[Layout, Mapping[str, Place]]:
    """What is known of a model's batches, and the place of each target."""
    tower_of: dict[str, str] = {}
    for path, root in _roots(model):
        prefix = f"{path}." if path else ""
        below = [t.removeprefix(prefix) for t in targets if t.startswith(prefix)]
        tower_of |= {prefix + t: prefix + tower for t, tower in _towers(root, below).items()}
    first, unknown = list(_tokens_first(model)), _lookups(model)
    places = {}
    for target in targets:
        place = Place(target, tower_of.get(target))
        if any(pattern.fullmatch(target) for pattern in first):
            place = Place(target, place.tower, "tokens first")
        elif PICKED.fullmatch(target):
            place = Place(target, place.tower, "picked tokens")
        elif target in unknown:
            place = Place(target, place.tower, "not known")
        places[target] = place
    return _layout(model, set(tower_of.values())), places


def _layout(model: nn.Module, towers: Collection[str]) -> Layout:
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    arguments = tuple(_arguments(type(model)))
    vision = getattr(config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", 0) if kind in FLATTENED_IMAGES else 0
    tokens = {}
    for medium in ("image", "video"):
        token = getattr(config, f"{medium}_token_id", None)
        token = getattr(config, f"{medium}_token_index", None) if token is None else token
        if isinstance(token, int):
            tokens[medium] = token
    return Layout(
        towers=_names(towers),
        arguments=arguments,
        media=frozenset(name for name in arguments if MEDIA_ARGUMENT.fullmatch(name)),
        tokens=tokens,
        grid_merge=merge if isinstance(merge, int) else 0,
        padded_images=kind in PADDED_IMAGES,
        codebooks=_codebooks(config, kind),
        has_choices=type(model).__name__.endswith("ForMultipleChoice"),
    )


def _codebooks(config: Any, kind: str) -> dict[str, int]:
    """MusicGen: its decoder's batch has one row for each codebook of a sample."""
    if not kind.startswith("musicgen"):
        return {}
    if hasattr(config, "num_codebooks"):
        return {"input_ids": config.num_codebooks}
    return {"decoder_input_ids": config.decoder.num_codebooks}


def _names(towers: Collection[str]) -> dict[str, str]:
    """Each tower's short name, if it is its only one, and its path -> its path."""
    short = [path.rpartition(".")[2] for path in towers]
    names = {}
    for path in sorted(towers):
        last = path.rpartition(".")[2]
        if short.count(last) == 1:
            names[last] = path
    return names | {path: path for path in sorted(towers)}


def _arguments(kind: type) -> list[str]:
    """The names of a forward's positional arguments."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError, AttributeError):
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that take text together with images or sounds."""
    known: dict[type, bool] = {}
    found: list[str] = []
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            names = _arguments(kind)
            media = any(MEDIA_ARGUMENT.fullmatch(name) for name in names)
            known[kind] = media and not TEXT_ARGUMENTS.isdisjoint(names)
        inside = any(not root or path.startswith(f"{root}.") for root in found)
        if known[kind] and not inside:
            found.append(path)
            yield path, module


def _medium(path: str) -> tuple[str, str] | None:
    """The medium of the first part of a path that names one, and the path up to there."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        for medium, pattern in MEDIA.items():
            if pattern.fullmatch(part):
                return medium, ".".join(parts[: i + 1])
    return None


def _towers(root: nn.Module, targets: Collection[str]) -> dict[str, str]:
    """Target -> the sub-model that it belongs to, for targets that have not the routed batch."""
    paths = [path for path, _ in root.named_modules() if path]
    media = {
        path: named
        for path in paths
        if (named := _medium(path)) is not None and not WRITES_IMAGES.fullmatch(path)
    }
    if not media:  # one model for text and images together, which has one batch
        return {}
    text = {path for path in paths if any(TEXT.fullmatch(p) for p in path.split("."))}
    text |= _decoders(root, paths)
    owners: dict[str, str] = {}  # medium -> its first sub-model
    for medium, prefix in media.values():
        owners.setdefault(medium, prefix)
    containers = {
        ".".join(path.split(".")[:i])
        for path in (*text, *(prefix for _, prefix in media.values()))
        for i in range(1, path.count(".") + 1)
    }
    found = {}
    for target in targets:
        if target in media:
            found[target] = owners[media[target][0]]
        elif not (target in text or any(target.startswith(f"{path}.") for path in text)):
            own = next(p for p in _prefixes(target) if p not in containers)
            # What is neither belongs to the images, if it projects them or we know such models.
            joins = hasattr(root, "get_decoder") or PROJECTOR.fullmatch(own) is not None
            found[target] = next(iter(owners.values())) if joins and len(owners) == 1 else own
    return found


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _decoders(root: nn.Module, paths: Collection[str]) -> set[str]:
    """The paths of what computes text: the decoder and the output head."""
    found = set()
    modules = dict(root.named_modules())
    for method in ("get_decoder", "get_output_embeddings"):
        try:
            module = getattr(root, method)()
        except Exception:  # a model of whatever make, which may have none
            continue
        if module is root:  # everything that names no medium
            return set(paths)
        found |= {path for path in paths if modules[path] is module}
    return found


def _lookups(model: nn.Module) -> set[str]:
    """The embeddings that may be asked for other numbers than the tokens of the samples."""
    tables = token_embeddings(model)
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and (module not in tables if tables else NO_TOKENS.fullmatch(path.rpartition(".")[2]))
    }


def _tokens_first(model: nn.Module) -> Iterator[re.Pattern[str]]:
    """Patterns of the paths of layers whose inputs begin with the tokens."""
    for path, module in model.named_modules():
        below = next(
            (TOKENS_FIRST[k.__name__] for k in type(module).__mro__ if k.__name__ in TOKENS_FIRST),
            None,
        )
        attention = getattr(module, "self_attn", None)
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                below = ".*"
        if below is not None:
            yield re.compile(re.escape(f"{path}." if path else "") + below)
