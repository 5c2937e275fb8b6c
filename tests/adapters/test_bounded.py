"""Bounded pools: which adapters come in and when, which make room, and which never move."""

import copy
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_mux
from lora_mux.adapters import bounded
from lora_mux.adapters.memory import MemoryReport, PoolMemory
from lora_mux.errors import (
    CheckpointError,
    PoolCapacityError,
    RoutingError,
    UnknownAdapterError,
)
from tenants import WEIGHTS, Model, Tenant, attached, check, tenant

X = torch.linspace(-1, 1, 3 * 12).reshape(3, 12)


class Stage:
    """Tenants a, b, c, ... of these ranks in both layers, loaded into pools of `rank_rows`."""

    def __init__(self, folder: Path, rank_rows: int, ranks: dict[str, int]) -> None:
        self.folder = folder
        self.model, self.mux = attached(rank_rows)
        self.tenants: dict[str, Tenant] = {}
        for name, rank in ranks.items():
            self.make(name, rank)
            self.mux.load(name, self.tenants[name].folder)

    def make(self, name: str, rank: int, version: int = 0) -> Tenant:
        ranks = {"first": rank, "second": rank}
        seed = 100 * version + ord(name[0])
        self.tenants[name] = tenant(self.folder / f"{name}{version}", ranks, seed)
        return self.tenants[name]

    @property
    def resident(self) -> set[str]:
        return {n for n, held in self.mux.memory().adapters.items() if held.resident}

    def check(self, *names: str) -> None:
        """The model answers for these names, one for each row."""
        check(self.model, X[: len(names)], [[(self.tenants[n], 1.0)] for n in names])

    def route(self, *names: str) -> None:
        with self.mux.route(list(names)):
            self.check(*names)

    def state(self) -> list[Any]:
        pools = [self.model.first.mux_pool, self.model.second.mux_pool]
        return [
            dict(self.mux.adapters),
            self.mux.active_adapters,
            self.mux.memory(),
            [p.spans.copy() for p in pools],
            *(b.clone() for p in pools for b in p.buffers()),
        ]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Eight rank rows: two of a, b, c, d, or e alone."""
    return Stage(tmp_path, 8, {"a": 4, "b": 4, "c": 4, "d": 3, "e": 7})


class TestSizes:
    @pytest.mark.parametrize(
        ("memory", "kind"),
        [
            (2.5, TypeError),
            (True, TypeError),
            ("2 gigs", ValueError),
            ("-1GiB", ValueError),
            ("iB", ValueError),
            (0, ValueError),
            (-3, ValueError),
            ("257 B", RuntimeError),
        ],
        ids=str,
    )
    def test_refused(self, memory: Any, kind: type[Exception]) -> None:
        model = Model()
        with pytest.raises(lora_mux.LoraMuxError, match="`memory`") as caught:
            lora_mux.attach(model, memory=memory)
        assert isinstance(caught.value, kind)
        assert type(model.first) is nn.Linear
        lora_mux.attach(model)

    def test_every_target_gets_the_same_rank_rows_and_no_byte_too_many(self) -> None:
        model = Model().to(torch.bfloat16)
        memory = lora_mux.attach(model, memory="10KiB").memory()
        assert {pool.capacity for pool in memory.targets.values()} == {10240 // (2 * 65)}
        assert memory.capacity <= 10240 and memory.used == 0
        assert all(b.shape[0] in (0, 78) for b in model.first.mux_pool.buffers())

    def test_sums_are_exact(self, stage: Stage) -> None:
        stage.mux.load("half", tenant(stage.folder / "half", {"second": 2}, 1).folder)
        stage.mux.prefetch(["half", "d"])
        memory = stage.mux.memory()
        assert memory.adapters["half"].rank_rows == 2 and memory.adapters["d"].rank_rows == 6
        assert memory.used == sum(held.bytes for held in memory.adapters.values())
        assert memory.used + memory.free == memory.capacity == 8 * 2 * 129
        assert [pool.free for pool in memory.targets.values()] == [5, 3]
        assert [pool.largest_free_run for pool in memory.targets.values()] == [5, 3]
        assert "2 of 6 adapters" in str(memory)

    @pytest.mark.parametrize(
        ("rank_rows", "words"),
        [(7, "896 bytes"), (12, "1.5 KiB"), (1 << 20, "128 MiB"), (3 << 23, "3 GiB")],
    )
    def test_a_report_has_short_numbers(self, rank_rows: int, words: str) -> None:
        pool = PoolMemory(rank_rows, used=0, largest_free_run=5, row_bytes=128)
        report = str(MemoryReport({"q": pool}, {}, 0))
        assert report.startswith(f"0 bytes of {words} used by 0 of 0 adapters; 5 consecutive")

    def test_without_memory_all_is_resident(self) -> None:
        mux = lora_mux.attach(Model())
        mux.add_adapter("a", {"first": (torch.ones(2, 12), torch.ones(10, 2))}, alpha=1)
        mux.prefetch(["a"])
        mux.pin("a")
        memory = mux.memory()
        assert memory.adapters["a"].resident and memory.used == memory.adapters["a"].bytes == 258
        for act in (mux.pin, mux.unpin, lambda name: mux.prefetch([name])):
            with pytest.raises(UnknownAdapterError, match="'b'"):
                act("b")


class TestComingIn:
    def test_loading_reads_no_values(self, stage: Stage) -> None:
        assert not stage.resident
        assert not any(bool(b.any()) for b in stage.model.first.mux_pool.buffers())

    def test_a_route_brings_in_what_it_names(self, stage: Stage) -> None:
        stage.route("a", "d", "a")
        assert stage.resident == {"a", "d"}

    def test_as_without_a_bound(self, stage: Stage) -> None:
        """Bit for bit: the same factors in the same dtype, wherever they come to lie."""
        plain = Model()
        plain.load_state_dict(stage.model.state_dict())
        other = lora_mux.attach(plain)
        for name, who in stage.tenants.items():
            other.load(name, who.folder)
        rows = [("a", "d"), None, {"a": -0.5}]
        with stage.mux.route(rows), other.route(rows):
            assert torch.equal(stage.model(X), plain(X))

    def test_tensors_are_kept_too(self, stage: Stage) -> None:
        who = stage.make("t", 4)
        pairs = {path: (A.clone(), B.clone()) for path, (A, B) in who.pairs.items()}
        stage.mux.add_adapter("t", pairs, alpha=4)
        for A, B in pairs.values():  # they are the caller's, to do with as it likes
            A.zero_(), B.zero_()
        stage.route("t")
        stage.route("e")
        assert "t" not in stage.resident
        stage.route("t")

    def test_the_least_recently_routed_makes_room(self, stage: Stage) -> None:
        stage.route("a")
        stage.route("b")
        stage.route("a")
        stage.route("c")
        assert stage.resident == {"a", "c"}
        stage.mux.prefetch(["c"])
        stage.route("b")
        assert stage.resident == {"c", "b"}

    def test_what_is_asked_for_does_not_make_room(self, stage: Stage) -> None:
        stage.route("a")
        stage.route("b")
        stage.route("a", "c")
        assert stage.resident == {"a", "c"}

    def test_only_who_holds_rows_there_makes_room(self, stage: Stage) -> None:
        """Neither of the others frees a row of the layer that is full."""
        for name, layer in (("first", "first"), ("second", "second")):
            stage.tenants[name] = tenant(stage.folder / name, {layer: 8}, 7)
            stage.mux.load(name, stage.tenants[name].folder)
        stage.mux.prefetch(["first", "second"])
        stage.tenants["small"] = tenant(stage.folder / "small", {"second": 1}, 8)
        stage.mux.load("small", stage.tenants["small"].folder)
        stage.route("small")
        assert stage.resident == {"first", "small"}

    def test_handles_outlive_an_absence(self, stage: Stage) -> None:
        handles = dict(stage.mux.adapters)
        index = torch.tensor([[handles["a"]], [-1], [handles["d"]]])
        for _ in range(3):
            stage.route("e")
            with stage.mux.route(index):
                check(stage.model, X, [[(stage.tenants["a"], 1)], [], [(stage.tenants["d"], 1)]])
        assert stage.mux.adapters == handles

    @pytest.mark.parametrize("how", ["set_adapter", "set_route", "route_tokens"])
    def test_other_ways_to_route(self, stage: Stage, how: str) -> None:
        for names in (["a", "b"], ["c", "d"], ["e", "e"]):
            if how == "route_tokens":
                with stage.mux.route_tokens(names, lengths=[1, 2]):
                    stage.check(names[0], names[1], names[1])
            elif how == "set_route":
                stage.mux.set_route(names)
                stage.check(*names)
            else:
                stage.mux.set_adapter(names[0])
                stage.check(names[0], names[0])

    def test_a_handle_that_is_away_is_refused_by_a_layer(self, stage: Stage) -> None:
        """Handed to it past all routes, which would bring it in."""
        handle = stage.mux.adapters["a"]
        stage.mux.prefetch(["b", "c"])
        with pytest.raises(UnknownAdapterError, match=rf"{handle}, whose adapter made room"):
            stage.model.first(X[:1], lora_mux.Routing(torch.tensor([[handle]])))

    def test_half_precision(self, tmp_path: Path) -> None:
        model = Model().to(torch.bfloat16)
        mux = lora_mux.attach(model, memory="2KiB")
        plain = Model().to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        other = lora_mux.attach(plain)
        folder = tenant(tmp_path, {"first": 3, "second": 5}, 1).folder
        for m in (mux, other):
            m.load("a", folder)
        with mux.route(["a"] * 3), other.route(["a"] * 3):
            assert torch.equal(model(X.bfloat16()), plain(X.bfloat16()))

    def test_a_bias_is_a_rank_row(self, tmp_path: Path) -> None:
        folder = tenant(tmp_path, {"first": 7}, 1).folder
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
        tensors = load_file(folder / WEIGHTS)
        tensors["base_model.model.first.lora_B.bias"] = torch.randn(10)
        save_file(tensors, folder / WEIGHTS)
        model, mux = attached(8)
        other = lora_mux.attach(plain := Model())
        plain.load_state_dict(model.state_dict())
        mux.load("a", folder)
        other.load("a", folder)
        with mux.route(["a"] * 3), other.route(["a"] * 3):
            assert torch.equal(model(X), plain(X))
        with pytest.raises(PoolCapacityError, match="pool of 7 rank rows, got 8"):
            attached(7)[1].load("a", folder)

    def test_a_model_that_is_materialised_later(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = Model()
        mux = lora_mux.attach(model, memory=8 * 258)
        model.to_empty(device="cpu")
        model.load_state_dict(Model().state_dict())
        who = tenant(tmp_path, {"first": 4, "second": 4}, 1)
        mux.load("a", who.folder)
        with mux.route(["a"] * 3):
            check(model, X, [[(who, 1.0)]] * 3)
        assert mux.memory().capacity == 8 * 258

    @pytest.mark.interpreter
    def test_on_the_operators_path(self, tmp_path: Path) -> None:
        """Triton's, where a handle that is absent is NaN, and check() raises."""
        layer = nn.Sequential(nn.Linear(*((12, 10))))
        mux = lora_mux.attach(layer, memory=4 * 129, backend="triton")
        for i, name in enumerate("ab"):
            pair = (torch.full((4, 12), 1.0 + i), torch.ones(10, 4))
            mux.add_adapter(name, {"0": pair}, alpha=4)
        mux.prefetch(["a"])
        a, b = mux.adapters.values()
        routing = lora_mux.Routing(torch.tensor([[a], [b], [-1]]))
        with torch.no_grad():
            y = layer[0](X, routing)
            assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
            with pytest.raises(UnknownAdapterError, match="rows did not"):
                routing.check()
            mux.prefetch(["b"])
            assert layer[0](X, routing)[0].isnan().all()
            torch.testing.assert_close(layer[0](X, routing)[1], layer[0](X)[1] + 4 * 2 * X[1].sum())


class TestStaying:
    """The adapters of a live route are neither evicted nor moved."""

    def test_inside_a_block(self, stage: Stage) -> None:
        with stage.mux.route(["a", "b"]):
            before = stage.state()
            for act in (lambda: stage.mux.prefetch(["c"]), lambda: stage.mux.pin("d")):
                with pytest.raises(PoolCapacityError, match=r"must hold \d more rank rows"):
                    act()
            with pytest.raises(PoolCapacityError), stage.mux.route(["c"]):
                pass
            assert_same(before, stage.state())
            stage.check("a", "b")
        stage.route("c")

    def test_inside_a_nested_block_and_a_disabled_one(self, stage: Stage) -> None:
        with stage.mux.route(["a"]):
            with stage.mux.route(["b"]), pytest.raises(PoolCapacityError):
                stage.mux.prefetch(["c"])
            with stage.mux.disable_adapter():
                stage.mux.prefetch(["c"])  # b could go
                assert stage.resident == {"a", "c"}
            stage.check("a")

    def test_what_a_sticky_route_leaves_can_go(self, stage: Stage) -> None:
        stage.mux.set_route(["a", "b"])
        with pytest.raises(PoolCapacityError):
            stage.mux.prefetch(["e"])
        stage.mux.set_route(["e"])
        stage.check("e")
        assert stage.resident == {"e"}

    def test_a_sticky_route_comes_back_after_a_block(self, stage: Stage) -> None:
        stage.mux.set_adapter("a")
        stage.route("b")
        with pytest.raises(PoolCapacityError), stage.mux.route(["e"]):
            pass
        stage.check("a", "a")

    def test_until_the_backward_is_done(self, stage: Stage) -> None:
        x = X.clone().requires_grad_()
        with stage.mux.route(["a", "b", "a"]):
            y = stage.model(x)
        with pytest.raises(PoolCapacityError):
            stage.mux.prefetch(["c"])
        y.sum().backward()
        del y
        stage.mux.prefetch(["c"])

    def test_a_route_that_only_the_device_knows(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may name whatever is resident."""
        stage.mux.prefetch(["a", "b"])
        monkeypatch.setattr("lora_mux.routes.route.host_may_read", lambda tensor: False)
        with stage.mux.route(torch.tensor([[stage.mux.adapters["a"]]])):
            with pytest.raises(PoolCapacityError):
                stage.mux.prefetch(["c"])
        stage.mux.prefetch(["c"])

    def test_pinned(self, stage: Stage) -> None:
        stage.mux.pin("a")
        for names in (["b"], ["c"], ["d"]):
            stage.route(*names)
        assert stage.mux.memory().adapters["a"].pinned and "a" in stage.resident
        with pytest.raises(PoolCapacityError):
            stage.mux.prefetch(["e"])
        stage.mux.unpin("a")
        stage.route("e")
        assert stage.resident == {"e"}

    def test_buffers_stay_where_they_are(self, stage: Stage) -> None:
        stage.mux.reserve(adapters=32, rank=8)
        buffers = [b for p in (stage.model.first, stage.model.second) for b in p.mux_pool.buffers()]
        where = [b.data_ptr() for b in buffers]
        for i in range(20):
            who = stage.make(chr(ord("f") + i), 1 + i % 7)
            stage.mux.load(chr(ord("f") + i), who.folder)
            stage.route(chr(ord("f") + i))
        again = [b for p in (stage.model.first, stage.model.second) for b in p.mux_pool.buffers()]
        assert [b.data_ptr() for b in again] == where

    def test_a_captured_graph_limits_what_can_be_loaded(self, stage: Stage) -> None:
        stage.mux.reserve(adapters=8, rank=7)
        stage.mux._slots.captured = True
        for name in "fgh":
            stage.mux.load(name, stage.make(name, 7).folder)
            stage.route(name)
        before = stage.state()
        for name, rank in (("i", 1), ("j", 8)):
            with pytest.raises(PoolCapacityError, match="captured CUDA graph"):
                stage.mux.load(name, stage.make(name, rank).folder)
        assert_same(before, stage.state())


class TestFragments:
    def test_free_rows_that_are_no_run_are_brought_together(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, 12, {"a": 3, "b": 3, "c": 3, "d": 3, "e": 6})
        stage.mux.prefetch(["a", "b", "c", "d"])
        for name in ("b", "d"):
            stage.mux.pin(name)
        stage.route("e")  # a and c go, which lie apart; b moves
        assert stage.resident == {"b", "d", "e"}
        stage.route("b", "d", "e")
        spans = {s: (v.offset, v.rows) for s, v in stage.model.first.mux_pool.spans.items()}
        assert sorted(spans.values()) == [(0, 3), (3, 6), (9, 3)]

    def test_room_is_made_in_steps(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between which others may pass: here, one adapter of two pools goes in each."""
        stage.mux.prefetch(["a", "b"])
        monkeypatch.setattr(bounded, "SPANS_AT_ONCE", 2)
        seen: list[set[str]] = []
        passing = SimpleNamespace(sleep=lambda seconds: seen.append(stage.resident))
        monkeypatch.setattr(bounded, "time", passing)
        stage.route("e")
        assert seen == [{"a", "b"}, {"b"}] and stage.resident == {"e"}  # read, and made room

    def test_room_is_made_by_evicting_before_moving(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, 12, {"a": 3, "b": 3, "c": 3, "d": 3, "e": 6})
        stage.mux.prefetch(["a", "b", "c", "d"])
        for name in ("b", "d"):
            stage.route(name)
        before = dict(stage.model.first.mux_pool.spans)
        stage.route("e")  # a and b go, though c was used before b: it lies apart from a
        assert stage.resident == {"c", "d", "e"}
        after = stage.model.first.mux_pool.spans
        assert all(after[slot] == before[slot] for slot in after.keys() & before.keys())

    def test_what_is_in_use_is_no_more_moved_than_evicted(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, 12, {"a": 3, "b": 3, "c": 3, "d": 3, "e": 6})
        stage.mux.prefetch(["a", "b", "c", "d"])
        with stage.mux.route(["b", "d"]):
            before = stage.state()
            with pytest.raises(PoolCapacityError, match="6 can be freed"):
                stage.mux.prefetch(["e"])
            assert_same(before, stage.state())
        stage.mux.prefetch(["e"])

    def test_rows_left_behind_hold_nothing(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, 12, {"a": 5, "b": 6, "c": 3})
        stage.route("a")
        stage.route("b")
        stage.route("c")  # evicts a, fits in its place
        stage.mux.remove("c")
        pool = stage.model.first.mux_pool
        assert not pool.A_rows[:5].any() and not pool.B_rows[:5].any()
        stage.mux.load("d", stage.make("d", 6).folder)
        stage.route("d", "b")  # b slides from 5 to 0
        assert sorted((s.offset, s.rows) for s in pool.spans.values()) == [(0, 6), (6, 6)]

    def test_rows_that_were_slid_from_hold_nothing(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, 12, {"a": 3, "b": 3, "c": 3, "d": 3, "e": 4})
        stage.mux.prefetch(["a", "b", "c", "d"])
        stage.mux.pin("b")
        stage.mux.pin("d")
        stage.route("e")  # a and c go; b slides from 3 to 0
        for layer in (stage.model.first, stage.model.second):
            pool = layer.mux_pool
            assert pool.runs.free == 2
            assert not pool.A_rows[7:9].any() and not pool.B_rows[7:9].any()
        stage.route("b", "d", "e")


class TestBadFiles:
    """A file is read when it is needed. By then it may be gone, or be another one."""

    def refuse(self, stage: Stage, match: str) -> None:
        stage.mux.prefetch(["b", "c"])
        stage.mux.set_adapter("b")
        before = stage.state()
        acts: list[Callable[[], Any]] = [
            lambda: stage.mux.prefetch(["a"]),
            lambda: stage.mux.pin("a"),
            lambda: stage.mux.set_adapter("a"),
            lambda: stage.mux.set_route(["b", "a"]),
            lambda: stage.mux.route(["a"]).__enter__(),
        ]
        for act in acts:
            with pytest.raises(CheckpointError, match=match):
                act()
            assert_same(before, stage.state())
        stage.mux.set_adapter(None)
        stage.route("b")

    def test_not_finite(self, stage: Stage) -> None:
        who = stage.make("a", 4, version=1)
        tensors = load_file(who.folder / WEIGHTS)
        tensors["base_model.model.second.lora_B.weight"][0, 0] = float("nan")
        save_file(tensors, who.folder / WEIGHTS)
        stage.mux.load("a", who.folder, replace=True)
        self.refuse(stage, r"second\.lora_B\.weight.*finite")

    def test_not_finite_in_the_pool_s_dtype(self, tmp_path: Path) -> None:
        mux = lora_mux.attach(Model().half(), memory="4KiB")
        who = tenant(tmp_path, {"first": 2}, 1)
        tensors = {key: t * 1e6 for key, t in load_file(who.folder / WEIGHTS).items()}
        save_file(tensors, who.folder / WEIGHTS)
        mux.load("a", who.folder)
        with pytest.raises(lora_mux.errors.AdapterError, match="finite in the pool's torch.float1"):
            mux.prefetch(["a"])

    def test_gone(self, stage: Stage) -> None:
        (stage.tenants["a"].folder / WEIGHTS).unlink()
        self.refuse(stage, f"must hold {WEIGHTS}")

    def test_another_file(self, stage: Stage) -> None:
        tenant(stage.tenants["a"].folder, {"first": 4, "second": 4}, 99)
        self.refuse(stage, "must be the file that was loaded")
        stage.mux.load("a", stage.tenants["a"].folder, replace=True)
        stage.mux.prefetch(["a"])

    def test_truncated(self, stage: Stage) -> None:
        file = stage.tenants["a"].folder / WEIGHTS
        file.write_bytes(file.read_bytes()[:-4])
        self.refuse(stage, "must be the file that was loaded")


class TestReplacing:
    def test_the_name_means_the_new_one(self, stage: Stage) -> None:
        old = stage.mux.adapters["a"]
        stage.route("a")
        new = stage.mux.load("a", stage.make("a", 5, version=1).folder, replace=True)
        assert stage.mux.adapters["a"] == new != old
        stage.route("a")
        with pytest.raises(UnknownAdapterError, match="replaced"):
            stage.mux.route(torch.tensor([[old]]))
        assert stage.mux.memory().replaced == 0

    def test_a_new_name_is_loaded(self, stage: Stage) -> None:
        stage.mux.load("f", stage.make("f", 2).folder, replace=True)
        stage.route("f")

    def test_a_block_keeps_what_it_began_with(self, stage: Stage) -> None:
        with stage.mux.route(["a"]):
            want = stage.model(X[:1]).detach()
            old = stage.tenants["a"]
            stage.mux.load("a", stage.make("a", 4, version=1).folder, replace=True)
            assert torch.equal(stage.model(X[:1]), want)
            check(stage.model, X[:1], [[(old, 1.0)]])
            assert stage.mux.active_adapters == ["a"]
            assert stage.mux.memory().replaced == 8 * 129
            with stage.mux.route(["a"]):
                stage.check("a")
            assert torch.equal(stage.model(X[:1]), want)
        stage.route("a")
        assert stage.mux.memory().replaced == 0

    @pytest.mark.parametrize("bounded", [True, False])
    @pytest.mark.parametrize("how", ["set_adapter", "set_route"])
    def test_a_sticky_route_follows(self, tmp_path: Path, bounded: bool, how: str) -> None:
        stage = Stage(tmp_path, 8, {})
        if not bounded:
            stage.mux.detach()
            stage.mux = lora_mux.attach(stage.model)
        stage.mux.load("a", stage.make("a", 4).folder)
        stage.mux.set_adapter("a") if how == "set_adapter" else stage.mux.set_route(["a", "a"])
        stage.check("a", "a")
        for version in (1, 2):
            stage.mux.load("a", stage.make("a", 4, version).folder, replace=True)
            stage.check("a", "a")
        assert stage.mux.active_adapters == ["a"] and stage.mux.memory().replaced == 0
        with stage.mux.disable_adapter():  # also when it comes back after a block
            stage.mux.load("a", stage.make("a", 3, 3).folder, replace=True)
        stage.check("a", "a")
        for version in (4, 5):  # and when there was no forward pass in between
            stage.mux.load("a", stage.make("a", 2, version).folder, replace=True)
        stage.check("a", "a")

    def test_a_route_of_handles_does_not_follow(self, stage: Stage) -> None:
        stage.mux.set_route(torch.tensor([[stage.mux.adapters["a"]]]))
        old = stage.tenants["a"]
        stage.mux.load("a", stage.make("a", 4, version=1).folder, replace=True)
        check(stage.model, X[:1], [[(old, 1.0)]])

    def test_what_only_the_route_that_ends_has_used_goes_with_it(self, stage: Stage) -> None:
        """Its handle has no name any more, and its rank rows are needed."""
        self.test_a_route_of_handles_does_not_follow(stage)
        assert stage.mux.memory().replaced > 0
        stage.mux.set_adapter("e")
        assert stage.mux.memory().replaced == 0 and stage.resident == {"e"}
        stage.check("e", "e", "e")

    def test_a_route_of_handles_that_are_gone(self, stage: Stage) -> None:
        block = stage.mux.route(torch.tensor([[stage.mux.adapters["a"]]]))
        stage.mux.remove("a")
        with pytest.raises(UnknownAdapterError, match="was removed or replaced"), block:
            pass

    def test_no_room_beside_the_one_in_use(self, stage: Stage) -> None:
        stage.mux.set_adapter("e")
        before, want = stage.state(), stage.model(X)
        with pytest.raises(PoolCapacityError):
            stage.mux.load("e", stage.make("e", 7, version=1).folder, replace=True)
        assert_same(before, stage.state())
        assert torch.equal(stage.model(X), want)
        assert stage.mux.load("new", stage.tenants["d"].folder) & 0xFFFF == 5  # no slot was lost

    def test_a_pin_stays_with_the_name(self, stage: Stage) -> None:
        stage.mux.pin("a")
        stage.mux.load("a", stage.make("a", 4, version=1).folder, replace=True)
        assert stage.mux.memory().adapters["a"].pinned
        stage.route("b")
        assert stage.resident == {"a", "b"}

    @pytest.mark.parametrize("act", ["replace", "remove"])
    @pytest.mark.parametrize("bounded", [True, False])
    def test_a_forward_in_progress_has_one_in_all_layers(
        self, tmp_path: Path, act: str, bounded: bool
    ) -> None:
        stage = Stage(tmp_path, 8, {})
        if not bounded:
            stage.mux.detach()
            stage.mux = lora_mux.attach(stage.model)
        stage.mux.load("a", stage.make("a", 4).folder)
        stage.mux.set_adapter("a")
        old = stage.tenants["a"]

        def between_layers(*arguments: Any) -> None:
            if act == "remove":
                stage.mux.remove("a")
            else:
                stage.mux.load("a", stage.make("a", 4, version=1).folder, replace=True)

        hook = stage.model.second.register_forward_pre_hook(
            lambda *a: run_in_thread(between_layers)
        )
        check(stage.model, X, [[(old, 1.0)]] * 3)
        hook.remove()
        if act == "replace":
            stage.check("a", "a", "a")
        else:
            with pytest.raises(UnknownAdapterError, match="removed"):
                stage.model(X)
        stage.mux.set_adapter(None)
        assert stage.mux.memory().replaced == 0


def run_in_thread(act: Callable[[], object]) -> None:
    """Run `act` in a thread, and raise its error here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class TestThreads:
    """A pass has what it began with, whatever other threads do meanwhile."""

    @pytest.mark.parametrize("how", ["forward", "set_adapter", "set_route", "route", "disable"])
    def test_during_a_forward_pass(self, stage: Stage, how: str) -> None:
        stage.mux.set_adapter("a")
        b = stage.tenants["b"]

        def inside(block: Any, rows: list[Any]) -> None:
            with block:
                check(stage.model, X[:1], rows)

        acts: dict[str, Callable[[], Any]] = {
            "forward": lambda: stage.check("a", "a", "a"),
            "set_adapter": lambda: stage.mux.set_adapter("b"),
            "set_route": lambda: stage.mux.set_route(["b"]),
            "route": lambda: inside(stage.mux.route(["b"]), [[(b, 1.0)]]),
            "disable": lambda: inside(stage.mux.disable_adapter(), [[]]),
        }

        def between_layers(*arguments: Any) -> None:
            hook.remove()
            run_in_thread(acts[how])

        hook = stage.model.second.register_forward_pre_hook(between_layers)
        stage.check("a", "a", "a")
        if how.startswith("set"):
            check(stage.model, X[:1], [[(b, 1.0)]])
        else:
            stage.check("a")

    @pytest.mark.parametrize("how", ["set_adapter", "route"])
    def test_a_pass_in_progress_keeps_its_adapters_where_they_are(
        self, stage: Stage, how: str
    ) -> None:
        """There is no room for what another thread wants beside them."""
        stage.mux.set_adapter("a")

        def between_layers(*arguments: Any) -> None:
            hook.remove()
            with pytest.raises(PoolCapacityError):
                if how == "route":
                    run_in_thread(stage.mux.route(["e"]).__enter__)
                else:
                    run_in_thread(lambda: stage.mux.set_adapter("e"))

        hook = stage.model.second.register_forward_pre_hook(between_layers)
        stage.check("a", "a", "a")
        stage.mux.set_adapter("e")  # afterwards there is

    def test_a_pass_that_is_refused_leaves_the_others_alone(self) -> None:
        """It must not forget their batch, by which flattened rows find their samples."""

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(12, 12)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x.reshape(-1, 12)).reshape(x.shape)  # type: ignore[no-any-return]

        model, x = Flat(), torch.randn(3, 5, 12)
        mux = lora_mux.attach(model)
        mux.add_adapter("a", {"layer": (torch.ones(2, 12), torch.ones(12, 2))}, alpha=2)

        def refused(*arguments: Any) -> None:
            hook.remove()
            for run in (run_in_thread, lambda act: act()):
                with pytest.raises(RoutingError):
                    run(lambda: model(x[:2], adapter_names=["a"]))
                with pytest.raises(UnknownAdapterError):
                    run(lambda: model(x[:2], adapter_names=["b"] * 2))

        with torch.no_grad(), mux.route(["a", None, "a"]):
            want = model(x)
            hook = model.layer.register_forward_pre_hook(refused)
            assert torch.equal(model(x), want)

    def test_loading_and_prefetching_during_a_forward_pass(self, stage: Stage) -> None:
        stage.mux.set_adapter("a")

        def work() -> None:
            stage.mux.load("f", stage.make("f", 4).folder)
            stage.mux.prefetch(["f"])
            stage.mux.prefetch(["b"])
            stage.mux.remove("f")

        stage.model.second.register_forward_pre_hook(lambda *a: run_in_thread(work))
        stage.check("a", "a", "a")
        assert stage.resident == {"a", "b"}

    def test_a_forward_that_raised_is_over(self, stage: Stage) -> None:
        stage.mux.set_adapter("a")
        with pytest.raises(lora_mux.LoraMuxError):
            stage.model(X[:, :5])
        run_in_thread(lambda: stage.check("a"))

    def test_a_name_that_changed_before_the_block_began(self, stage: Stage) -> None:
        block = stage.mux.route(["a"])
        stage.mux.load("a", stage.make("a", 4, version=1).folder, replace=True)
        with block:
            stage.check("a")
        block = stage.mux.route(["b"])
        stage.mux.remove("b")
        with pytest.raises(UnknownAdapterError, match="'b'"), block:
            pass


class TestManyAtOnce:
    def test_all(self, tmp_path: Path, capsys: Any) -> None:
        stage = Stage(tmp_path, 8, {})
        folders = {name: stage.make(name, 2).folder for name in "abc"}
        assert stage.mux.load_many(folders) == stage.mux.adapters == {"a": 0, "b": 1, "c": 2}
        stage.route("a", "b", "c")
        assert capsys.readouterr() == ("", "")

    def test_none(self, stage: Stage, tmp_path: Path) -> None:
        before = stage.state()
        good, bad = stage.make("f", 2).folder, tmp_path / "nowhere"
        for folders, match in (({"f": good, "g": bad}, "nowhere"), ({"g": good, "a": good}, "'a'")):
            with pytest.raises(lora_mux.LoraMuxError, match=match):
                stage.mux.load_many(folders)
            assert_same(before, stage.state())
        with pytest.raises(TypeError, match="`folders`"):
            stage.mux.load_many([good])  # type: ignore[arg-type]

    def test_routes_afterwards_do_not_look_through_all_of_them(self, stage: Stage) -> None:
        folder = stage.tenants["a"].folder
        stage.mux.load_many({f"a{i}": folder for i in range(100)})
        # A set from which elements go keeps their room, and a look at it takes as long as before.
        assert sys.getsizeof(stage.mux._adapters._nameless) == sys.getsizeof(set())

    def test_a_bar_on_a_terminal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("FORCE_COLOR", "1")
        stage = Stage(tmp_path, 8, {})
        stage.mux.load_many({name: stage.make(name, 2).folder for name in "abc"})
        out, err = capsys.readouterr()
        assert not out and "loading adapters" in err

    def test_names_that_are_one_string(self, stage: Stage) -> None:
        with pytest.raises(TypeError, match="`names`"):
            stage.mux.prefetch("ab")


def test_a_copy_goes_its_own_way(stage: Stage) -> None:
    stage.mux.set_adapter("a")
    model, mux = copy.deepcopy((stage.model, stage.mux))
    mux.set_adapter("e")
    check(model, X, [[(stage.tenants["e"], 1.0)]] * 3)
    stage.check("a", "a", "a")


def assert_same(before: list[Any], after: list[Any]) -> None:
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now
