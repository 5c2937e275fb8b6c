"""Which replica a request goes to: a number, or None while no replica may take it."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from math import ceil
from random import Random
from typing import NamedTuple

import numpy as np

from .traffic import Ints, scrambled

POINTS, MORE = 100, 2  # Ray 2.60's num_virtual_nodes and num_fallback_replicas
BOUND = 1.25  # Mirrokni, Thorup, Zadimoghaddam (2016): no replica has more than c times the mean


class Ring:
    """A circle with POINTS places of each replica; a key belongs to the next place."""

    def __init__(self, replicas: Ints) -> None:
        places = np.repeat(replicas, POINTS) * POINTS + np.tile(np.arange(POINTS), len(replicas))
        hashes = scrambled(scrambled(places))  # twice: names are scrambled once
        order = np.argsort(hashes)
        self.hashes: list[int] = hashes[order].tolist()
        self.replicas: list[int] = (places[order] // POINTS).tolist()

    def walk(self, key: int) -> Iterator[int]:
        """Each replica once, in the order of its next place from the key on."""
        start, seen = bisect_right(self.hashes, key), set()
        for where in (range(start, len(self.hashes)), range(start)):
            for i in where:
                if (found := self.replicas[i]) not in seen:
                    seen.add(found)
                    yield found


class State(NamedTuple):
    """What a router sees."""

    alive: Ints  # their numbers
    ring: Ring
    ongoing: Ints  # by number, those that are dead included
    rows: int  # that a replica takes at once
    rng: Random


Router = Callable[[State, int], int | None]


def at_random(state: State, key: int) -> int | None:
    """Any."""
    return int(state.alive[state.rng.randrange(len(state.alive))]) if len(state.alive) else None


def least_loaded(state: State, key: int) -> int | None:
    """Any of those with fewest requests."""
    if not len(state.alive):
        return None
    load = state.ongoing[state.alive]
    least = state.alive[load == load.min()]
    return int(least[state.rng.randrange(len(least))])


def hashed(more: int | None) -> Router:
    """The key's own, or one of `more` further ones on the ring; None = of all."""

    def route(state: State, key: int) -> int | None:
        if state.ongoing[state.alive].min(initial=state.rows) >= state.rows:
            return None  # at once: thousands may ask again and again, and a whole walk is long
        found = islice(state.ring.walk(key), None if more is None else 1 + more)
        return next((i for i in found if state.ongoing[i] < state.rows), None)

    return route


def bounded(state: State, key: int) -> int | None:
    """The key's first that has fewer than BOUND times the mean."""
    total = 1 + int(state.ongoing.sum())
    limit = ceil(BOUND * total / len(state.alive)) if len(state.alive) else 0
    return next((i for i in state.ring.walk(key) if state.ongoing[i] < limit), None)


ROUTINGS: dict[str, Router] = {
    "random": at_random,
    "least loaded": least_loaded,
    "hash": hashed(MORE),
    "hash, all": hashed(None),
    "bounded": bounded,
}
