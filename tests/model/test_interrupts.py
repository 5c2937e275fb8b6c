"""An interrupt at any line of any call: nothing is lost, nobody is locked out, rows are right."""

import contextlib
import copy
import gc
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import PATIENCE, Elsewhere, Interrupt, interrupted, raise_in
from torch import Tensor

import lora_mux
from lora_mux.routes import Router
from tenants import Model, Tenant, attached, tenant, truth

# Python only reports what is raised in the callback of a weak reference.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

X = torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
NAMES = ("a", "b", "c")
VERSIONS = 2  # of each tenant's adapter


class Stage:
    """A model with three tenants, in pools that hold `room` of them, or that grow.

    They may save the second layer as a whole, all of one version with equal values.
    """

    def __init__(self, folder: Path, room: int | None, saving: bool = False) -> None:
        self.room = room
        self.ranks = {"first": 4} if saving else {"first": 4, "second": 4}
        self.tenants: dict[str, list[Tenant]] = {
            name: [
                tenant(folder / f"{name}{v}", self.ranks, 10 * i + v, v if saving else None)
                for v in range(VERSIONS)
            ]
            for i, name in enumerate("abcde")
        }
        self.big = tenant(folder / "big", {"first": 8, "second": 8}, 99)
        self.elsewhere = Elsewhere()
        self.begin()
        self.want = {
            (name, v): truth(self.model, X, [[(one, 1.0)]])[0]
            for name, versions in {**self.tenants, "big": [self.big]}.items()
            for v, one in enumerate(versions)
        }
        self.base = truth(self.model, X, [[]])[0]

    def begin(self) -> None:
        """A new model of the same weights."""
        torch.manual_seed(0)
        if self.room is None:
            self.model = Model()
            self.mux = lora_mux.attach(self.model)
        else:
            self.model, self.mux = attached(4 * self.room)
        for name in NAMES:
            self.mux.load(name, self.tenants[name][0].folder)

    def answer(self) -> Tensor:
        with torch.no_grad():
            return self.model(X)[0]

    def version(self, got: Tensor, name: str) -> int:
        """Which version of a tenant's adapter gave an answer."""
        fits = [v for v in range(VERSIONS) if self._is(got, self.want.get((name, v), self.base))]
        assert fits, f"{name!r} answers for somebody else"
        return fits[0]

    @staticmethod
    def _is(got: Tensor, want: Tensor) -> bool:
        return torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)

    def check(self, sticky: str | None = None) -> None:
        """Everybody is served rightly, here and elsewhere, and all numbers add up."""
        here = self.answer()
        if sticky is None:
            assert self._is(here, self.base), "rows stay in force"
        served = self.elsewhere(self._served)
        if sticky is not None:
            assert self.version(here, sticky) == served[sticky]
        assert self._served() == served
        self.served = served

    def _served(self) -> dict[str, int]:
        mux, served = self.mux, {}
        for name in mux.adapters:
            with mux.route([name]):
                served[name] = self.version(self.answer(), name)
        with mux.route([None]):
            assert self._is(self.answer(), self.base)
        memory = mux.memory()
        assert memory.replaced == 0
        held = sum(one.bytes for one in memory.adapters.values())
        assert memory.used == held + memory.saved_modules
        self._check_pools()
        return served

    def _check_pools(self) -> None:
        slots, adapters = self.mux._slots, self.mux._adapters
        companions = slots.companions.handles
        assert len(companions) <= VERSIONS
        handles = slots.companions.beside(slots.handles.values())
        assert companions <= handles
        assert slots.tenants == handles and not adapters._nameless
        assert set(slots._loaded[slots._loaded >= 0].tolist()) == handles
        table = slots.live(torch.device("cpu"))
        live = set(table[table >= 0].tolist())
        assert live <= handles and (self.room is not None or live == handles)
        both = {slots.get("big"), *(live - companions if "second" in self.ranks else companions)}
        for path, pool in adapters._pools.items():
            here = live - companions if path == "first" else live & both
            at = {handle & 0xFFFF for handle in here}
            assert pool.spans.keys() == at and pool.moving is None
            assert set(pool.rank.nonzero().flatten().tolist()) == at
            free = torch.ones(len(pool.A_rows), dtype=torch.bool)
            for start, rows, *_ in pool.spans.values():
                assert free[start : start + rows].all()
                free[start : start + rows] = False
            assert pool.runs.free == int(free.sum()) and pool.runs.capacity == len(free)
            assert not pool.A_rows[free].any() and not pool.B_rows[free].any()


Act = Callable[[Stage], Any]


def routed(stage: Stage) -> None:
    with stage.mux.route(["a"]):
        stage.answer()
        with stage.mux.route([["a", "b"]]):
            stage.answer()


def disabled(stage: Stage) -> None:
    with stage.mux.disable_adapter():
        stage.answer()


def sticky(stage: Stage) -> None:
    stage.mux.set_adapter("b")
    stage.answer()
    stage.mux.set_adapter(None)


def replace(stage: Stage) -> None:
    """By its other version."""
    stage.mux.load("a", stage.tenants["a"][1 - stage.served["a"]].folder, replace=True)


def pinned(stage: Stage) -> None:
    stage.mux.pin("c")
    stage.mux.unpin("c")


def big(stage: Stage) -> None:
    """With b pinned in the middle, so that it has to slide."""
    for name in NAMES:
        stage.mux.prefetch([name])
    stage.mux.pin("b")
    stage.mux.load("big", stage.big.folder)
    stage.mux.prefetch(["big"])


def twin(stage: Stage) -> None:
    lora_mux.Mux.of(copy.deepcopy(stage.model)).remove("a")


def pairs(stage: Stage) -> None:
    stage.mux.add_adapter("d", stage.tenants["d"][0].pairs, scaling=1.0)


ACTS: dict[str, Act] = {
    "load": lambda stage: stage.mux.load("d", stage.tenants["d"][0].folder),
    "add_adapter": pairs,
    "load_many": lambda stage: stage.mux.load_many(
        {name: stage.tenants[name][0].folder for name in "de"}
    ),
    "replace": replace,
    "remove": lambda stage: stage.mux.remove("c"),
    "route": routed,
    "disable": disabled,
    "set_adapter": sticky,
    "with the call": lambda stage: stage.model(X, adapter_names=["b"]),
    "call": lambda stage: stage.mux.call(["b"])(stage.answer),
    "prefetch": lambda stage: [stage.mux.prefetch([name]) for name in "cba"],
    "pin": pinned,
    "big": big,
    "reserve": lambda stage: stage.mux.reserve(20, 4),
    "memory": lambda stage: stage.mux.memory(),
    "copy": twin,
}


def put_back(stage: Stage) -> None:
    """What an act has done is undone."""
    mux = stage.mux
    mux.set_adapter(None)
    for name in NAMES:
        if name not in mux.adapters:
            mux.load(name, stage.tenants[name][0].folder)
        mux.unpin(name)
    for name in set(mux.adapters) - set(NAMES):
        mux.remove(name)


@pytest.fixture(params=[None, 2, 3], ids=["all resident", "room for two", "room for three"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, request.param)
    yield made
    made.elsewhere.close()


def lines(seed: int, request: pytest.FixtureRequest) -> Iterator[int]:
    """All lines with --slow, else some of them."""
    if request.config.getoption("--slow"):
        yield from itertools.count()
    chance, line = random.Random(seed), 0
    while True:
        yield (line := line + chance.randint(1, 60))


SAVING = [("load_many", None), ("load", 4), ("replace", 4), ("remove", None), ("copy", 4)]


@pytest.mark.parametrize(("act", "room"), SAVING)
def test_at_any_line_with_saved_modules(
    act: str, room: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stage = Stage(tmp_path, room, saving=True)
    test_at_any_line(act, stage, request)
    assert not stage.mux._slots.tenants
    stage.elsewhere.close()


def test_saved_modules_follow_a_replaced_name(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stage = Stage(tmp_path, 4, saving=True)
    test_the_sticky_rows_follow_a_replaced_name(stage, request)
    stage.elsewhere.close()


@pytest.mark.parametrize("act", ACTS)
def test_at_any_line(act: str, stage: Stage, request: pytest.FixtureRequest) -> None:
    if act == "big" and stage.room == 2:
        pytest.skip("the big one needs three")
    before = set(stage.mux.adapters)
    stage.check()
    for line in lines(len(act), request):
        if not interrupted(lambda: ACTS[act](stage), line):
            break
        active = stage.mux.active_adapters if act == "set_adapter" else []
        stage.check(sticky=active[0] if active else None)
        came = set(stage.mux.adapters) - before
        assert came in (set(), {"d"}, {"d", "e"}, {"big"}), came
        assert act != "load_many" or came != {"d"}
        put_back(stage)
    put_back(stage)
    stage.check()
    for name in NAMES:
        stage.mux.remove(name)
    assert stage.mux.memory().used == 0
    stage.mux.detach()


def test_the_sticky_rows_follow_a_replaced_name(
    stage: Stage, request: pytest.FixtureRequest
) -> None:
    stage.mux.set_adapter("a")
    stage.check(sticky="a")
    for line in lines(1, request):
        if not interrupted(lambda: replace(stage), line):
            break
        stage.check(sticky="a")


def test_the_sticky_rows_follow_a_name_that_was_given_away_before_them(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between the two."""
    follow, calls = Router.replace_sticky, []

    def interrupt_first(router: Router, old: int, new: int) -> None:
        calls.append((old, new))
        if len(calls) == 1:
            raise Interrupt
        follow(router, old, new)

    monkeypatch.setattr(Router, "replace_sticky", interrupt_first)
    stage.mux.set_adapter("a")
    stage.check(sticky="a")
    old = stage.mux.adapters["a"]
    with pytest.raises(Interrupt):
        replace(stage)
    assert calls == [(old, stage.mux.adapters["a"])] * 2
    stage.check(sticky="a")


def test_detach(stage: Stage, request: pytest.FixtureRequest) -> None:
    """Its model answers as the base, and a second call goes on."""
    for line in lines(2, request):
        stage.mux.set_adapter("a")
        ended = not interrupted(stage.mux.detach, line)
        if not ended and stage.mux._router.is_detached:
            assert Stage._is(stage.answer(), stage.base)
        mux = None if ended else lora_mux.model.top.mux_of(stage.model)
        if mux is not None:
            mux.detach()
        assert not any(isinstance(m, lora_mux.MuxLinear) for m in stage.model.modules())
        assert not stage.model._forward_hooks and not stage.model._forward_pre_hooks
        assert Stage._is(stage.answer(), stage.base)
        stage.begin()
        if ended:
            break


def test_hooks_are_taken_off(stage: Stage) -> None:
    """Each whole or not at all: one without its mark would be called with too few arguments."""
    for line in itertools.count():
        take_off = partial(lora_mux.model.top.remove_hooks, stage.model, stage.mux)
        ended = not interrupted(take_off, line)
        assert Stage._is(stage.answer(), stage.base)
        stage.begin()
        if ended:
            break


def test_attach(request: pytest.FixtureRequest) -> None:
    """All or nothing: the model is attached, or as it was."""
    model = Model()
    want = model(X)
    for memory in (None, "64KiB"):
        attach = partial(lora_mux.attach, model, memory=memory)
        for line in lines(3, request):
            ended = not interrupted(attach, line)
            if lora_mux.model.top.mux_of(model) is not None:
                lora_mux.detach(model)
            assert not ended or lora_mux.model.top.mux_of(model) is None
            assert torch.equal(model(X), want)
            assert not any(name.startswith("mux_") for m in model.modules() for name in vars(m))
            assert not any("mux_pool" in m._modules for m in model.modules())
            if ended:
                break


def test_a_stand_alone_layer(request: pytest.FixtureRequest) -> None:
    layer = lora_mux.MuxLinear(torch.nn.Linear(6, 5))
    A, B, x = torch.randn(3, 6), torch.randn(5, 3), torch.randn(2, 6)

    def change() -> None:
        layer.add_adapter("b", 2 * A, B, scaling=1.0)
        layer.remove_adapter("b")

    for line in lines(4, request):
        ended = not interrupted(change, line)
        if "b" in layer.adapters:
            layer.remove_adapter("b")
        handle = layer.add_adapter("a", A, B, scaling=1.0)
        index = torch.tensor([[handle], [-1]])
        want = layer(x) + torch.stack([B @ (A @ x[0]), torch.zeros(5)])
        assert torch.allclose(layer(x, lora_mux.Routing(index)), want, atol=1e-5)
        layer.remove_adapter("a")
        assert not layer.mux_pool.spans and layer.mux_pool.runs.free == len(layer.mux_pool.A_rows)
        assert not layer.mux_pool.A_rows.any() and not layer.mux_slots.tenants
        if ended:
            break


def test_a_signal_handler_in_the_middle(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, because the change below it goes on. The change itself may be its victim."""
    allot, refused = lora_mux.core.Slots.allot, []

    def interrupted_by_a_handler(slots: lora_mux.core.Slots) -> int:
        handle = allot(slots)
        for act in (lambda: stage.mux.remove("a"), stage.mux.memory, lambda: routed(stage)):
            with pytest.raises(lora_mux.errors.RoutingBusyError, match="signal handler"):
                act()
            refused.append(act)
        return handle

    monkeypatch.setattr(lora_mux.core.Slots, "allot", interrupted_by_a_handler)
    stage.mux.load("d", stage.tenants["d"][0].folder)
    assert len(refused) == 3
    stage.check()
    assert list(stage.mux.adapters) == [*NAMES, "d"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_at_any_moment(stage: Stage, request: pytest.FixtureRequest) -> None:
    """Also in the standard library and in torch: the error comes from another thread."""

    def act_and_forget(act: Act) -> None:
        # pytest keeps what ends a thread, and with it a block that is left when that is dropped.
        with contextlib.suppress(Interrupt):
            act(stage)

    chance = random.Random(7)
    acts = [name for name in ACTS if name != "big" or stage.room == 3]
    ended = 0
    stage.check()
    for _ in range(1000 if request.config.getoption("--slow") else 25):
        act = ACTS[chance.choice(acts)]
        thread = threading.Thread(target=act_and_forget, args=[act])
        thread.start()
        time.sleep(chance.uniform(0, 0.01))
        raise_in(thread, Interrupt)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        gc.collect()  # tracebacks hold what was interrupted
        active = stage.mux.active_adapters
        stage.check(sticky=active[0] if active else None)
        ended += set(stage.mux.adapters) == set(NAMES)
        put_back(stage)
    assert ended
