"""A fleet of replicas that plays requests, and what users see of it."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import simpy

from .costs import Costs, Level
from .replica import Cache, Replica
from .routing import ROUTINGS, Ring, State
from .traffic import Floats, Ints, Requests, Traffic, keys, names

BACKOFF = 0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.5  # Ray 2.60's, seconds; the last one again and again
WARMING = 500_000, 2_000  # requests before the day: in all, but at least so many a replica


@dataclass(frozen=True)
class Fleet:
    """Machines, and who sends what where."""

    costs: Costs
    replicas: int
    routing: str
    rows: int  # of a batch, and requests that hashing routers give a replica at once
    device: int  # adapters in a pool
    levels: tuple[Level, ...]  # the host's memory first, the store last
    key: str = "set"  # what hashing routers hash, or "rarest"
    deaths: int = 0  # of a replica at a time, at even distances
    back: float = 60.0  # seconds until another one stands in its place, with nothing in its caches
    again: int = 1  # times that a client sends a request again whose replica has died


@dataclass
class Day:
    """What happened to each request; nan and -1 where nothing did."""

    at: Floats
    first: Floats  # seconds from arrival to the first token
    done: Floats  # when its answer was complete
    named: Ints  # adapters, all attempts together
    attempts: Ints
    events: dict[str, Ints]  # loads into a pool, fetches from each level
    deaths: list[float]  # when

    def since(self, share: float) -> "Day":
        """Without the first requests, which still warm the caches."""
        n = int(share * len(self.at))
        return replace(
            self,
            at=self.at[n:],
            first=self.first[n:],
            done=self.done[n:],
            named=self.named[n:],
            attempts=self.attempts[n:],
            events={name: counts[n:] for name, counts in self.events.items()},
        )

    @property
    def hits(self) -> float:
        """Share of the adapters named that were on the device."""
        return 1 - float(self.events["loads"].sum() / self.named.sum())

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return int(np.isnan(self.done).sum())

    def wait(self, percent: float) -> float:
        """A percentile of the seconds until the first token; inf for requests without one."""
        waits = np.where(np.isnan(self.done), np.inf, self.first)
        return float(np.percentile(waits, percent, method="higher"))


def play(fleet: Fleet, requests: Requests, seed: int, traffic: Traffic | None = None) -> Day:
    """Play all requests to their end. Caches begin as `traffic` would leave them, or empty."""
    return _Play(fleet, requests, seed, traffic).day


class _Play:
    def __init__(
        self, fleet: Fleet, requests: Requests, seed: int, traffic: Traffic | None
    ) -> None:
        self.fleet, self.requests, n = fleet, requests, len(requests.at)
        self.env, rng = simpy.Environment(), Random(seed)
        numbers = np.arange(fleet.replicas)
        idle = np.zeros(fleet.replicas, np.int64)
        self.state = State(numbers, Ring(numbers), idle, fleet.rows, rng)
        self.route, self.place = ROUTINGS[fleet.routing], np.full(n, -1)
        self.names = [tuple(a for a in row if a >= 0) for row in requests.names.tolist()]
        self.keys: list[int] = keys(requests.names, fleet.key).tolist()
        kinds = ["loads", *(level.name for level in fleet.levels[1:])]
        self.day = Day(
            at=requests.at,
            first=np.full(n, np.nan),
            done=np.full(n, np.nan),
            named=np.zeros(n, np.int64),
            attempts=np.zeros(n, np.int64),
            events={kind: np.zeros(n, np.int64) for kind in kinds},
            deaths=[],
        )
        warm = self._warm(traffic, seed) if traffic else [[]] * fleet.replicas
        self.replicas = [self._replica(recent) for recent in warm]
        self.env.process(self._arrive())
        if fleet.deaths:
            self.env.process(self._die(rng))
        self.env.run()

    def _replica(self, recent: list[int]) -> Replica:
        fleet = self.fleet
        slots = [fleet.device, *(level.slots for level in fleet.levels[:-1])]
        caches = [Cache(n, recent[-int(n) :]) for n in slots]
        return Replica(self.env, fleet.costs, fleet.rows, caches, fleet.levels, self._report)

    def _warm(self, traffic: Traffic, seed: int) -> list[list[int]]:
        """By replica: the adapters that were asked for before the day, the most recent last."""
        fleet, rng = self.fleet, np.random.default_rng([seed, 1])
        most = int(max([fleet.device, *(level.slots for level in fleet.levels[:-1])]))
        n = fleet.replicas * min(4 * most, max(WARMING[0] // fleet.replicas, WARMING[1]))
        asked = names(traffic, n, rng)
        if "random" in fleet.routing or "least" in fleet.routing:
            owner = rng.integers(fleet.replicas, size=n)
        else:  # each key's own replica: nobody is full before the day
            ring = self.state.ring
            at = np.searchsorted(np.array(ring.hashes), keys(asked, fleet.key), "right")
            owner = np.array(ring.replicas)[at % len(ring.replicas)]
        order = np.argsort(owner, kind="stable")
        parts = np.split(asked[order], np.searchsorted(owner[order], range(1, fleet.replicas)))
        found = [dict.fromkeys(part[::-1].ravel().tolist()) for part in parts]
        return [[name for name in [*recent][:most] if name >= 0][::-1] for recent in found]

    def _report(self, event: str, i: int, figure: float) -> None:
        if event == "first token":
            self.day.first[i] = figure - self.requests.at[i]
        elif event == "answer":
            self.day.done[i] = figure
            self.state.ongoing[self.place[i]] -= 1
        else:
            self.day.events[event][i] += 1

    def _arrive(self) -> Generator[Any, Any, None]:
        for i, at in enumerate(self.requests.at.tolist()):
            yield self.env.timeout(at - self.env.now)
            self._send(i)

    def _send(self, i: int) -> None:
        self.day.attempts[i] += 1
        if not self._take(i):
            self.env.process(self._ask_again(i))

    def _ask_again(self, i: int) -> Generator[Any, Any, None]:
        turn = 0
        while not self._take(i):
            yield self.env.timeout(BACKOFF[min(turn, len(BACKOFF) - 1)])
            turn += 1

    def _take(self, i: int) -> bool:
        found = self.route(self.state, self.keys[i])
        if found is None:
            return False
        self.place[i] = found
        self.state.ongoing[found] += 1
        self.day.named[i] += len(self.names[i])
        r = self.requests
        self.replicas[found].take(i, self.names[i], float(r.prompt[i]), float(r.steps[i]))
        return True

    def _die(self, rng: Random) -> Generator[Any, Any, None]:
        """One at a time, each while the others live: the next one waits for the last one's heir."""
        fleet, end = self.fleet, self.requests.at[-1]
        for n in range(fleet.deaths):
            due = end * (n + 1) / (fleet.deaths + 1)
            yield self.env.timeout(max(0.0, due - self.env.now))
            self.day.deaths.append(self.env.now)
            number = rng.randrange(fleet.replicas)
            orphans = self.replicas[number].die()
            self._alive(np.delete(np.arange(fleet.replicas), number))
            self.state.ongoing[number] = 0
            for i in orphans:
                self.day.first[i] = np.nan
                if self.day.attempts[i] <= fleet.again:
                    self._send(i)
            yield self.env.timeout(fleet.back)
            self.replicas[number] = self._replica([])
            self._alive(np.arange(fleet.replicas))

    def _alive(self, numbers: Ints) -> None:
        self.state = self.state._replace(alive=numbers, ring=Ring(numbers))
