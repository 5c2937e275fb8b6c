"""A route: a routing, and what one of its rows stands for in the batches of a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..core import NONE, Found, Routing, Selection, Slots, from_names, readable, unchecked
from ..errors import RoutingError

Expand: TypeAlias = Literal["interleave", "tile"] | None  # how samples may be repeated
Rows: TypeAlias = Sequence[Selection] | Tensor

# (samples, tokens of each)
Batch: TypeAlias = tuple[int, int]

# Where a model's batch is seen, most telling first; else the first tensor argument tells it.
INPUTS = (
    *("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"),
    *("hidden_states", "sample", "pixel_values", "input_features", "input_values"),
)


# Not frozen: of a frozen dataclass torch.compile guards every field, of this one those it reads.
@dataclass(eq=False)
class Route:
    """A routing with one row for each sample, for each token, or for all that comes.

    Never changed once made.
    """

    routing: Routing
    per_token: bool = False
    uniform: bool = False  # all rows are equal, so that the first serves a batch of any size
    expand: Expand = None
    named: bool = False  # made of names, which a reload lets mean other adapters
    # As compiled models read it, and where and in which shape: made by graphs.Shown, once.
    shown: "tuple[object, Route] | None" = None

    @cached_property
    def selects(self) -> bool:
        """False when no row selects an adapter; only the CPU can tell without a sync."""
        index = self.routing.index
        return not readable(index) or bool((index >= 0).any())

    @cached_property
    def handles(self) -> frozenset[int] | None:
        """The adapters that its rows select; None where only the device knows."""
        index = self.routing.index
        if not readable(index):
            return None
        return frozenset(index.flatten().tolist()) - {NONE}

    def renamed(self, old: int, new: int) -> "Route":
        """The route with another adapter in the place of one."""
        given = self.routing
        index = given.index.where(given.index != old, new)
        return replace(self, routing=unchecked(index, given.weight, Found()), shown=None)

    def spread(self, routing: Routing, rows: int, samples: int | None, generating: bool) -> Routing:
        """`routing`, this route's own on some device, with one row for each of x's `rows`.

        Args:
            samples: how many x holds; None when only a uniform or per-token route can serve it.
        """
        if self.per_token:
            if rows != routing.rows:
                raise RoutingError(
                    f"`index` must have one row per token, here {rows}, got {routing.rows}"
                )
            return routing
        if samples == routing.rows:
            return routing.repeat_interleave(rows // samples if samples else 1)
        if self.uniform or samples is None:
            return routing.expand_rows(rows)
        repeats = self.repeats(samples, generating)
        spread = routing.tile if self.expand == "tile" else routing.repeat_interleave
        return spread(repeats).repeat_interleave(rows // samples)

    def check(self, samples: int, generating: bool) -> None:
        """Refuse a batch of another number of samples."""
        # In this order: a compiled model guards what it reads, and need not know the kind.
        if samples != self.routing.rows and not (self.uniform or self.per_token):
            self.repeats(samples, generating)

    def repeats(self, samples: int, generating: bool) -> int:
        """How many samples of a batch each routed one has become.

        Raises:
            RoutingError: none that was asked for: repetition is never guessed.
        """
        routed = self.routing.rows
        if samples == routed:
            return 1
        if (generating or self.expand) and routed and samples % routed == 0:
            return samples // routed
        hint = "" if self.expand else '; if samples are repeated, say expand="interleave" or "tile"'
        raise RoutingError(
            f"`rows` must have one entry per sample of the batch, here {samples}, got {routed}"
            + hint
        )


def make_route(
    rows: Rows, weights: Tensor | None, slots: Slots, *, expand: Expand, per_token: bool
) -> Route:
    """The route that a user's rows mean: names, or an index tensor with weights.

    Raises:
        RoutingError: rows, weights or expand that do not fit.
        UnknownAdapterError: a name or handle that is not loaded.
    """
    if expand not in (None, "interleave", "tile"):
        raise RoutingError(f"`expand` must be None, 'interleave' or 'tile', got {expand!r}")
    if not isinstance(rows, Tensor):
        if weights is not None:
            raise RoutingError(
                "`weights` must be None when rows are names; give a mapping name -> weight"
            )
        return Route(from_names(rows, slots.lookup), per_token, expand=expand, named=True)
    given = Routing(rows, weights)  # type: ignore[arg-type]  # None = all 1
    if readable(rows):
        slots.check_loaded(rows)
    # A copy: what the caller writes into its tensors later is not a change of route.
    copied = Routing(given.index.clone(), given.weight.clone())
    return Route(copied, per_token, expand=expand)


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
    """(samples, tokens of each) of a model's inputs; None when no tensor tells."""
    candidates = [kwargs.get(name) for name in INPUTS] + [*args, *kwargs.values()]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.ndim:
            # Ids are [samples, tokens]; embeddings and hidden states [samples, tokens, features].
            has_tokens = tensor.ndim == (3 if tensor.is_floating_point() else 2)
            return tensor.shape[0], tensor.shape[1] if has_tokens else 1
    return None


def tensors_of(output: object) -> Iterator[Tensor]:
    """The tensors of a model's output: itself, or in tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output):
        yield from tensors_of(vars(output))
