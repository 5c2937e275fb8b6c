"""Companions: what comes with adapters into a row, whole and once, whatever their weights are.

The modules that an adapter saved as a whole, as a classification head, are a second adapter under
a handle of its own, without a name: its companion. A row that selects adapters gets the companion
of each of them once, with weight 1. Adapters that saved equal modules share one companion.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import RoutingError
from .routing import NONE, Routing, host_may_read, unchecked_routing
from .streams import to_device


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

    def equal(self, digest: bytes) -> Companion | None:
        """The companion that holds such values already."""
        users = self._users.get(digest)
        return self._of[next(iter(users))] if users else None

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
        index = routing.index.numpy()
        if not np.isin(index, [*self._of]).any():
            return routing
        different, which = np.unique(index, axis=0, return_inverse=True)
        found = [self._of_row(row, argument, names) for row in different.tolist()]
        width = max(map(len, found))
        wide = np.array([f + [NONE] * (width - len(f)) for f in found], index.dtype)
        return _widened(routing, torch.from_numpy(wide[which.reshape(-1)]))

    def _of_row(self, row: list[int], argument: str, names: Mapping[int, str]) -> list[int]:
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
        handles, companions = to_device([*torch.tensor(of, dtype=torch.int64).T], index.device)
        place = torch.searchsorted(handles, index.long()).clamp(max=len(handles) - 1)
        return companions[place].where(handles[place] == index, NONE)

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
