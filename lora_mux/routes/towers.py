"""Layers whose batch is not the routed one: sub-models with images of their own, other orders.

Which layers these are is found once, at attach (model/layout.py). Here a pass learns whose rows
their inputs have. Only what the arguments of the model say for certain counts: where numbers merely
happen to fit, the pass is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..core import Pool, unchecked_routing
from ..errors import RoutingError
from .compiled import Cell
from .passes import BATCH_ARGUMENTS, Batch, Pass, Shape, batch_of
from .route import Route

Order: TypeAlias = Literal["samples", "tokens first", "picked tokens", "not known"]

TEXT_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "ids", "tokens", "token_ids", "text", "texts", "text_ids"),
}
MEDIA_ARGUMENT = re.compile(
    r"(\w+_)?(pixel_values|input_features|input_values|audio_values)(_images|_videos)?"
    r"|images?|videos?|audios?|image_patches"
)
PIXELS = ("pixel_values", "pixel_values_videos")


class Place(NamedTuple):
    """Where in its model a layer is."""

    path: str
    tower: str | None = None  # the sub-model with a batch of its own that it belongs to
    order: Order = "samples"  # of the rows of its inputs

    @property
    def is_apart(self) -> bool:
        """Whether its inputs do not simply begin with the routed batch."""
        return self.tower is not None or self.order != "samples"


@dataclass(frozen=True)
class Layout:
    """What is known of a model's batches."""

    towers: Mapping[str, str] = field(default_factory=dict)  # name -> path, and path -> path
    arguments: tuple[str, ...] = ()  # of the forward, in order
    media: frozenset[str] = frozenset()  # those of them that hold images or sounds
    tokens: Mapping[str, int] = field(default_factory=dict)  # "image" or "video" -> its token
    grid_merge: int = 0  # images are flattened, and so many patches a side make a token; 0 = not
    padded_images: bool = False  # pixel_values [samples, images, ...], where zeros are no image
    codebooks: Mapping[str, int] = field(default_factory=dict)  # argument -> rows for each sample
    has_choices: bool = False  # ids [samples, choices, tokens]

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by name, without those that are None."""
        named = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        return {name: value for name, value in named.items() if value is not None}

    def batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
        """(samples, tokens of each) of a forward's arguments; None if no tensor tells."""
        if not (self.codebooks or self.has_choices):
            return batch_of(args, kwargs)
        inputs = self.bound(args, kwargs)
        ids = inputs.get("input_ids")
        if self.has_choices and isinstance(ids, Tensor) and ids.ndim == 3:
            return ids.shape[0] * ids.shape[1], ids.shape[2]
        batch = batch_of((), inputs)
        name = next((name for name in BATCH_ARGUMENTS if name in inputs), "")
        times = self.codebooks.get(name, 1)
        if batch is None or batch[0] % times:
            return batch
        return batch[0] // times, batch[1]

    def path_of(self, name: str) -> str:
        """The tower that a user means.

        Raises:
            RoutingError: there is no such tower.
        """
        if name not in self.towers:
            known = ", ".join(repr(self.name_of(path)) for path in sorted({*self.towers.values()}))
            raise RoutingError(
                f"`towers` must name towers of the model ({known or 'it has none'}), got {name!r}"
            )
        return self.towers[name]

    def name_of(self, path: str) -> str:
        """The short name of a tower."""
        return next((n for n, p in self.towers.items() if p == path), path)


NO_LAYOUT = Layout()


class Items(NamedTuple):
    """The images that a tower computes: how many rows of a layer's input each of them has."""

    lengths: Sequence[int]
    counts: Sequence[int] | None  # how many of them each sample has; None = that is not certain


def as_seen_from(
    place: Place, now: Pass | Cell, x: Tensor, pool: Pool, layout: Layout
) -> Pass | Cell | None:
    """The pass with the rows of a layer's input; None = no adapter of these rows touches the layer.

    Args:
        place: of the layer.
        now: the pass.
        x: the layer's input [..., in_features].
        pool: the layer's.
        layout: of the model.

    Raises:
        RoutingError: it cannot be known whose rows x has.
    """
    route = now.route
    if not x.is_floating_point() and x.ndim == 2 and route is not None and not route.per_token:
        place = place._replace(order="not known")  # numbers [n], as positions are: whose are they?
    if isinstance(now, Cell):
        return _as_traced(place, now, pool, layout)
    if place.is_apart:
        return _apart(now, x, pool, place, layout)
    if not now.touches(pool):
        return None
    if now.shape.samples is None or now.shape.begins(x) or ops.capturing(x.device):
        return now
    assert now.route is not None
    return now.alike if now.route.is_alike else now


def _as_traced(place: Place, now: Cell, pool: Pool, layout: Layout) -> Cell | None:
    """The rows that a graph of torch.compile computes with, which knows no arguments."""
    if not place.is_apart:
        return now
    if not pool.spans:  # which the graph guards
        return None
    assert now.route is not None
    if not now.route.uniform:
        _refuse(place, layout, "a compiled model has one row for each sample; do not compile it")
    return now


def _apart(now: Pass, x: Tensor, pool: Pool, place: Place, layout: Layout) -> Pass | None:
    """A pass with one row for each row of x, or the same for all."""
    route = now.route
    assert route is not None
    own = now.towers.get(place.tower) if place.tower is not None else None
    if not (own or now).touches(pool):
        return None
    if own is None and route.uniform:
        return now
    if own is None and not ops.capturing(x.device) and route.is_alike:
        return now.alike
    key = place.tower, place.order, *x.shape[:-1]
    if key not in now.apart:
        if own is None and _is_one_batch(now, place, layout):
            now.apart[key] = now
        else:
            now.apart[key] = _picked(own or now, _pick(now, own, x, place, layout))
    return now.apart[key]


def _is_one_batch(now: Pass, place: Place, layout: Layout) -> bool:
    """Whether a tower computes the only input that there is, which is then the routed batch."""
    if layout.media.isdisjoint(now.inputs) or TEXT_ARGUMENTS.isdisjoint(layout.arguments):
        return False
    is_alone = TEXT_ARGUMENTS.isdisjoint(now.inputs) and len(_media(now.inputs)) == 1
    return place.order == "samples" and is_alone


def _media(inputs: Mapping[str, Any]) -> set[str]:
    """The arguments that hold images or sounds."""
    return {name for name in inputs if MEDIA_ARGUMENT.fullmatch(name)}


def _picked(source: Pass, pick: Tensor) -> Pass:
    """A pass with one row for each entry of `pick`, which numbers the rows of another pass."""
    assert source.route is not None
    given = source.route.routing
    here = pick.to(given.index.device)
    routing = unchecked_routing(given.index[here], given.weight[here], given.last_pass)
    route = Route(routing, per_token=True)
    resolved = source.resolved and source.resolved.picked(pick)
    return Pass(source.owner, route=route, shape=Shape(len(pick)), resolved=resolved)


def _pick(now: Pass, own: Pass | None, x: Tensor, place: Place, layout: Layout) -> Tensor:
    """Which row of the rows in force each row of x has: of the tower's own, or of the route's."""
    if ops.capturing(x.device):
        _refuse(place, layout, "a CUDA graph that is captured reads one row for each sample")
    route = now.route
    assert route is not None
    if place.tower is None:
        return _pick_in_order(now, route, x, place, layout)
    items = _items_of(now.inputs, x, layout)
    if own is not None:
        return _pick_own(own, x, items, place, layout)
    if layout.media and now.shape.samples is not None and not now.inputs.keys() & layout.media:
        _refuse(place, layout, "the model was called without images or sounds")
    if items is None or items.counts is None or route.per_token:
        _refuse(place, layout, "it is not certain which sample each of its images belongs to")
    samples = _samples(now, route, len(items.counts))
    counts, lengths = torch.tensor(items.counts), torch.tensor(items.lengths)
    return samples.repeat_interleave(counts).repeat_interleave(lengths)


def _pick_own(own: Pass, x: Tensor, items: Items | None, place: Place, layout: Layout) -> Tensor:
    assert own.route is not None
    rows = own.route.routing.rows
    if items is None:
        if rows != x.shape[0] and rows != 1:
            _refuse_count(place, layout, rows, str(x.shape[0]))
        items = Items([prod(x.shape[:-1]) // rows] * rows if rows else [], None)
    if rows != len(items.lengths):
        _refuse_count(place, layout, rows, str(len(items.lengths)))
    return torch.arange(rows).repeat_interleave(torch.tensor(items.lengths, dtype=torch.long))


def _refuse_count(place: Place, layout: Layout, rows: int, items: str) -> NoReturn:
    name = layout.name_of(place.tower or "")
    raise RoutingError(
        f"`towers[{name!r}]` must have one entry per item of that tower's batch ({items}), "
        f"got {rows}"
    )


def _pick_in_order(now: Pass, route: Route, x: Tensor, place: Place, layout: Layout) -> Tensor:
    """Of a layer whose inputs begin with the tokens, not with the samples."""
    samples = now.shape.samples
    if place.order == "picked tokens" and x.ndim > 2 and x.shape[0] == samples:
        return _samples(now, route, samples).repeat_interleave(prod(x.shape[1:-1]))
    known = place.order == "tokens first" and x.ndim == 3 and x.shape[1] == samples
    if not known or samples is None or route.per_token:
        what = {
            "tokens first": "its inputs begin with the tokens instead of the samples",
            "picked tokens": "it computes tokens that were picked out of the batch",
            "not known": "it may look up positions or other numbers that no sample has by itself",
        }
        _refuse(place, layout, what.get(place.order, ""))
    return _samples(now, route, samples).repeat(x.shape[0])


def _samples(now: Pass, route: Route, samples: int) -> Tensor:
    """Which row of the route each of a batch's samples has."""
    pick = torch.arange(route.routing.rows)
    beams = now.shape.beams if now.shape.samples is not None else None
    for way, times in route.manner(samples, samples, beams).steps:
        pick = pick.repeat(times) if way == "tile" else pick.repeat_interleave(times)
    return pick


def _refuse(place: Place, layout: Layout, why: str) -> NoReturn:
    alike = "a batch whose rows are all equal can be computed"
    if place.tower is None:
        raise RoutingError(
            f"`rows` must all be equal where an adapter touches {place.path!r}: {why}; run the "
            "samples of each adapter as a batch of their own, or leave the layer out of `targets`"
        )
    name = layout.name_of(place.tower)
    raise RoutingError(
        f"`rows` must come with rows for the tower {name!r}, whose batch is its own and which an "
        f"adapter touches ({place.path}): {why}; give route(rows, towers={{{name!r}: [...]}}) with "
        f"one entry for each image, sound or other item that it computes ({alike} without it)"
    )


def _items_of(inputs: Mapping[str, Any], x: Tensor, layout: Layout) -> Items | None:
    """The images that x holds, if the arguments of the model tell."""
    if layout.grid_merge:
        return _flattened(inputs, x, layout)
    pixels, others = inputs.get(PIXELS[0]), _media(inputs) - {PIXELS[0]}
    if not isinstance(pixels, Tensor) or others or "image_sizes" in inputs:
        return None
    counts: Sequence[int] | None = None
    images = pixels.shape[0]
    if layout.padded_images and pixels.ndim == 5:
        counts = (pixels != 0).flatten(2).any(2).sum(1).tolist()
        images = sum(counts)
    elif pixels.ndim != 4:
        return None
    if images == 0 or x.shape[0] != images:
        return None
    of_samples = _tokens_of_samples(inputs, "image", layout)
    if of_samples is None or sum(of_samples) % images:
        return Items([prod(x.shape[1:-1])] * images, None)
    found = _counts(of_samples, [sum(of_samples) // images] * images)
    if counts is not None and counts != found:
        found = None
    return Items([prod(x.shape[1:-1])] * images, found)


def _flattened(inputs: Mapping[str, Any], x: Tensor, layout: Layout) -> Items | None:
    """Of Qwen-VL's tower: patches of one image after the other, also inside its windows."""
    rows, area = prod(x.shape[:-1]), layout.grid_merge**2
    found = []
    for kind, pixels in zip(("image", "video"), PIXELS, strict=True):
        grid = inputs.get(f"{kind}_grid_thw")
        if not isinstance(grid, Tensor) or pixels not in inputs:
            continue
        patches = grid.prod(1).tolist()
        of_samples = _tokens_of_samples(inputs, kind, layout)
        counts = of_samples and _counts(of_samples, [p // area for p in patches])
        for merged in (1, area):
            if rows and rows * merged == sum(patches) and not any(p % area for p in patches):
                found.append(Items([p // merged for p in patches], counts))
    return found[0] if len(found) == 1 else None


def _tokens_of_samples(inputs: Mapping[str, Any], kind: str, layout: Layout) -> list[int] | None:
    ids, token = inputs.get("input_ids"), layout.tokens.get(kind)
    if token is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    counted: list[int] = (ids == token).sum(1).tolist()
    return counted


def _counts(of_samples: Sequence[int], of_images: Sequence[int]) -> list[int] | None:
    """How many images each sample has, if they fill its tokens exactly and in order."""
    ends = list(accumulate(of_images))
    if any(tokens <= 0 for tokens in of_images) or sum(of_samples) != (ends or [0])[-1]:
        return None
    counts, done = [], 0
    for end in accumulate(of_samples):
        if end and end not in ends:
            return None
        images = ends.index(end) + 1 if end else 0
        counts.append(images - done)
        done = images
    return counts
