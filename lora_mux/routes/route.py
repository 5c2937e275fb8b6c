"""A route: a routing, and what one of its rows stands for in the batches of a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..core import (
    NONE,
    LastPass,
    Routing,
    Selection,
    Slots,
    check_counts,
    host_may_read,
    routing_from_names,
    unchecked_routing,
)
from ..errors import RoutingError

Expand: TypeAlias = Literal["interleave", "tile"] | None  # how a batch may repeat its samples
Rows: TypeAlias = Sequence[Selection] | Tensor

# (samples, tokens of each)
Batch: TypeAlias = tuple[int, int]

# The arguments of a model that show its batch, most reliable first. Without any of them the first
# tensor counts.
BATCH_ARGUMENTS = (
    *("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"),
    *("hidden_states", "sample", "pixel_values", "input_features", "input_values"),
)


# Not frozen: torch.compile guards every field of a frozen dataclass, and of this one only those
# that it reads.
@dataclass(eq=False)
class Route:
    """A routing with one row for each sample, for each token, or for the whole batch.

    It is never changed once it is made.
    """

    routing: Routing
    per_token: bool = False
    uniform: bool = False  # all rows are equal, so that the first serves a batch of any size
    expand: Expand = None
    named: bool = False  # made from names, which mean other adapters after a reload
    # The route as compiled models read it, and the shape it was padded to; `graphs` makes it once.
    padded: "tuple[object, Route] | None" = None

    @cached_property
    def selects(self) -> bool:
        """Whether any row selects an adapter; True if only a GPU could tell, at a sync."""
        index = self.routing.index
        return not host_may_read(index) or bool((index >= 0).any())

    @cached_property
    def handles(self) -> frozenset[int] | None:
        """The handles that its rows select; None if only the device knows."""
        index = self.routing.index
        if not host_may_read(index):
            return None
        return frozenset(index.flatten().tolist()) - {NONE}

    def with_replaced(self, old: int, new: int) -> "Route":
        """The route with one handle in the place of another."""
        given = self.routing
        index = given.index.where(given.index != old, new)
        routing = unchecked_routing(index, given.weight, LastPass())
        return replace(self, routing=routing, padded=None)

    def spread(self, routing: Routing, rows: int, samples: int | None, generating: bool) -> Routing:
        """The routing with one row for each of x's `rows`.

        Args:
            routing: this route's own, on x's device.
            rows: how many rows x has.
            samples: how many samples x holds; None if only a uniform or per-token route can serve
                it.
            generating: the pass is part of generate(), which may repeat samples.
        """
        if self.per_token:
            if rows != routing.rows:
                raise RoutingError(
                    f"`rows` must have one entry per token of the batch ({rows}), "
                    f"got {routing.rows}"
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
        """Refuse a batch with another number of samples."""
        # In this order: a compiled model guards what it reads, and need not read the kind.
        if samples != self.routing.rows and not (self.uniform or self.per_token):
            self.repeats(samples, generating)

    def repeats(self, samples: int, generating: bool) -> int:
        """How often a batch of `samples` holds each routed sample.

        Raises:
            RoutingError: the numbers do not fit, or nobody said that samples are repeated:
                repetition is never guessed.
        """
        routed = self.routing.rows
        if samples == routed:
            return 1
        if (generating or self.expand) and routed and samples % routed == 0:
            return samples // routed
        hint = '; if the batch repeats its samples, give expand="interleave" or "tile"'
        raise RoutingError(
            f"`rows` must have one entry per sample of the batch ({samples}), got {routed}"
            + ("" if self.expand else hint)
        )


def make_route(
    rows: Rows,
    weights: Tensor | None,
    slots: Slots,
    *,
    expand: Expand = None,
    per_token: bool = False,
    lengths: Sequence[int] | None = None,
) -> Route:
    """The route that a user asks for, by names or by an index tensor with weights.

    Raises:
        RoutingError: rows, weights, expand or lengths do not fit.
        UnknownAdapterError: a name or a handle is not loaded.
    """
    if expand not in (None, "interleave", "tile"):
        raise RoutingError(f"`expand` must be None, 'interleave' or 'tile', got {expand!r}")
    named = not isinstance(rows, Tensor)
    if isinstance(rows, Tensor):
        given = Routing(rows, weights)  # type: ignore[arg-type]  # None = all 1
        if host_may_read(rows):
            slots.check_loaded(rows)
        # A copy, so that what the caller writes into its tensors later does not change the route.
        routing = Routing(given.index.clone(), given.weight.clone())
    elif weights is None:
        routing = routing_from_names(rows, slots.lookup)
    else:
        raise RoutingError(
            f"`weights` must be None if `rows` holds names, got {type(weights).__name__}; "
            "put mappings name -> weight into `rows`"
        )
    if lengths is not None:
        times = torch.tensor(check_counts(lengths, routing.rows, "lengths"))
        routing = routing.repeat_interleave(times)
    return Route(routing, per_token, expand=expand, named=named)


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch | None:
    """(samples, tokens of each) of a model's inputs; None if no tensor tells."""
    candidates = [kwargs.get(name) for name in BATCH_ARGUMENTS] + [*args, *kwargs.values()]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.ndim:
            # Ids are [samples, tokens]; embeddings and hidden states [samples, tokens, features].
            has_tokens = tensor.ndim == (3 if tensor.is_floating_point() else 2)
            return tensor.shape[0], tensor.shape[1] if has_tokens else 1
    return None


def tensors_in(output: object) -> Iterator[Tensor]:
    """The tensors of a model's output, also those inside tuples, lists, mappings, dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        yield from tensors_in(vars(output))
