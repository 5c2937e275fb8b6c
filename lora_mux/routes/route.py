"""A route: a routing, and what one of its rows stands for in the batches of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..core import (
    NONE,
    LastPass,
    Made,
    Routing,
    Selection,
    Site,
    Slots,
    check_counts,
    computed_once,
    flattened,
    host_may_read,
    routing_from_names,
    slot_of,
    unchecked_routing,
    value_of,
)
from ..errors import RoutingError

# How a batch may repeat its samples: one way, any number of times; or each way, that many times, in
# order: {"interleave": 2, "tile": 2} is a, a, b, b, a, a, b, b.
Way: TypeAlias = Literal["interleave", "tile"]
Expand: TypeAlias = Way | Mapping[Way, int] | None
Steps: TypeAlias = tuple[tuple[Way, int], ...]  # each way of repeating, and how often
Rows: TypeAlias = Sequence[Selection] | Tensor

MAX_ROUTES = 256  # of set_adapter that are kept


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
    argument: str = "rows"  # what error messages call it
    samples: int | None = None  # of the batch, if a route per token tells
    towers: "Mapping[str, Route]" = field(default_factory=dict)  # path -> rows of its own batch
    promised: bool = False  # of requests: adapters that were promised to them may be removed by now
    # Made once, when they are first needed, and no part of the value:
    padded: "tuple[object, Route] | None" = None  # as compiled models read it, and in which shape
    resolved: "Resolved | None" = None
    placed: dict[Site, Routing] = field(default_factory=dict)  # the routing where layers run
    made: Made | None = field(init=False)  # on a device: when

    def __post_init__(self) -> None:
        self.made = Made.now(self.routing.index.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "padded": None, "placed": {}, "made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    @computed_once
    def selects(self) -> bool:
        """Whether any row selects an adapter; True if only a GPU could tell, at a sync."""
        index = self.routing.index
        here = not host_may_read(index) or bool((index >= 0).any())
        return here or any(route.selects for route in self.towers.values())

    @computed_once
    def is_alike(self) -> bool:
        """Whether all rows are known to be equal, so that the first serves any batch."""
        index, weight = self.routing.index, self.routing.weight
        if not (host_may_read(index) and host_may_read(weight)) or weight.requires_grad:
            return False
        return bool((index == index[:1]).all() and (weight == weight[:1]).all()) and len(index) > 0

    @computed_once
    def handles(self) -> frozenset[int] | None:
        """The handles that its rows select; None if only the device knows."""
        index = self.routing.index
        if not host_may_read(index):
            return None
        found = frozenset(index.flatten().tolist()) - {NONE}
        for route in self.towers.values():
            if route.handles is None:
                return None
            found |= route.handles
        return found

    @computed_once
    def value(self) -> object:
        """Equal where routes give any batch the same rows, as far as the host may read them."""
        return value_of(self.routing), self.per_token, self.uniform, self.expand

    @computed_once
    def slots(self) -> frozenset[int] | None:
        """The slots of these handles; None if only the device knows."""
        return None if self.handles is None else frozenset(map(slot_of, self.handles))

    def check_loaded(self, slots: Slots) -> None:
        """Refuse a handle whose adapter is not there."""
        for route in (self, *self.towers.values()):
            slots.check_loaded(route.routing.index)

    def with_replaced(self, old: int, new: int, slots: Slots) -> "Route":
        """The route, made from names, with one adapter in the place of another.

        Raises:
            RoutingError: the new one has saved other modules than one beside it.
        """
        given = slots.companions.left_out(self.routing)
        index = given.index.where(given.index != old, new)
        routing = unchecked_routing(index, given.weight, LastPass())
        routing = slots.with_companions(routing, self.argument)
        towers = {path: route.with_replaced(old, new, slots) for path, route in self.towers.items()}
        return self._with(routing, towers)

    def with_rows(self, rows: Sequence[int]) -> "Route":
        """The route of a batch that holds only these of the samples, in this order."""
        if self.uniform or self.per_token:
            return self
        given, here = self.routing, torch.tensor(rows, device=self.routing.index.device)
        routing = unchecked_routing(given.index[here], given.weight[here], given.last_pass)
        return self._with(routing, self.towers)

    def _with(self, routing: Routing, towers: "Mapping[str, Route]") -> "Route":
        return replace(self, routing=routing, towers=towers, padded=None, resolved=None, placed={})

    def resolve(self, slots: Slots) -> "Resolved | None":
        """The index as slots; None if the host may not read it.

        Raises:
            UnknownAdapterError: it holds a handle whose adapter is not there.
        """
        index = self.routing.index
        if not host_may_read(index):
            return None
        suspensions, known = slots.suspensions, self.resolved
        if known is None or known.suspensions != suspensions:
            resolved = slots.resolve(index, self.promised)
            used = frozenset(resolved.flatten().tolist()) - {NONE}
            known = self.resolved = Resolved(suspensions, resolved, used)
        return known

    def at(self, site: Site, copy: bool) -> Routing:
        """The routing where a layer runs, copied there once by its stream.

        Args:
            site: where.
            copy: even if it is there, because a CUDA graph may come to own the copy.
        """
        if site not in self.placed:
            if self.made is not None:
                self.made.read(self.routing.index, self.routing.weight)
            self.placed[site] = self.routing.to(site[0], copy=copy)
        return self.placed[site]

    def manner(self, rows: int, samples: int | None, beams: int | None) -> "Manner":
        """How the routing becomes one with a row for each of x's `rows`.

        Args:
            rows: how many rows x has.
            samples: how many samples x holds; None if only a uniform or per-token route can serve
                it.
            beams: inside generate(), how often it repeats each sample, in order; None = outside.
        """
        if self.per_token:
            if rows != self.routing.rows:
                raise RoutingError(
                    f"`{self.argument}` must have one entry per token of the batch ({rows}), "
                    f"got {self.routing.rows}"
                )
            return Manner("tokens")
        if samples == self.routing.rows and beams in (None, 1):
            return Manner("samples", (), rows // samples if samples else 1)
        if self.uniform or samples is None:
            return Manner("first", (), rows)
        return Manner("samples", self.steps(samples, beams), rows // samples if samples else 1)

    def check(self, samples: int, beams: int | None) -> None:
        """Refuse a batch with another number of samples."""
        # In this order: a compiled model guards what it reads, and need not read the kind.
        if samples != self.routing.rows or beams not in (None, 1):
            if not (self.uniform or self.per_token):
                self.steps(samples, beams)
        # That the tokens fit is left to the layers, which see them.
        if self.samples is not None and self.samples != samples:
            raise RoutingError(
                f"`{self.argument}` of shape [samples, tokens, J] must have the batch's number of "
                f"samples ({samples}), got {self.samples}; flatten it for a batch that is packed"
            )

    def steps(self, samples: int, beams: int | None) -> Steps:
        """How a batch of `samples` repeats the routed ones.

        Raises:
            RoutingError: the numbers do not fit, or nobody said that samples are repeated:
                repetition is never guessed.
        """
        routed, expand = self.routing.rows, self.expand
        if isinstance(expand, Mapping):
            times = prod([*expand.values()])  # torch.compile traces no prod of a view
            # generate() repeats each sample as often, but in its own order: which one is it?
            if beams not in (None, 1) and times == beams:
                raise RoutingError(
                    f"`expand` must be None where generate() itself repeats each sample {beams} "
                    f"times (`num_beams`, `num_return_sequences`), got {dict(expand)}"
                )
            if samples in (routed, routed * times):
                return () if samples == routed else tuple(expand.items())
        elif expand is not None and routed and samples % routed == 0 and beams in (None, 1):
            times = samples // routed
            if expand == "tile" and times > 3:
                # Guidance repeats the batch two or three times; more may be images of each prompt.
                raise RoutingError(
                    f'`expand` must say how often where it is "tile" and {times} times, as '
                    f'{{"interleave": {times // 2}, "tile": 2}} (several images of each prompt, '
                    f'with guidance) or {{"tile": {times}}}'
                )
            return ((expand, times),)
        elif samples == routed * (beams or 1):
            return (("interleave", beams or 1),)
        hint = ""
        if not expand:
            give = "give" if self.argument == "rows" else "use a block or mux.call() with"
            hint = f'; if the batch repeats its samples, {give} expand="interleave" or "tile", or '
            hint += 'both with how often, in their order: {"interleave": 2, "tile": 2}'
        repeated = f", {beams} times each" if beams not in (None, 1) else ""
        raise RoutingError(
            f"`{self.argument}` must have one entry per sample of the batch ({samples}), "
            f"got {routed}{repeated}{hint}"
        )


class Resolved(NamedTuple):
    """A route's index as slots, where the host may read it."""

    suspensions: int  # of the slots, when it was made
    slots: Tensor  # int64 of the index's shape; -1 = none
    used: frozenset[int]  # all of them

    def picked(self, rows: Tensor | list[int]) -> "Resolved":
        """These rows of it, which use no other slots."""
        return self._replace(slots=self.slots[rows])


class Manner(NamedTuple):
    """How a routing becomes one with a row for each row of x."""

    kind: Literal["samples", "tokens", "first"]  # what a row of it stands for; "first": for all
    steps: Steps = ()  # how samples are repeated
    times: int = 1  # how many rows x has for each sample, or in all ("first")

    def spread(self, routing: Routing) -> Routing:
        """The routing with one row for each row of x."""
        if self.kind == "tokens":
            return routing
        if self.kind == "first":
            return routing.expand_rows(self.times)
        for way, times in self.steps:
            repeated = routing.tile if way == "tile" else routing.repeat_interleave
            routing = repeated(times)
        return routing.repeat_interleave(self.times)


def check_expand(expand: object) -> Expand:
    """`expand`, if it is one."""
    if isinstance(expand, Mapping):
        fits = all(
            way in ("interleave", "tile") and isinstance(times, int) and times > 0
            for way, times in expand.items()
        )
    else:
        fits = expand in (None, "interleave", "tile")
    if not fits:
        raise RoutingError(
            "`expand` must be None, 'interleave', 'tile', or a mapping of these to how often, as "
            f'{{"interleave": 2, "tile": 2}}, got {expand!r}'
        )
    return expand  # type: ignore[return-value]


def make_route(
    rows: Rows,
    weights: Tensor | None,
    slots: Slots,
    *,
    expand: Expand = None,
    per_token: bool = False,
    lengths: Sequence[int] | None = None,
    argument: str = "rows",
    towers: Mapping[str, Rows] | None = None,
) -> Route:
    """The route that a user asks for, by names or by an index tensor with weights.

    Args:
        rows: names, or an index [rows, J]; or [samples, tokens, J], which is a route per token.
        weights: of the index's shape.
        slots: of the model.
        expand: how a batch may repeat its samples.
        per_token: `rows` has an entry for each token.
        lengths: how many tokens each entry stands for.
        argument: what error messages call `rows`.

    Raises:
        RoutingError: rows, weights, expand or lengths do not fit.
        UnknownAdapterError: a name or a handle is not loaded.
    """
    expand = check_expand(expand)
    named, samples = not isinstance(rows, Tensor), None
    if isinstance(rows, Tensor):
        if rows.ndim == 3:
            samples, per_token = len(rows), True
            rows, weights = flattened(
                rows, weights, {"expand": expand, "lengths": lengths}, argument
            )
        given = Routing(rows, weights)  # type: ignore[arg-type]  # None = all 1
        if host_may_read(rows):
            slots.check_loaded(rows)
        # A copy, so that what the caller writes into its tensors later does not change the route.
        routing = Routing(given.index.clone(), given.weight.clone())
    elif weights is None:
        routing = routing_from_names(rows, slots.lookup, argument)
    else:
        raise RoutingError(
            f"`weights` must be None if `{argument}` holds names, got {type(weights).__name__}; "
            f"put mappings name -> weight into `{argument}`"
        )
    routing = slots.with_companions(routing, argument)
    if lengths is not None:
        times = torch.tensor(check_counts(lengths, routing.rows, "lengths"))
        routing = routing.repeat_interleave(times)
    own = {path: _of_tower(path, of_it, named, slots) for path, of_it in (towers or {}).items()}
    return Route(routing, per_token, False, expand, named, argument, samples, own)


def _of_tower(path: str, rows: Rows, named: bool, slots: Slots) -> Route:
    if isinstance(rows, Tensor) == named:
        raise RoutingError(
            f"`towers[{path!r}]` must hold {'names' if named else 'handles'} as `rows` does, got "
            f"{'an index tensor' if named else type(rows).__name__}"
        )
    return make_route(rows, None, slots, argument=f"towers[{path!r}]")


class UniformRoutes:
    """Routes by adapters and weights, kept because callers switch to and fro between a few."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._routes: dict[tuple[tuple[str, float], ...], Route] = {}
        self._name_changes = 0  # slots.name_changes when the routes were made

    def find(self, weights: Mapping[str, float]) -> Route | None:
        """The route that selects these adapters with these weights; None for the base model.

        Args:
            weights: name -> weight; empty for the base model.

        Raises:
            UnknownAdapterError: a name is not loaded.
        """
        if not weights:
            return None
        if self._name_changes != self._slots.name_changes:  # a name may mean another adapter now
            self._routes.clear()
            self._name_changes = self._slots.name_changes
        key = tuple(weights.items())
        if key not in self._routes:
            if len(self._routes) == MAX_ROUTES:
                self._routes.clear()
            routing = routing_from_names([weights], self._slots.lookup)
            routing = self._slots.with_companions(routing, "adapter")
            self._routes[key] = Route(routing, uniform=True, named=True)
        return self._routes[key]
