"""Where adapters find room that are to become resident: which make room, and which move.

Nothing is changed here. A plan that was made on copies of the pools' free runs comes out the same
when it is carried out, because runs are handed out first fit.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..core import Pool, slot_of
from ..errors import PoolCapacityError
from .stretches import Stretches


@dataclass(frozen=True)
class Placement:
    """How room is made. The handles of adapters, and the slots of those that only move.

    All that are evicted go first, then those that slide do, and then the arriving ones come. Rank
    rows only ever slide down, so that one may stop after any slide, and plan again from there.
    """

    arriving: Sequence[int]  # in the order of writing
    evicted: Sequence[int]
    sliding: Mapping[str, Sequence[int]]  # path -> slots that slide down, one after the other


def find_room(
    pools: Mapping[str, Pool],
    rank_rows: Mapping[int, Mapping[str, int]],
    arriving: Iterable[int],
    idle: Sequence[int],
    evictable: Sequence[int],
) -> Placement:
    """Room for adapters in every pool.

    Adapters that may go make room before others move. Those move that may not go, and only where
    they lie in the way.

    Args:
        pools: by path.
        rank_rows: handle -> path -> the rank rows that it takes there.
        arriving: the handles that are to become resident.
        idle: resident handles whose rank rows may move.
        evictable: the idle handles that may go, in this order.

    Raises:
        PoolCapacityError: there is no room, even without all that may go.
    """
    order = sorted(arriving, key=lambda handle: -max(rank_rows[handle].values()))
    needed = {
        path: [rank_rows[handle][path] for handle in order if path in rank_rows[handle]]
        for path in pools
    }
    evicted, sliding = _find_in_all(pools, needed, idle, evictable)
    if not sliding and len(asking := dict.fromkeys(reversed(evicted.values()))) > 1:
        # Who went for the first pool may be of no use since others went for the last one.
        oldest_first = [handle for handle in evictable if handle in evicted]
        last_first = {path: needed[path] for path in (*asking, *needed)}
        with suppress(PoolCapacityError):  # in another order, several that arrive may not fit
            evicted, sliding = _find_in_all(pools, last_first, (), oldest_first)
    return Placement(order, list(evicted), sliding)


def _find_in_all(
    pools: Mapping[str, Pool],
    needed: Mapping[str, Sequence[int]],
    idle: Sequence[int],
    evictable: Sequence[int],
) -> tuple[dict[int, str], dict[str, Sequence[int]]]:
    """Who goes, with the path of the first pool that asks for it, and which slots slide."""
    stretches = {
        path: Stretches(pools[path], rows, idle, evictable) for path, rows in needed.items()
    }
    evicted: dict[int, str] = {}
    sliding: dict[str, Sequence[int]] = {}
    counted = dict.fromkeys(needed, -1)  # how many had been evicted when a pool was planned
    several = any(len(rows) > 1 for rows in needed.values())
    stale = list(needed)
    while stale:
        for path in stale:
            room = stretches[path].make_room(evicted)
            if room is None:
                raise PoolCapacityError(_no_room(path, pools[path], needed[path], evictable))
            evicted |= dict.fromkeys(room.evicted, path)
            sliding[path] = room.sliding
            counted[path] = len(evicted)
        # A single arrival that finds room without slides finds it when others go as well.
        stale = [p for p in needed if counted[p] < len(evicted) and (several or sliding[p])]
    return evicted, {path: slots for path, slots in sliding.items() if slots}


def _no_room(path: str, pool: Pool, needed: Sequence[int], evictable: Iterable[int]) -> str:
    freed = [pool.spans[slot_of(h)].rows for h in evictable if slot_of(h) in pool.spans]
    runs = pool.runs
    return (
        f"the pool of {path!r} must hold {sum(needed)} more rank rows, but of its {runs.capacity} "
        f"only {runs.free} are free (at most {runs.largest} in a row) and {sum(freed)} can be "
        "freed; the others belong to adapters that you asked for as well, that are pinned, or that "
        "a route in force, an open `with` block, or an output whose backward may still come is "
        "using; ask for fewer at once, or attach with more memory"
    )
