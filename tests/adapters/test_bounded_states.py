"""Load, remove, reload, route, prefetch and pin in any order, against a dictionary in fp64."""

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import lora_mux
from lora_mux.errors import PoolCapacityError, RoutingError, UnknownAdapterError
from tenants import SIZES, Model, Row, Tenant, attached, check, tenant

ALL = "abcdefgh"
CAPACITY = 14  # rank rows of each layer; an adapter takes 0 to 8 of them in each
NAMES = st.sampled_from(ALL)
# A rank below 0: the adapter saved the layer as a whole, with values that it tells.
RANKS = st.sampled_from(
    [
        (1, 1),
        (2, 0),
        (0, 3),
        (2, 2),
        (3, 3),
        (3, 5),
        (4, 4),
        (5, 2),
        (7, 1),
        (2, -1),
        (5, -1),
        (3, -2),
    ]
)
ROWS = st.lists(
    st.one_of(
        st.none(),
        NAMES,
        st.dictionaries(NAMES, st.sampled_from([0.5, 1.0, -2.0]), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
X = torch.linspace(-1, 1, 4 * 12).reshape(4, 12)


class Tenancy(RuleBasedStateMachine):
    """What is loaded, as a dictionary; what fits, by a sum; what the model answers, in fp64."""

    steps = 0  # of all runs

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.folder = Path(tempfile.mkdtemp())
        self.model, self.mux = attached(CAPACITY)
        self.loaded: dict[str, Tenant] = {}
        self.pinned: set[str] = set()
        self.dead: list[int] = []
        self.seed = itertools.count()
        self.sticky: list[dict[str, float]] = []  # the rows of set_route

    @initialize(ranks=st.lists(RANKS, min_size=len(ALL), max_size=len(ALL)))
    def begin(self, ranks: list[tuple[int, int]]) -> None:
        """With most of them loaded, because a step that names an unknown adapter does little."""
        for name, held in zip(ALL[1:], ranks, strict=False):
            self.load(name, held, replace=False, from_tensors=False)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def make(self, ranks: tuple[int, int], plain: bool = False) -> Tenant:
        """A new tenant; of DoRA every third time, if it need not be plain."""
        seed = next(self.seed)
        held = {path: r for path, r in zip(SIZES, ranks, strict=True) if r > 0}
        saved_seed = ranks[1] + 10 if ranks[1] < 0 else None
        return tenant(self.folder / str(seed), held, seed, saved_seed, not plain and seed % 3 == 2)

    def fits(self, names: set[str]) -> bool:
        """Nothing else is in the way, because idle adapters can move or go."""
        wanted = [self.loaded[name] for name in names | self.pinned]
        taken = {path: sum(one.rows.get(path, 0) for one in wanted) for path in SIZES}
        saved = {one.saved_seed for one in wanted} - {None}
        taken["second"] += len(saved) * (min(SIZES["second"]) + 1)  # with its bias
        return all(rows <= CAPACITY for rows in taken.values())

    def conflicts(self, chosen: list[dict[str, float]]) -> bool:
        """Whether adapters in one row saved the same layer with different values."""
        rows = [{self.loaded[name].saved_seed for name in row} - {None} for row in chosen]
        return any(len(row) > 1 for row in rows)

    def rows(self, chosen: list[dict[str, float]]) -> list[Row]:
        return [[(self.loaded[name], w) for name, w in row.items()] for row in chosen]

    def routable(self, rows: list[Any]) -> list[dict[str, float]] | None:
        """The rows as name -> weight; None if a name is not loaded."""
        given = [{} if r is None else {r: 1.0} if isinstance(r, str) else r for r in rows]
        return given if all(name in self.loaded for row in given for name in row) else None

    @rule(name=NAMES, ranks=RANKS, replace=st.booleans(), from_tensors=st.booleans())
    def load(self, name: str, ranks: tuple[int, int], replace: bool, from_tensors: bool) -> None:
        if name in self.loaded and not replace:
            with pytest.raises(lora_mux.errors.AdapterError, match="already loaded"):
                self.mux.load(name, self.make(ranks).folder)
            return
        new = self.make(ranks, plain=from_tensors)
        if name not in self.loaded:
            self.loaded[name] = new
            if from_tensors and new.saved is None:
                self.mux.add_adapter(name, new.pairs, alpha=4)
            else:
                self.mux.load(name, new.folder, replace=replace)
            return
        old, before = self.mux.adapters[name], self.loaded[name]
        self.loaded[name] = new
        conflicts, self.loaded[name] = self.conflicts(self.sticky), before
        if conflicts:
            with pytest.raises(RoutingError, match="which both saved 'second'"):
                self.mux.load(name, new.folder, replace=True)
            return
        try:
            self.mux.load(name, new.folder, replace=True)
        except PoolCapacityError:  # both have to be there for a moment
            in_force = any(name in row for row in self.sticky)
            assert in_force or name in self.pinned
            assert self.mux.adapters[name] == old
        else:
            self.loaded[name] = new
            self.dead.append(old)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.loaded:
            with pytest.raises(UnknownAdapterError):
                self.mux.remove(name)
            return
        if any(name in row for row in self.sticky):
            self.route_sticky([])
        self.dead.append(self.mux.adapters[name])
        self.mux.remove(name)
        del self.loaded[name]
        self.pinned.discard(name)

    @rule(rows=ROWS)
    def route(self, rows: list[Any]) -> None:
        chosen = self.routable(rows)
        if chosen is None:
            with pytest.raises(UnknownAdapterError):
                self.mux.route(rows)
            return
        if self.conflicts(chosen):
            with pytest.raises(RoutingError):
                self.mux.route(rows)
            return
        try:
            with self.mux.route(rows):
                check(self.model, X[: len(rows)], self.rows(chosen))
        except PoolCapacityError:
            assert self.sticky or not self.fits({name for row in chosen for name in row})

    @rule(rows=ROWS, ahead=st.lists(NAMES, max_size=3), new=RANKS)
    def work_inside_a_block(self, rows: list[Any], ahead: list[str], new: tuple[int, int]) -> None:
        """Others come, go and are replaced meanwhile: the block computes what it began with."""
        chosen = self.routable(rows)
        if chosen is None or not self.fits({name for row in chosen for name in row}):
            return
        if self.conflicts(chosen):
            return
        self.route_sticky([])
        with self.mux.route(rows):
            before, x = self.rows(chosen), X[: len(rows)]
            check(self.model, x, before)
            try:
                self.mux.prefetch([name for name in ahead if name in self.loaded])
            except PoolCapacityError:
                pass
            check(self.model, x, before)
            if ahead and ahead[0] in self.loaded and ahead[0] not in self.pinned:
                self.load(ahead[0], new, replace=True, from_tensors=False)
                check(self.model, x, before)

    @rule(rows=st.lists(st.lists(NAMES, max_size=2, unique=True), min_size=1, max_size=4))
    def route_by_handles(self, rows: list[list[str]]) -> None:
        chosen = [{name: 1.0 for name in row if name in self.loaded} for row in rows]
        handles = [[self.mux.adapters[name] for name in row] for row in chosen]
        index = torch.tensor([row + [-1] * (2 - len(row)) for row in handles])
        if self.conflicts(chosen):
            with pytest.raises(RoutingError):
                self.mux.route(index)
            return
        try:
            with self.mux.route(index):
                check(self.model, X[: len(rows)], self.rows(chosen))
        except PoolCapacityError:
            assert self.sticky or not self.fits({name for row in chosen for name in row})

    @rule(rows=ROWS)
    def route_sticky(self, rows: list[Any]) -> None:
        chosen = self.routable(rows)
        if chosen is None or self.conflicts(chosen):
            return
        if not self.fits({name for row in chosen for name in row}):
            with pytest.raises(PoolCapacityError):
                self.mux.set_route(rows)
            return
        self.mux.set_route(rows)
        self.sticky = chosen

    @precondition(lambda self: self.sticky)
    @rule()
    def forward(self) -> None:
        check(self.model, X[: len(self.sticky)], self.rows(self.sticky))

    @rule(names=st.lists(NAMES, max_size=4))
    def prefetch(self, names: list[str]) -> None:
        known = {name for name in names if name in self.loaded}
        try:
            self.mux.prefetch(names)
        except UnknownAdapterError:
            assert known != set(names)
        except PoolCapacityError:
            assert self.sticky or not self.fits(known)
        else:
            assert all(self.mux.memory().adapters[name].resident for name in names)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name not in self.loaded:
            return
        try:
            self.mux.pin(name)
        except PoolCapacityError:
            assert self.sticky or not self.fits({name})
        else:
            self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if name in self.loaded:
            self.mux.unpin(name)
            self.pinned.discard(name)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_a_dead_handle(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.dead))
        assert handle not in self.mux.adapters.values()
        with pytest.raises(UnknownAdapterError, match="removed or replaced"):
            self.mux.route(torch.tensor([[handle]]))

    @invariant()
    def names_and_sums(self) -> None:
        Tenancy.steps += 1
        memory = self.mux.memory()
        assert self.mux.adapters.keys() == self.loaded.keys() == memory.adapters.keys()
        held = sum(holding.bytes for holding in memory.adapters.values())
        assert memory.used == held + memory.saved_modules + memory.replaced
        assert {n for n, holding in memory.adapters.items() if holding.pinned} == self.pinned
        for name, holding in memory.adapters.items():
            rows = sum(self.loaded[name].rows.values())
            assert holding.rank_rows == (rows if holding.resident else 0)
            assert holding.resident or not holding.pinned

    @invariant()
    def rank_rows_are_disjoint_and_free_ones_zero(self) -> None:
        for layer in (self.model.first, self.model.second):
            pool, taken = layer.mux_pool, torch.zeros(CAPACITY, dtype=torch.bool)
            for span in pool.spans.values():
                rows = slice(span.offset, span.offset + span.rows)
                assert span.rows and not taken[rows].any()
                taken[rows] = True
            assert pool.runs.free == int((~taken).sum())
            assert not pool.A_rows[~taken].any() and not pool.B_rows[~taken].any()


def run(examples: int, steps: int) -> int:
    """How many steps were made, in sequences of at most `steps`."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    before = Tenancy.steps
    run_state_machine_as_test(Tenancy, settings=settings)  # type: ignore[no-untyped-call]
    return Tenancy.steps - before


def test_a_few_hundred_steps() -> None:
    assert run(examples=30, steps=50) > 300


@pytest.mark.slow
def test_thousands_of_steps() -> None:
    assert run(examples=100, steps=400) > 2000


def test_the_oracle_can_fail() -> None:
    """Two tenants' factors exchanged behind the pool's back are noticed."""
    folder = Path(tempfile.mkdtemp())
    model, mux = attached(CAPACITY)
    a, b = (tenant(folder / n, {"first": 2, "second": 2}, i) for i, n in enumerate("ab"))
    mux.load("a", a.folder)
    mux.load("b", b.folder)
    with mux.route(["a", "b"]):
        check(model, X[:2], [[(a, 1.0)], [(b, 1.0)]])
        with pytest.raises(AssertionError):
            check(model, X[:2], [[(b, 1.0)], [(a, 1.0)]])
    shutil.rmtree(folder)
    assert isinstance(model, Model)
