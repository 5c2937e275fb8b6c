"""Where adapters that are to become resident find room: who has to go, and what has to move.

Nothing is changed here. What is planned on copies of the pools' free runs comes out the same when
it is carried out, for runs are handed out first fit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core import Pool, slot_of
from ..errors import PoolCapacityError


@dataclass(frozen=True)
class Placement:
    """What makes room."""

    order: Sequence[int]  # the handles that come, in the order of writing
    evicted: Sequence[int]  # the handles that go
    sliding: Mapping[str, Sequence[int]]  # path -> the slots that slide down, one after the other


def place(
    pools: Mapping[str, Pool],
    rows: Mapping[int, Mapping[str, int]],
    coming: Iterable[int],
    idle: Sequence[int],
    evictable: Sequence[int],
) -> Placement:
    """Room for `coming` in every pool.

    Args:
        rows: handle -> path -> the rank rows that it takes there.
        coming: the handles that are to become resident.
        idle: resident handles whose rank rows may move.
        evictable: those of them that may go, the first first.

    Raises:
        PoolCapacityError: there is no room, even without all that may go.
    """
    order = sorted(coming, key=lambda handle: -max(rows[handle].values()))
    evicted: list[int] = []
    settled = False
    while not settled:  # an eviction for one pool changes what moves in the others
        settled = True
        sliding = {}
        for path, pool in pools.items():
            needed = [rows[handle][path] for handle in order if path in rows[handle]]
            if not needed:
                continue
            while True:
                slides = _slides(pool, needed, evicted, idle)
                if slides is not None:
                    break
                going = (h for h in evictable if path in rows[h] and h not in evicted)
                victim = next(going, None)
                if victim is None:
                    raise PoolCapacityError(_full(path, pool, needed, evicted))
                evicted.append(victim)
                settled = False
            if slides:
                sliding[path] = slides
    return Placement(order, evicted, sliding)


def _slides(
    pool: Pool, needed: Sequence[int], evicted: Sequence[int], idle: Sequence[int]
) -> list[int] | None:
    """The slots that have to slide for `needed` to fit; None when that does not help either."""
    runs = pool.runs.copy()
    for handle in evicted:
        if span := pool.spans.get(slot_of(handle)):
            runs.give(span.offset, span.rows)
    if runs.free < sum(needed):
        return None
    asis = runs.copy()
    if all(asis.take(rows) is not None for rows in needed):
        return []
    staying = {slot_of(handle) for handle in idle if handle not in evicted}
    moving = sorted(staying & pool.spans.keys(), key=pool.spans.__getitem__)
    for slot in moving:
        span = pool.spans[slot]
        runs.give(span.offset, span.rows)
        runs.take(span.rows)
    return moving if all(runs.take(rows) is not None for rows in needed) else None


def _full(path: str, pool: Pool, needed: Sequence[int], evicted: Sequence[int]) -> str:
    freed = [pool.spans[slot_of(h)].rows for h in evicted if slot_of(h) in pool.spans]
    runs = pool.runs
    return (
        f"the pool of {path!r} must hold {len(needed)} more adapters of {sum(needed)} rank rows, "
        f"which it can not: of its {runs.capacity} rank rows {runs.free} are free (the largest run "
        f"{runs.largest}) and {sum(freed)} can be freed; the others belong to adapters that are "
        "asked for as well, pinned, or used by a route in force, an open `with` block, or outputs "
        "whose backward may still come. Ask for fewer at once, or attach with more memory"
    )
