"""How one pool makes room: by emptying stretches of consecutive rank rows.

A stretch is emptied by evicting adapters, the least recently used first. Where adapters that must
stay lie in between, they slide down, and as few of them as possible. Only copies are changed here.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from ..core import FreeRuns, Pool, Span, computed_once, slot_of


@dataclass(frozen=True)
class Room:
    """How one pool makes room: first these go, then these slide, one after the other."""

    evicted: Sequence[int] = ()  # handles
    sliding: Sequence[int] = ()  # slots


class Stretches:
    """What can be done in one pool so that arrivals fit.

    They come one after the other, each to the first free run that holds it.
    """

    def __init__(
        self, pool: Pool, needed: Sequence[int], idle: Iterable[int], evictable: Iterable[int]
    ) -> None:
        """
        Args:
            needed: the rank rows of each arrival.
            idle, evictable: as in `find_room`.
        """
        self._needed = needed
        self._handles = idle, evictable
        self._layout = _Layout(pool.spans, pool.runs)  # without all that have gone
        self._counted = 0  # how many these are

    def make_room(self, gone: Mapping[int, object]) -> Room | None:
        """What else is to be done, or None if no room was found.

        Args:
            gone: handles whose rank rows are free by then anyway. In later calls, more may follow.
        """
        self._layout.evict(islice(gone, self._counted, None))
        self._counted = len(gone)
        if self._layout.copy().admit(self._needed) is None:
            return Room()
        going = [handle for handle in self._evictable if handle not in gone]
        moving = [handle for handle in self._idle if handle not in gone]
        several = len(self._needed) > 1  # a single arrival has a stretch or has none
        return (
            self._evict_stretches(going)
            or (self._evict_the_oldest(going, ()) if several else None)
            or self._empty_stretches(going, moving)
            or self._evict_the_oldest(going, moving)
        )

    @computed_once
    def _idle(self) -> list[int]:
        return self._layout.here(self._handles[0])

    @computed_once
    def _evictable(self) -> list[int]:
        return self._layout.here(self._handles[1])

    def _evict_stretches(self, going: Sequence[int]) -> Room | None:
        """For each arrival, the stretch goes whose most recently used adapter is the oldest."""
        evicted: dict[int, None] = {}
        while True:
            layout = self._layout.copy()
            layout.evict(evicted)
            before = len(evicted)
            for rows in self._needed:
                if layout.runs.take(rows) is None:
                    stretch = layout.oldest_stretch(rows, going, evicted)
                    if not stretch:
                        return None
                    layout.evict(stretch)
                    layout.runs.take(rows)
                    evicted |= dict.fromkeys(stretch)
            if len(evicted) == before or len(self._needed) == 1:
                return Room(list(evicted))
            # Again: where more is free, the first ones may come to lie elsewhere.

    def _empty_stretches(self, going: Sequence[int], moving: Sequence[int]) -> Room | None:
        """For each arrival, the stretch is emptied in which the fewest lie that must stay."""
        evicted: dict[int, None] = {}
        sliding: list[int] = []
        ages = {handle: age for age, handle in enumerate(going, start=1)}
        more_than_all = (1 + len(going)) ** 2  # the sum of the ages is less
        while True:
            layout = self._layout.copy()
            layout.evict(evicted)
            for slot in sliding:
                layout.slide(slot)
            short = layout.admit(self._needed)
            if short is None:
                return Room(list(evicted), sliding)
            pieces = [*layout.free()]
            for handle in moving:
                if handle not in evicted:
                    start, end = layout.place(slot_of(handle))
                    room = end - start if handle in ages else 0
                    pieces.append(_Piece(start, end, room, ages.get(handle, more_than_all), handle))
            stretch = [p.handle for p in _cheapest(pieces, short) if p.handle is not None]
            if not stretch:
                return None
            evicted |= dict.fromkeys(handle for handle in stretch if handle in ages)
            sliding += (slot_of(handle) for handle in stretch if handle not in ages)

    def _evict_the_oldest(self, going: Sequence[int], moving: Iterable[int]) -> Room | None:
        """As few of the oldest go as make room when all others of `moving` slide.

        A last resort: some go that are of no use, and some move that are not in the way. Where
        adapters in use divide the pool, it is a packing problem, of which this tries first fit.
        """

        def with_the_first(count: int) -> Room | None:
            evicted = going[:count]
            layout = self._layout.copy()
            layout.evict(evicted)
            staying = map(slot_of, set(moving).difference(evicted))
            sliding = [slot for slot in sorted(staying, key=layout.place) if layout.slide(slot)]
            return Room(evicted, sliding) if layout.admit(self._needed) is None else None

        counts = range(1 + len(going))
        least = bisect_left(counts, True, key=lambda count: with_the_first(count) is not None)
        return with_the_first(least) if least in counts else None


class _Piece(NamedTuple):
    """Consecutive rank rows: a free run, or those of an adapter that may go or slide."""

    start: int
    end: int
    room: int  # rows that are free once it is dealt with
    cost: int
    handle: int | None = None  # None: free


class _Layout:
    """A pool as it will be, when some have gone, some have slid and some have come."""

    def __init__(self, spans: Mapping[int, Span], runs: FreeRuns) -> None:
        self.spans = spans
        self.runs = runs.copy()
        self.slid: dict[int, int] = {}  # slot -> offset

    def copy(self) -> "_Layout":
        """One to try things out on; nothing has slid in it."""
        return _Layout(self.spans, self.runs)

    def here(self, handles: Iterable[int]) -> list[int]:
        """Those that have rank rows here."""
        return [handle for handle in handles if slot_of(handle) in self.spans]

    def place(self, slot: int) -> tuple[int, int]:
        """Where a slot's rank rows begin and end."""
        span = self.spans[slot]
        start = self.slid.get(slot, span.offset)
        return start, start + span.rows

    def evict(self, handles: Iterable[int]) -> None:
        for handle in handles:
            if span := self.spans.get(slot_of(handle)):
                self.runs.give(span.offset, span.rows)

    def slide(self, slot: int) -> bool:
        """What `Pool.slide` does; returns whether the slot moves."""
        start, end = self.place(slot)
        self.runs.give(start, end - start)
        new = self.runs.take(end - start)
        assert new is not None
        self.slid[slot] = new
        return new < start

    def admit(self, needed: Iterable[int]) -> int | None:
        """Let arrivals come, as far as they fit; returns the rows of the first that does not."""
        return next((rows for rows in needed if self.runs.take(rows) is None), None)

    def free(self) -> Iterator[_Piece]:
        return (_Piece(start, end, end - start, 0) for start, end in self.runs)

    def oldest_stretch(
        self, rows: int, going: Iterable[int], gone: Mapping[int, object]
    ) -> list[int]:
        """Whose going makes a free run of `rows`, such that the most recent is old; else no one.

        Rank rows are given back, the oldest first, until a run is long enough.
        """
        runs = self.runs.copy()
        given = []
        for age, handle in enumerate(going, start=1):
            if handle in gone:
                continue
            offset, own, *_ = self.spans[slot_of(handle)]
            given.append(_Piece(offset, offset + own, own, age, handle))
            start, end = runs.give(offset, own)
            if end - start >= rows:
                inside = (p for p in (*self.free(), *given) if start <= p.start < end)
                return [p.handle for p in _cheapest(inside, rows) if p.handle is not None]
        return []


def _cheapest(pieces: Iterable[_Piece], rows: int) -> Sequence[_Piece]:
    """The pieces next to each other that make room for `rows` at the least cost; none if none do.

    Two pointers: for each last piece, the latest first piece with which there is room.
    """
    ordered = sorted(pieces)
    best, least = slice(0), None
    first = room = cost = 0
    for last, piece in enumerate(ordered):
        if last and ordered[last - 1].end < piece.start:  # others lie between, and stay there
            first, room, cost = last, 0, 0
        room, cost = room + piece.room, cost + piece.cost
        while room - ordered[first].room >= rows:
            room, cost = room - ordered[first].room, cost - ordered[first].cost
            first += 1
        if room >= rows and (least is None or cost < least):
            best, least = slice(first, last + 1), cost
    return ordered[best]
