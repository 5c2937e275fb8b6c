"""The simulated fleet against theory, simpy's own queue, and figures by hand; record and page."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from math import ceil, factorial, inf
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simpy

import fleet as command
import plot
from paths import ROOT
from simulated import costs, routing, tables, traffic
from simulated.costs import Costs, Level
from simulated.fleet import Day, Fleet, play
from simulated.replica import Cache
from simulated.traffic import Requests, Traffic

PAGE, RECORD = ROOT / "docs" / "scale.md", ROOT / command.RECORD
HERE = (Level("host", 10**9, 0.0, 0.0), Level("store", inf, 0.0, 0.0))  # all at once, for nothing
STEPS = Costs([1.0] * 33, [0.0] * 200, 0.0, 0.0, 0.0, 0.0)  # a second each, and all else free
QUICK = replace(STEPS, base=[1e-4] * 33)


def given(at: list[float], names: list[list[int]], prompt: float, steps: list[float]) -> Requests:
    """Requests by hand."""
    most = max(map(len, names))
    padded = [[*row, *[-1] * (most - len(row))] for row in names]
    return Requests(np.array(at), np.array(padded), np.full(len(at), prompt), np.array(steps))


def drawn(n: int, rate: float, seed: int = 0, **of: Any) -> Requests:
    return traffic.requests(Traffic(**of), n, rate, np.random.default_rng(seed))


class TestTheory:
    @pytest.mark.parametrize("servers, load", [(1, 0.5), (3, 0.6), (8, 0.6)])
    def test_a_queue_waits_as_erlang_and_simpy_say(self, servers: int, load: float) -> None:
        """M/M/c: rows of equal steps are servers, answers of exponential length their customers."""
        n, rng = 12_000, np.random.default_rng(1)
        at = traffic.arrivals(n, servers * load / 10, 0.0, rng)
        requests = Requests(at, np.full((n, 1), -1), np.zeros(n), rng.exponential(10, n))
        found = play(Fleet(STEPS, 1, "random", servers, 1, HERE), requests, 0).first

        waits = np.zeros(n)
        env = simpy.Environment()
        desk = simpy.Resource(env, servers)

        def customer(i: int) -> Any:
            with desk.request() as turn:
                yield turn
                waits[i] = env.now - at[i]
                yield env.timeout(requests.steps[i])

        def door() -> Any:
            for i in range(n):
                yield env.timeout(at[i] - env.now)
                env.process(customer(i))

        env.process(door())
        env.run()
        np.testing.assert_allclose(found, waits, atol=1e-3)  # of seconds, CLOSE steps each

        offered = servers * load
        busy = offered**servers / factorial(servers) / (1 - load)
        free = sum(offered**k / factorial(k) for k in range(servers))
        erlang_c = busy / (busy + free)
        late = found[n // 10 :]
        assert (late > 1e-6).mean() == pytest.approx(erlang_c, rel=0.08)
        assert late.mean() == pytest.approx(erlang_c * 10 / servers / (1 - load), rel=0.12)

    SETTINGS = (0.7, 50, "random"), (1.0, 20, "least loaded"), (1.3, 10, "random")

    @pytest.mark.parametrize("zipf, slots, name", SETTINGS)
    def test_a_pool_hits_as_che_says(self, zipf: float, slots: int, name: str) -> None:
        """Each pool has the same popularity, however many there are."""
        expected = che(popularity(500, zipf), slots)
        assert lru(name, 3, slots, zipf).hits == pytest.approx(expected, abs=0.015)

    def test_hashing_divides_the_names(self) -> None:
        """Each pool has the names that the ring gives it, and Che says what it hits of them."""
        chance, slots = popularity(500, 1.0), 20
        ring = routing.Ring(np.arange(3))
        keys = traffic.keys(np.arange(500)[:, None], "set").tolist()
        owner = np.array([next(ring.walk(key)) for key in keys])
        parts = [chance[owner == i] for i in range(3)]
        hits = sum(part.sum() * che(part / part.sum(), slots) for part in parts)
        assert lru("hash, all", 3, slots, 1.0).hits == pytest.approx(hits, abs=0.015)
        assert hits > che(chance, slots) + 0.1

    @pytest.mark.parametrize("name", ["random", "hash, all"])
    def test_caches_begin_as_traffic_leaves_them(self, name: str) -> None:
        """The first requests already hit as the last ones do, on the device and on the host."""
        one = Fleet(QUICK, 3, name, 32, 20, (Level("host", 100, 0.0, 0.0), HERE[1]))
        day = play(one, drawn(8000, 3, adapters=500), 0, Traffic(adapters=500))
        for counts in day.events.values():
            assert counts[:2000].sum() == pytest.approx(counts[2000:].sum() / 3, rel=0.1)
        assert 0 < day.events["store"].sum() < day.events["loads"].sum()


def popularity(adapters: int, zipf: float) -> traffic.Floats:
    chance: traffic.Floats = np.arange(1, adapters + 1) ** -zipf
    return chance / chance.sum()


def che(chance: traffic.Floats, slots: int) -> float:
    """Che, Tung, Wang (2002): T by which `slots` different names come, and who comes again in T."""
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if (1 - np.exp(-chance * middle)).sum() > slots else (middle, high)
        )
    return float((chance * (1 - np.exp(-chance * low))).sum())


def lru(name: str, replicas: int, slots: int, zipf: float) -> Day:
    """A day so quiet that requests do not meet."""
    one = Fleet(QUICK, replicas, name, 32, slots, HERE)
    return play(one, drawn(12_000, 1.0, adapters=500, zipf=zipf), 0).since(0.2)


class TestReplica:
    COSTS = Costs([0, 1, 3], [0, 1, 2, 3], 0.5, 0.5, 0.25, 0.125)

    def test_a_batch_by_hand(self) -> None:
        requests = given([0, 2], [[7], [8]], 2, [4, 1])
        day = play(Fleet(self.COSTS, 1, "random", 2, 2, HERE), requests, 0)
        # A load and a prompt: 1.25. Then 0.75 s of steps of 2 s, a load and a prompt; one step of
        # 5 s for both; and the rest of four alone.
        assert day.first == pytest.approx([1.25, 1.25])
        assert day.done == pytest.approx([8.25 + 2 * (4 - 0.375 - 1), 8.25])
        assert day.events["loads"].tolist() == [1, 1] and day.hits == 0

    def test_several_adapters_of_a_request(self) -> None:
        day = play(Fleet(self.COSTS, 1, "random", 2, 3, HERE), given([0], [[1, 2, 3]], 0, [2]), 0)
        assert day.first == pytest.approx([0.75])
        assert day.done == pytest.approx([0.75 + 2 * (1 + 3 + 0.5 * 2)])

    def test_a_full_pool_makes_requests_wait_and_evicts_nobody_s_adapter(self) -> None:
        requests = given([0, 0, 100], [[7], [8], [8]], 0, [4, 1, 1])
        day = play(Fleet(self.COSTS, 1, "random", 2, 1, HERE), requests, 0)
        first = 0.25 + 4 * 2
        assert day.first == pytest.approx([0.25, first + 0.25 + 0.125, 0])
        assert day.done[0] == pytest.approx(first) and day.events["loads"].tolist() == [1, 1, 0]

    def test_fetches_by_hand(self) -> None:
        """The way is busy for 2 s an adapter, which is there 1 s later; who asks too waits too."""
        levels = (Level("host", 2, 0, 0), Level("disk", 9, 10, 0), Level("store", inf, 1, 2))
        requests = given([0, 0, 1, 50, 60, 80], [[1], [2], [1], [1], [3], [2]], 0, [0] * 6)
        day = play(Fleet(STEPS, 1, "random", 2, 2, levels), requests, 0)
        # At 60 the host forgets 2, not 1, and finds it on the disk.
        assert day.first == pytest.approx([3, 5, 2, 0, 3, 10])
        assert day.events["store"].tolist() == [1, 1, 0, 0, 1, 0]
        assert day.events["disk"].tolist() == [0, 0, 0, 0, 0, 1]

    def test_a_cache_forgets_what_was_asked_for_least_recently(self) -> None:
        cache = Cache(2, [1, 2])
        assert cache.ask(1) == 0.0 and cache.put(3, 5.0, Counter()) == 1
        assert cache.ask(2) is None and cache.ask(3) == 5.0 and cache.ask(1) == 0.0
        assert cache.put(4, 0.0, Counter([3])) == 1 and cache.ask(3) == 5.0 and cache.ask(1) is None


class TestFleet:
    @pytest.mark.parametrize("name", routing.ROUTINGS)
    def test_room_for_all_is_never_missed(self, name: str) -> None:
        day = play(Fleet(QUICK, 3, name, 32, 60, HERE), drawn(3000, 3, adapters=60, zipf=0.0), 0)
        assert not day.lost and (day.since(0.7).hits == 1 or name == "bounded")  # which spills
        most = 60 if name.startswith("hash") else 180
        assert 60 <= day.events["loads"].sum() <= most
        assert day.events["store"].sum() == day.events["loads"].sum()

    @pytest.mark.parametrize("name", routing.ROUTINGS)
    @pytest.mark.parametrize("again", [0, 1])
    def test_every_request_is_answered_or_lost(self, name: str, again: int) -> None:
        """Eight deaths of three replicas at work, each while its batch is full of requests."""
        slow = replace(STEPS, base=[0.02] * 33)
        one = Fleet(slow, 3, name, 8, 20, HERE, deaths=8, back=20, again=again)
        day = play(one, drawn(1200, 6, adapters=500), 0)
        answered = ~np.isnan(day.done)
        assert answered.sum() + day.lost == 1200 and len(day.deaths) == 8
        assert (day.first[answered] >= 0).all() and np.isnan(day.first[~answered]).all()
        assert (day.done >= day.at + day.first)[answered].all()
        assert (day.attempts[~answered] == 1 + again).all() and day.attempts.max() == 1 + again
        assert (day.lost if again == 0 else (day.attempts > 1).sum()) > 8
        assert (day.wait(100) == inf) == (day.lost > 0)

    def test_nobody_is_there(self) -> None:
        """The only replica dies: requests wait until another has its place, with an empty pool."""
        one = Fleet(QUICK, 1, "bounded", 8, 20, HERE, deaths=1, back=50)
        day = play(one, drawn(1000, 10, adapters=10), 0)
        (death,) = day.deaths
        gone = (day.at > death) & (day.at < death + 50)
        assert gone.sum() > 400 and not day.lost
        assert (day.done[gone] >= death + 50).all()
        assert day.events["loads"][day.at > death].sum() == 10

    def test_a_seed_says_all(self) -> None:
        of = Traffic(adapters=500, mix={1: 1, 3: 1})
        levels = (Level("host", 50, 0.0, 0.0), HERE[1])
        one = Fleet(QUICK, 3, "random", 8, 20, levels, deaths=2, back=20)
        days = [
            play(one, traffic.requests(of, 1000, 9, np.random.default_rng(seed)), seed, of)
            for seed in (3, 3, 4)
        ]
        assert days[0].done.tolist() == days[1].done.tolist() != days[2].done.tolist()


def state(ongoing: list[int], rows: int = 4) -> routing.State:
    numbers = np.arange(len(ongoing))
    return routing.State(numbers, routing.Ring(numbers), np.array(ongoing), rows, Random(0))


class TestRouting:
    KEYS = traffic.keys(np.arange(20_000)[:, None], "set").tolist()

    def test_a_death_moves_only_its_own_keys(self) -> None:
        whole, without = routing.Ring(np.arange(10)), routing.Ring(np.delete(np.arange(10), 3))
        owners = [next(whole.walk(key)) for key in self.KEYS]
        for key in self.KEYS:
            assert next(without.walk(key)) == next(i for i in whole.walk(key) if i != 3)
        shares = np.bincount(owners) / len(owners)
        assert (abs(shares - 0.1) < 0.04).all()  # 100 places each: 10 % of the mean, and luck
        assert sorted(whole.walk(self.KEYS[0])) == [*range(10)]

    def test_hashing_falls_over(self) -> None:
        """To the two next, as Ray's does; or to all."""
        free = state([0] * 6)
        order = [*free.ring.walk(5)]
        for full in range(7):
            one = state([4 if order.index(i) < full else 3 for i in range(6)])
            assert routing.ROUTINGS["hash"](one, 5) == (order[full] if full < 3 else None)
            assert routing.ROUTINGS["hash, all"](one, 5) == (order[full] if full < 6 else None)

    def test_a_bound_holds(self) -> None:
        """Mirrokni's: a hot key never gives a replica more than 1.25 times the mean, rounded up."""
        one, rng = state([0] * 8), Random(1)
        for turn in range(1, 400):
            key = self.KEYS[0 if rng.random() < 0.5 else rng.randrange(100)]
            found = routing.bounded(one, key)
            assert found is not None
            one.ongoing[found] += 1
            assert one.ongoing[found] <= ceil(1.25 * turn / 8)

    def test_least_loaded_is(self) -> None:
        one = state([3, 1, 2, 1])
        assert {routing.least_loaded(one, 0) for _ in range(50)} == {1, 3}
        assert {routing.at_random(one, 0) for _ in range(90)} == {0, 1, 2, 3}
        assert routing.least_loaded(one._replace(alive=np.array([0, 2])), 0) == 2


class TestTraffic:
    def test_a_day_swings(self) -> None:
        """Its quarters have 1/4 -+ swing / 2 pi of the requests."""
        at = traffic.arrivals(100_000, 10, 0.5, np.random.default_rng(0))
        assert (np.diff(at) >= 0).all() and 0 <= at[0] and at[-1] <= 10_000
        night = 0.25 - 0.5 / (2 * np.pi)
        quarters = np.histogram(at, 4, (0, 10_000))[0] / 1e5
        assert quarters == pytest.approx([night, 0.5 - night, 0.5 - night, night], abs=0.005)

    def test_names_are_zipf_s_and_distinct(self) -> None:
        of = Traffic(adapters=50, zipf=1.2, mix={1: 0.5, 4: 0.5})
        found = traffic.names(of, 40_000, np.random.default_rng(0))
        first = np.bincount(found[:, 0], minlength=50) / 40_000
        assert first == pytest.approx(popularity(50, 1.2), abs=0.01)
        sizes = (found >= 0).sum(1)
        assert set(sizes) == {1, 4} and sizes.mean() == pytest.approx(2.5, abs=0.05)
        assert all(len({*row}) == 4 for row in found[sizes == 4][:2000].tolist())
        with pytest.raises(ValueError, match="mix has requests of 4 adapters, of 3 in all"):
            traffic.names(of._replace(adapters=3), 1, np.random.default_rng(0))

    def test_keys_are_of_sets(self) -> None:
        sets = np.array([[3, 9, -1], [9, 3, -1], [9, -1, -1], [3, 9, 4]])
        a, b, c, d = traffic.keys(sets, "set").tolist()
        assert a == b and len({a, c, d}) == 3
        a, b, c, d = traffic.keys(sets, "rarest").tolist()
        assert a == b == c == d


class TestCosts:
    def test_shares_are_those_of_the_headlines(self) -> None:
        """Of docs/benchmarks.md, whose table plot.py makes of the same record."""
        lines = plot.headline_table(plot.read(ROOT / costs.GPU)).splitlines()[2:]
        settings = (costs.EIGHT, costs.ONE, costs.FOUR_OF_EIGHT, costs.PREFILL)
        for line, setting in zip(lines, settings, strict=True):
            share = 1 + costs.added(setting) / costs.forward("base", setting)
            ours = [float(s) for s in line.split("|")[3:5] if "not measured" not in s]
            assert share == pytest.approx(min(ours), abs=6e-4)

    def test_loads_are_those_of_residency(self) -> None:
        """24 ms for the first use of 8.4 MB, and 31 with an eviction; a route is 0.17 of each."""
        load, evict = costs.load_and_evict(8389632)
        assert load == pytest.approx(0.02442 - 0.00017, rel=1e-3)
        assert load + evict == pytest.approx(0.03111 - 0.00017, rel=1e-3)

    @pytest.mark.parametrize("model, trained", [("8B", 41_943_040), ("70B", 207_093_760)])
    def test_bytes_are_peft_s(self, model: str, trained: int) -> None:
        """Parameters that PEFT 0.21.2 counts for Llama 3: rank 16, target_modules="all-linear"."""
        assert costs.adapter_bytes(16, model) == 2 * trained

    def test_a_step_never_costs_less_with_more(self) -> None:
        found = costs.from_records(16, 128, 0.002)
        by_rows = [found.step(rows, 1, rows) for rows in range(1, 33)]
        by_adapters = [found.step(32, n, 128) for n in range(129)]
        assert by_rows == sorted(by_rows) and by_adapters == sorted(by_adapters)
        exact = costs.forward("base", costs.EIGHT) + costs.added(costs.EIGHT)
        assert found.step(32, 8, 32) - 0.002 == pytest.approx(exact, rel=0.01)  # 7.9 are expected
        assert found.step(32, 8, 128) - found.step(32, 8, 32) == pytest.approx(
            costs.added(costs.FOUR_OF_EIGHT) - costs.added(costs.EIGHT)
        )

    def test_a_record_without_the_setting_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"must have lora_mux on 4 layers .* got \[\]"):
            costs.forward("lora_mux", {**costs.ONE, "samples": 5})


class TestCommand:
    SMALL = ["--requests", "400", "--adapters", "1000", "--host", "90", "--disk", "90"]

    def job(self, part: str) -> command.Job:
        jobs = command.jobs(command.parse(self.SMALL))
        return next(job for job in jobs if job.part == part)

    def test_needed_is_the_fewest(self) -> None:
        job = self.job("needed")._replace(n=600, rate=40.0)
        found = command.run(job)
        fleets = (replace(job.fleet, replicas=found["replicas"] - less) for less in (0, 1))
        enough, fewer = (command.once(job._replace(fleet=one))["p99"] for one in fleets)
        assert enough == found["p99"] <= job.target < fewer
        assert command.needed(job._replace(target=1e-9)) == {"replicas": None}

    def test_deaths_are_counted_before_and_after(self) -> None:
        job = self.job("deaths")._replace(n=6000, rate=6.0)
        found = command.run(job._replace(fleet=replace(job.fleet, replicas=3)))
        assert found["simulation"] == "deaths" and found["lost"] == 0 < found["interrupted"]
        assert found["back"]["hits"] < found["before"]["hits"]

    def test_one_s_own_fleet(self, capsys: pytest.CaptureFixture[str]) -> None:
        mine = ["--step-ms", "9", "--adapter-us", "50", "--prompt-us", "20", "--load-ms", "5"]
        asked = [*self.SMALL, *mine, "--replicas", "3", "--rate", "9", "--mix", "1:2", "2:1"]
        found = command.costs_of(command.parse(asked))
        assert found.step(4, 3, 4) == pytest.approx(0.00915)
        assert (found.token, found.load, found.evict) == (2e-5, 0.005, 0)
        assert command.main(asked) == 0
        head, _, row = capsys.readouterr().out.splitlines()
        assert head == f"| replicas | {' | '.join(routing.ROUTINGS)} |" and row.startswith("| 3 |")

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--replicas", "3"], "--replicas and --rate go together"),
            (["--rows", "64"], "h100-headline.jsonl ends at 32, got 64"),
            (["--device", "2", "--mix", "3"], "holds no request of 3 adapters"),
            (["--host", "9"], "as many adapters as the one above, got 48, 9, 4000"),
        ],
    )
    def test_refusals(
        self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            command.parse(options)
        assert message in capsys.readouterr().err


class TestPage:
    @pytest.fixture
    def page(self) -> str:
        return PAGE.read_text("utf-8")

    @pytest.fixture
    def record(self) -> list[dict[str, Any]]:
        return plot.read(RECORD)

    def test_its_tables_are_the_record_s(self, page: str, record: list[dict[str, Any]]) -> None:
        for table in tables.tables(record):
            assert table in page

    def test_the_record_is_of_today_s_jobs(self, record: list[dict[str, Any]]) -> None:
        """And of today's costs: a record that they come from has not changed since."""
        jobs = [*command.jobs(command.parse([]))]
        assert [(r["simulation"], r["case"]) for r in record[1:]] == [j[:2] for j in jobs]
        today = json.loads(json.dumps(asdict(jobs[0].fleet.costs)))
        assert record[0]["fleet"]["costs"] == today

    def test_its_flags_exist(self, page: str) -> None:
        script = (ROOT / "bench" / "fleet.py").read_text("utf-8")
        flags = set(re.findall(r"`(--[\w-]+)", page))
        assert len(flags) > 15 and all(f'"{flag}"' in script for flag in flags)

    def test_it_says_that_nothing_is_measured(
        self, page: str, record: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        assert "simulations, never measurements" in page[:600]
        tables.draw(record, tmp_path / "fleet.png")
        assert (tmp_path / "fleet.png").stat().st_size > 10_000
