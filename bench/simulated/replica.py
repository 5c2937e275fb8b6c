"""One engine: the batch it computes, its pool, and the host's memory and disk behind it."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from heapq import heappop, heappush
from typing import Any

import simpy

from .costs import Costs, Level

CLOSE = 1e-6  # steps: what rounding may leave of an answer's last one


class Cache:
    """The names asked for most recently, as many as fit, each with the time when it is there."""

    def __init__(self, slots: float, names: Sequence[int] = ()) -> None:
        """With `names` to begin with, the most recent last."""
        self.slots = slots
        self.ready = OrderedDict((name, 0.0) for name in names)

    def ask(self, name: int) -> float | None:
        """When it is there; None = not here, nor coming."""
        if name in self.ready:
            self.ready.move_to_end(name)
        return self.ready.get(name)

    def put(self, name: int, ready: float, held: Counter[int]) -> int:
        """Take it in, and return how many have gone for it. Those that are held stay."""
        gone = 0
        if len(self.ready) >= self.slots:
            del self.ready[next(old for old in self.ready if not held[old])]
            gone = 1
        self.ready[name] = ready
        return gone


class Replica:
    """A batch of up to `rows` requests, and those that wait for a place in it.

    All rows advance by one token a step, so that `mark` counts steps, and an answer is complete at
    a mark. Between two changes of the batch all steps cost the same, and are played as one event.
    A prompt, or a load into the pool, stops the batch: `since` is when it goes on.
    """

    def __init__(
        self,
        env: simpy.Environment,
        costs: Costs,
        rows: int,
        caches: list[Cache],  # the device's first
        levels: Sequence[Level],  # below the device, one for each further cache, then the store
        report: Callable[[str, int, float], None],  # an event, a request, a figure
    ) -> None:
        self.env, self.costs, self.limit, self.report = env, costs, rows, report
        self.caches, self.levels = caches, levels
        self.busy = [0.0] * len(levels)  # until when each way is
        self.inside: dict[int, tuple[tuple[int, ...], float, float]] = {}  # names, prompt, steps
        self.waiting: deque[int] = deque()
        self.rows: list[tuple[float, int]] = []  # a heap of marks and requests
        self.held: Counter[int] = Counter()  # by how many rows
        self.named = 0
        self.mark, self.since = 0.0, env.now
        self.dead = False
        self.change = env.event()
        env.process(self._run())

    def take(self, i: int, names: tuple[int, ...], prompt: float, steps: float) -> None:
        """Accept a request: fetch what is not on this host, then let it wait for its place."""
        self.inside[i] = names, prompt, steps
        ready = max((self._fetch(i, name) for name in names), default=0.0)
        if ready > self.env.now:
            there = self.env.timeout(ready - self.env.now)
            there.callbacks.append(lambda _: self._wait(i))
        else:
            self._wait(i)

    def die(self) -> list[int]:
        """Stop; returns the requests that have no answer yet."""
        self.dead = True
        self._wake()
        return [*self.inside]

    def _fetch(self, i: int, name: int) -> float:
        """When the name is in the host's memory; levels further down keep it as well."""
        found = [cache.ask(name) for cache in self.caches[1:]]
        source = next((n for n, ready in enumerate(found) if ready is not None), len(found))
        if source == 0:
            return found[0] or 0.0
        level = self.levels[source]
        self.report(level.name, i, 1)
        self.busy[source] = max(self.env.now, self.busy[source]) + level.transfer
        ready = self.busy[source] + level.wait
        for cache in self.caches[1 : source + 1]:
            cache.put(name, ready, Counter())
        return ready

    def _wait(self, i: int) -> None:
        self.waiting.append(i)
        self._wake()

    def _wake(self) -> None:
        if not self.change.triggered:
            self.change.succeed()

    def _run(self) -> Generator[Any, Any, None]:
        while not self.dead:
            self._leave()
            self._join()
            self.change = self.env.event()
            if self.rows:
                left = (self.rows[0][0] - self.mark) * self._step()
                yield self.env.timeout(self.since + left - self.env.now) | self.change
            else:
                yield self.change

            if self.env.now > self.since:
                if self.rows:
                    self.mark += (self.env.now - self.since) / self._step()
                self.since = self.env.now

    def _step(self) -> float:
        return self.costs.step(len(self.rows), len(self.held), self.named)

    def _leave(self) -> None:
        """Requests whose answers are complete."""
        while self.rows and self.rows[0][0] <= self.mark + CLOSE:
            _, i = heappop(self.rows)
            names = self.inside.pop(i)[0]
            for name in names:
                self.held[name] -= 1
                if not self.held[name]:
                    del self.held[name]
            self.named -= len(names)
            self.report("answer", i, self.env.now)

    def _join(self) -> None:
        """Requests in order of arrival, while there are rows and room for their adapters."""
        while self.waiting and len(self.rows) < self.limit:
            names, prompt, steps = self.inside[self.waiting[0]]
            if len(self.held.keys() | set(names)) > self.caches[0].slots:
                return
            i = self.waiting.popleft()
            for name in names:
                self.held[name] += 1
                if self.caches[0].ask(name) is None:
                    gone = self.caches[0].put(name, self.env.now, self.held)
                    self.since += self.costs.load + gone * self.costs.evict
                    self.report("loads", i, 1)
            self.named += len(names)
            self.since += prompt * self.costs.token
            heappush(self.rows, (self.mark + steps, i))
            self.report("first token", i, self.since)
