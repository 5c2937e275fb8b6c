"""What rows select: the names that users ask for, made into a Routing, and what comes with them.

The modules that an adapter saved as a whole, as a classification head, are a second adapter under
a handle of its own, without a name: its companion. A row that selects adapters gets the companion
of each of them once, with weight 1, whatever their own weights are. Adapters that saved equal
modules share one companion.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentTypeError, RoutingError
from .arguments import check_number, check_numbers
from .routing import BASE, NONE, LastPass, Routing, host_may_read, unchecked_routing
from .streams import to_device

# The entry of one row: nothing (None or "__base__"), one adapter, several, or several weighted.
Selection: TypeAlias = str | None | Sequence[str] | Mapping[str, float]


def selected_adapters(entry: object, argument: str) -> dict[str, float]:
    """Name -> weight of the adapters that one entry selects; empty for the base model.

    Raises:
        ArgumentTypeError: the entry, a name or a weight has the wrong type.
        RoutingError: a name appears twice, a weight is not finite in fp32, or "__base__" is one of
            several.
    """
    if entry is None or (isinstance(entry, str) and entry == BASE):
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if isinstance(entry, Mapping):
        return {
            _check_name(name, argument): check_number(weight, f"{argument}[{name!r}]")
            for name, weight in entry.items()
        }
    if isinstance(entry, Sequence) and not isinstance(entry, bytes):
        names = [_check_name(name, argument) for name in entry]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RoutingError(
                f"`{argument}` must name each adapter once, got {repeated[0]!r} "
                f"{names.count(repeated[0])} times; use a weight: {{{repeated[0]!r}: 2.0}}"
            )
        return dict.fromkeys(names, 1.0)
    raise ArgumentTypeError(
        f"`{argument}` must be None, a name, a sequence of names or a mapping name -> weight, "
        f"got {type(entry).__name__}"
    )


def weighted_adapters(
    adapter: Selection, weights: float | Sequence[float] | None
) -> dict[str, float]:
    """Name -> weight of the adapters that all rows are to select.

    Args:
        adapter: an entry; see `Selection`.
        weights: one number for each of its names, or one for all; None = those of the entry.

    Raises:
        RoutingError: weights are given twice, or do not fit the names.
    """
    chosen = selected_adapters(adapter, "adapter")
    if weights is None:
        return chosen
    if isinstance(adapter, Mapping):
        raise RoutingError(
            "`weights` must be None if `adapter` maps names to weights, got "
            f"{type(weights).__name__}"
        )
    return dict(zip(chosen, check_numbers(weights, len(chosen), "weights"), strict=True))


def routing_from_names(
    rows: Sequence[object],
    handles: Callable[[Sequence[str]], Mapping[str, int]],
    argument: str = "rows",
) -> Routing:
    """The routing with one row for each entry of `rows`.

    Args:
        rows: the entries; see `Selection`.
        handles: maps names to handles, and raises for a name that it does not know.
        argument: what error messages call `rows`.

    Examples:
        >>> handles = lambda names: {"a": 0, "b": 1}
        >>> routing_from_names([None, "a", {"a": 0.5, "b": 2.0}], handles).index.tolist()
        [[-1, -1], [0, -1], [0, 1]]
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise ArgumentTypeError(
            f"`{argument}` must be a sequence with one entry per sample, or an index tensor, "
            f"got {type(rows).__name__}; for the whole batch use set_adapter"
        )
    if rows and all(type(entry) is str for entry in rows):
        return _one_each(rows, handles)
    selections = [selected_adapters(entry, f"{argument}[{i}]") for i, entry in enumerate(rows)]
    handle_of = handles([name for chosen in selections for name in chosen])
    width = max([1, *map(len, selections)])
    index = [[handle_of[name] for name in s] + [NONE] * (width - len(s)) for s in selections]
    weight = [[*s.values()] + [0.0] * (width - len(s)) for s in selections]
    shape = (len(selections), width)
    # Everything was checked above. A tensor made by way of numpy takes half the time.
    return unchecked_routing(
        torch.from_numpy(np.array(index, np.int64).reshape(shape)),
        torch.from_numpy(np.array(weight, np.float32).reshape(shape)),
        LastPass(),
    )


def _one_each(
    names: Sequence[Any], handles: Callable[[Sequence[str]], Mapping[str, int]]
) -> Routing:
    """The routing of rows with one name each: what servers ask for, in a third of the time."""
    different = {*names} - {BASE}
    handle_of = {BASE: NONE, **handles([*different])}
    index = np.array([[handle_of[name]] for name in names], np.int64)
    weight = (index != NONE).astype(np.float32)
    return unchecked_routing(torch.from_numpy(index), torch.from_numpy(weight), LastPass())


def flattened(
    index: Tensor,
    weights: Tensor | None,
    others: Mapping[str, object],
    argument: str = "rows",
) -> tuple[Tensor, Tensor | None]:
    """An index [samples, tokens, J] and its weights, with one row for each token.

    Args:
        index: the index.
        weights: of the index's shape; None = all 1.
        others: arguments that mean nothing beside such an index, by name: they must be None.
        argument: what error messages call the index.

    Raises:
        RoutingError: an argument is given, or the weights have another shape.
    """
    for name, value in others.items():
        if value is not None:
            raise RoutingError(
                f"`{name}` must be None if `{argument}` is [samples, tokens, J], which has a row "
                f"for each token of the batch, got {value!r}"
            )
    if weights is None:
        return index.flatten(0, 1), None
    if not isinstance(weights, Tensor) or weights.shape != index.shape:
        is_tensor = isinstance(weights, Tensor)
        got = list(weights.shape) if is_tensor else type(weights).__name__
        raise RoutingError(
            f"`weights` must be a tensor of the index's shape {list(index.shape)}, got {got}"
        )
    return index.flatten(0, 1), weights.flatten(0, 1)


def _check_name(name: object, argument: str) -> str:
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"`{argument}` must name adapters by str, got {type(name).__name__}"
        )
    if name == BASE:
        raise RoutingError(
            f'`{argument}` must name adapters, got "{BASE}" among others; it means the base model, '
            "and can only stand alone"
        )
    return name


@dataclass(frozen=True)
class Companion:
    """The saved modules of one adapter, or of several that saved equal ones."""

    handle: int
    modules: frozenset[str]  # their paths
    digest: bytes  # of their values


class Companions:
    """Which adapters of a model have a companion. It lives as long as one of them has its slot.

    Other threads may read while one thread changes it.
    """

    def __init__(self) -> None:
        self._of: dict[int, Companion] = {}  # by the adapter's handle; all else follows from it
        self._users: dict[bytes, set[int]] = {}  # digest -> the adapters' handles

    def add(self, handle: int, companion: Companion) -> None:
        """Give an adapter its companion, for as long as it has its slot."""
        self._of[handle] = companion
        self._users.setdefault(companion.digest, set()).add(handle)

    def __contains__(self, handle: int) -> bool:
        """Whether an adapter has one."""
        return handle in self._of

    def forget(self, handle: int) -> int | None:
        """An adapter has gone; returns the handle of its companion if nobody else has that."""
        companion = self._of.pop(handle, None)
        if companion is None:
            return None
        users = self._users[companion.digest]
        users.discard(handle)
        if users:
            return None
        del self._users[companion.digest]
        return companion.handle

    def of_modules(
        self, modules: Iterable[str], digest: bytes, hold: Callable[[], int]
    ) -> Companion:
        """The companion that holds saved modules: one that is there and equal, or a new one.

        Args:
            modules: their paths.
            digest: of their values.
            hold: brings them to their places, and returns their handle.
        """
        users = self._users.get(digest)
        if users:
            return self._of[next(iter(users))]
        return Companion(hold(), frozenset(modules), digest)

    @property
    def handles(self) -> set[int]:
        """The handles of all companions."""
        return {companion.handle for companion in [*self._of.values()]}

    def beside(self, handles: Iterable[int]) -> set[int]:
        """These handles, and those of their companions."""
        those = {*handles}
        return those | {self._of[handle].handle for handle in those & self._of.keys()}

    def mend(self, tenants: Collection[int]) -> None:
        """Put in order what an interrupt has left: only tenants have companions."""
        of = {h: c for h, c in self._of.items() if h in tenants and c.handle in tenants}
        users: dict[bytes, set[int]] = {}
        for handle, companion in of.items():
            users.setdefault(companion.digest, set()).add(handle)
        self._of, self._users = of, users

    def joined(self, routing: Routing, argument: str, names: Mapping[int, str]) -> Routing:
        """A routing whose rows have the companions of what they select.

        Args:
            routing: rows that may have companions already, which then stay.
            argument: what error messages call the rows.
            names: of the adapters, by handle.

        Raises:
            RoutingError: adapters in one row have saved different values for the same module. Or
                the host may not read the index, whose rows have several places each.
        """
        if not self._of:
            return routing
        if not host_may_read(routing.index):
            return _widened(routing, self._looked_up(routing.index, argument))
        rows = [*map(tuple, routing.index.tolist())]
        found = {row: self._of_row(row, argument, names) for row in {*rows}}
        width = max(map(len, found.values()), default=0)
        if not width:
            return routing
        padded = {row: own + [NONE] * (width - len(own)) for row, own in found.items()}
        return _widened(routing, torch.from_numpy(np.array([padded[row] for row in rows])))

    def _of_row(self, row: tuple[int, ...], argument: str, names: Mapping[int, str]) -> list[int]:
        """The companions that a row has yet to get."""
        chosen: dict[Companion, int] = {}  # the adapter whose it is
        for handle in row:
            companion = self._of.get(handle)
            if companion is None or companion in chosen:
                continue
            for other, before in chosen.items():
                for path in sorted(companion.modules & other.modules)[:1]:
                    raise RoutingError(
                        f"`{argument}` must not select adapters in one row that saved different "
                        f"modules at the same place, got {names.get(before, before)!r} and "
                        f"{names.get(handle, handle)!r}, which both saved {path!r}; give each of "
                        "them a row of its own"
                    )
            chosen[companion] = handle
        return [companion.handle for companion in chosen if companion.handle not in row]

    def _looked_up(self, index: Tensor, argument: str) -> Tensor:
        """The companions [rows, 1] of an index that only the device knows, without a sync."""
        if index.shape[1] != 1:
            raise RoutingError(
                f"`{argument}` must be on the CPU, or have shape [rows, 1], while adapters with "
                f"saved modules are loaded, got {list(index.shape)} on {index.device}: nobody can "
                "tell whether a row selects two of them that differ"
            )
        of = sorted((handle, companion.handle) for handle, companion in [*self._of.items()])
        table = torch.tensor(of, dtype=torch.int64).T.contiguous()
        handles, companions = to_device([table], index.device)[0]
        place = torch.searchsorted(handles, index.long()).clamp(max=len(handles) - 1)
        found: Tensor = companions[place].where(handles[place] == index, NONE)
        return found

    def left_out(self, routing: Routing) -> Routing:
        """A routing on the host, made from names, without the companions in its rows."""
        ours = np.isin(routing.index.numpy(), [*self.handles])
        if not ours.any():
            return routing
        kept = ~ours.any(0)  # names and companions have columns of their own
        columns = torch.from_numpy(np.flatnonzero(kept))
        index, weight = routing.index[:, columns], routing.weight[:, columns]
        return unchecked_routing(index, weight, routing.last_pass)


def _widened(routing: Routing, companions: Tensor) -> Routing:
    """A routing with more places in each row, of weight 1 where they are taken."""
    index, weight = routing.index, routing.weight
    more = companions.to(index.dtype)
    ones = (more != NONE).to(weight.dtype)
    wide = torch.cat([index, more], 1), torch.cat([weight, ones], 1)
    return unchecked_routing(*wide, routing.last_pass)
