"""Thousands of tenants, a pool for a few, and threads that load, reload, prefetch and serve."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_mux.errors import PoolCapacityError, UnknownAdapterError
from tenants import SIZES, Tenant, attached, tenant, truth

FOLDERS = 400
RELOADED = 40  # names whose adapter is replaced all the time, by another one and back
RANK = 4  # of all on average: the pool holds 64 adapters


class Churn:
    def __init__(self, folder: Path, names: int) -> None:
        draw = random.Random(0)
        ranks = [{path: draw.randint(1, 2 * RANK - 1) for path in SIZES} for _ in range(FOLDERS)]
        # Every fourth one is of DoRA.
        tenants = [tenant(folder / str(i), r, i, dora=i % 4 == 3) for i, r in enumerate(ranks)]
        self.model, self.mux = attached(64 * RANK)
        self.mux.reserve(adapters=2 * names, rank=2 * RANK)
        # Those that a name may mean at this moment: two where it is replaced.
        self.tenants: dict[str, list[Tenant]] = {}
        for i in range(names):
            also = [tenants[(i + 1) % FOLDERS]] if i < RELOADED else []
            self.tenants[f"t{i}"] = [tenants[i % FOLDERS], *also]
        self.mux.load_many({name: who[0].folder for name, who in self.tenants.items()})
        self.names = list(self.tenants)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()

    def run(self, seconds: float, actors: list[Callable[[random.Random], None]]) -> None:
        """Each actor in a thread of its own, again and again."""

        def act(actor: Callable[[random.Random], None], seed: int) -> None:
            draw = random.Random(seed)
            while not self.stop.is_set():
                try:
                    actor(draw)
                    self.counts[actor.__name__] += 1
                except PoolCapacityError as error:  # too many batches at once for this memory
                    self.counts[type(error).__name__] += 1
                except BaseException as error:
                    self.wrong.append(f"{actor.__name__}: {error!r}")
                    self.stop.set()

        threads = [
            threading.Thread(target=act, args=(actor, seed)) for seed, actor in enumerate(actors)
        ]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()

    def serve(self, draw: random.Random) -> None:
        """A batch of four tenants, one of them twice with a weight, and one row of the base."""
        popular = draw.random() < 0.5
        among = self.names[:80] if popular else self.names
        names = draw.sample(among, 3)
        rows = [{names[0]: 1.0}, {names[1]: -0.5, names[2]: 2.0}, {}, {names[0]: 0.25}]
        x = torch.tensor([[draw.uniform(-1, 1) for _ in range(12)] for _ in rows])
        with torch.no_grad(), self.mux.route(rows):
            y = self.model(x)
            if draw.random() < 0.1:  # the same once more, after others had time to interfere
                time.sleep(0.002)
                again = self.model(x)
                if not torch.equal(y, again):
                    self.wrong.append(f"{names}: another answer within one block")
        for m, row in enumerate(rows):
            if not self.is_right(x[m : m + 1], y[m : m + 1], row):
                self.wrong.append(f"row {m} of {names}")
        self.counts["rows"] += len(rows)

    def is_right(self, x: Tensor, y: Tensor, row: dict[str, float]) -> bool:
        """Whether y is what one version of each tenant answers, the same one in all layers."""
        choices: list[list[tuple[Tenant, float]]] = [[]]
        for name, weight in row.items():
            choices = [[*c, (who, weight)] for c in choices for who in self.tenants[name]]
        return any(
            torch.allclose(y.double(), truth(self.model, x, [chosen]), rtol=1e-4, atol=1e-4)
            for chosen in choices
        )

    def reload(self, draw: random.Random) -> None:
        name = draw.choice(self.names[:RELOADED])
        self.mux.load(name, draw.choice(self.tenants[name]).folder, replace=True)

    def prefetch(self, draw: random.Random) -> None:
        self.mux.prefetch(draw.sample(self.names, 4))

    def come_and_go(self, draw: random.Random) -> None:
        """A name of its own, that is loaded, used and removed, while others look for it."""
        name = f"temporary {threading.get_ident()}"
        self.mux.load(name, self.tenants[draw.choice(self.names)][0].folder)
        try:
            self.mux.prefetch([name])
        finally:
            self.mux.remove(name)
        with pytest.raises(UnknownAdapterError):
            self.mux.prefetch([name])

    def look(self, draw: random.Random) -> None:
        memory = self.mux.memory()
        held = sum(holding.bytes for holding in memory.adapters.values())
        if memory.used != held + memory.replaced or memory.used > memory.capacity:
            self.wrong.append(str(memory))
        name = draw.choice(self.names)
        self.mux.pin(name)
        self.mux.unpin(name)
        time.sleep(0.05)


def resident_mib() -> float:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 / 2**20 if statm.exists() else 0.0


def churn(folder: Path, names: int, seconds: float) -> Counter[str]:
    stage = Churn(folder, names)
    model, mux = stage.model, stage.mux
    buffers = [b.data_ptr() for path in SIZES for b in getattr(model, path).mux_pool.buffers()]
    serve = [stage.serve] * 4
    stage.run(seconds / 4, [*serve, stage.reload, stage.prefetch, stage.come_and_go, stage.look])
    warm, stage.stop = resident_mib(), threading.Event()
    stage.run(3 * seconds / 4, [*serve, *[stage.reload] * 2, stage.prefetch, stage.come_and_go])
    grown = resident_mib() - warm

    assert not stage.wrong, stage.wrong[:5]
    assert grown < 32, f"{grown:.0f} MiB more than after the first quarter"
    after = [b.data_ptr() for path in SIZES for b in getattr(model, path).mux_pool.buffers()]
    assert after == buffers
    mux.set_adapter(None)
    memory = mux.memory()
    assert list(mux.adapters) == stage.names or set(mux.adapters) == set(stage.names)
    assert memory.replaced == 0 and 0 < memory.used <= memory.capacity
    for act in ("serve", "reload", "prefetch", "come_and_go", "look"):
        assert stage.counts[act], stage.counts
    return stage.counts


def test_ten_seconds(tmp_path: Path) -> None:
    assert churn(tmp_path, 1000, 10)["rows"] > 50


@pytest.mark.slow
def test_ten_minutes(tmp_path: Path) -> None:
    assert churn(tmp_path, 5000, 600)["rows"] > 40_000
