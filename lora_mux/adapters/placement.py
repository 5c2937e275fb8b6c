"""Where adapters find room that are to become resident: which make room, and which move.

Nothing is changed here. A plan that was made on copies of the pools' free runs comes out the same
when it is carried out, because runs are handed out first fit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core import Pool, slot_of
from ..errors import PoolCapacityError


@dataclass(frozen=True)
class Placement:
    """How room is made. The handles of adapters, and the slots of those that only move."""

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
    evicted: list[int] = []
    settled = False
    while not settled:  # an eviction for one pool changes what moves in the others
        settled = True
        sliding = {}
        for path, pool in pools.items():
            needed = [rank_rows[handle][path] for handle in order if path in rank_rows[handle]]
            if not needed:
                continue
            while True:
                slides = _slides(pool, needed, evicted, idle)
                if slides is not None:
                    break
                candidates = (h for h in evictable if path in rank_rows[h] and h not in evicted)
                victim = next(candidates, None)
                if victim is None:
                    raise PoolCapacityError(_no_room(path, pool, needed, evicted))
                evicted.append(victim)
                settled = False
            if slides:
                sliding[path] = slides
    return Placement(order, evicted, sliding)


def _slides(
    pool: Pool, needed: Sequence[int], evicted: Sequence[int], idle: Sequence[int]
) -> list[int] | None:
    """The slots that have to slide for `needed` to fit; None if that does not help either."""
    runs = pool.runs.copy()
    for handle in evicted:
        if span := pool.spans.get(slot_of(handle)):
            runs.give(span.offset, span.rows)
    if runs.free < sum(needed):
        return None
    without_sliding = runs.copy()
    if all(without_sliding.take(rows) is not None for rows in needed):
        return []
    staying = {slot_of(handle) for handle in idle if handle not in evicted}
    moving = sorted(staying & pool.spans.keys(), key=pool.spans.__getitem__)
    for slot in moving:
        span = pool.spans[slot]
        runs.give(span.offset, span.rows)
        runs.take(span.rows)
    return moving if all(runs.take(rows) is not None for rows in needed) else None


def _no_room(path: str, pool: Pool, needed: Sequence[int], evicted: Sequence[int]) -> str:
    freed = [pool.spans[slot_of(h)].rows for h in evicted if slot_of(h) in pool.spans]
    runs = pool.runs
    return (
        f"the pool of {path!r} must hold {sum(needed)} more rank rows, but of its {runs.capacity} "
        f"only {runs.free} are free (at most {runs.largest} in a row) and {sum(freed)} can be "
        "freed; the others belong to adapters that you asked for as well, that are pinned, or that "
        "a route in force, an open `with` block, or an output whose backward may still come is "
        "using; ask for fewer at once, or attach with more memory"
    )
