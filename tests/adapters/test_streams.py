"""Adapters come and go on one stream while passes read others on another: what waits for what.

The fixture `cuda` fails a test in which anything races.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from cuda_streams import CUDA, Cuda, Event, Graph, Stream, buffers_on_device, cuda_streams
from lora_mux.checkpoints import PackedTensors
from lora_mux.routes.compiled import ROUTERS
from tenants import Model, attached, check, tenant

X = torch.linspace(-1, 1, 2 * 12).reshape(2, 12)
RANKS = {"a": 4, "b": 4, "c": 4, "d": 4}


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with cuda_streams() as made:
        yield made


class Stage:
    """Tenants a, b, ... of these ranks, in pools of so many rank rows; None = that grow."""

    def __init__(self, folder: Path, ranks: dict[str, int], rank_rows: int | None) -> None:
        if rank_rows is None:
            self.model = Model()
            self.mux = lora_mux.attach(self.model)
        else:
            self.model, self.mux = attached(rank_rows)
        self.tenants = {
            name: tenant(folder / name, {"first": rank, "second": rank}, i)
            for i, (name, rank) in enumerate(ranks.items())
        }
        for name in self.tenants:
            self.load(name)

    def load(self, name: str) -> None:
        self.mux.load(name, self.tenants[name].folder)

    @property
    def side(self) -> Stream:
        """The stream that copies."""
        (stream,) = self.mux._adapters._streams.values()
        assert isinstance(stream, Stream)
        return stream

    def run(self, *names: str, on: Stream | None = None) -> None:
        """A pass on a stream, in a block that was opened on the current one."""
        with self.mux.route(list(names)), CUDA.stream(on) if on else nullcontext():
            check(self.model, X[: len(names)], [[(self.tenants[n], 1.0)] for n in names])


@pytest.fixture
def stage(tmp_path: Path, cuda: Cuda) -> Stage:
    """Room for two."""
    return Stage(tmp_path, RANKS, 8)


def test_passes_on_a_stream_that_is_entered_inside_of_the_block(stage: Stage) -> None:
    """As transformers' continuous batching runs them."""
    compute = Stream(name="compute")
    for names in ("ab", "bc", "ca", "ca", "d"):
        stage.run(*names, on=compute)
    for name, stream in (("a", None), ("b", Stream()), ("c", None), ("d", Stream())):
        stage.run(name, on=stream)


def test_layers_on_different_streams(stage: Stage) -> None:
    """Each waits for the adapters, and makes a plan and a copy of the rows for itself."""
    streams = {"first": Stream(name="one"), "second": Stream(name="two")}
    for path, stream in streams.items():
        layer = stage.model.get_submodule(path)
        layer.register_forward_pre_hook(
            lambda *_, stream=stream: CUDA.local.stack.append(stream)  # type: ignore[misc]
        )
        layer.register_forward_hook(lambda *_: CUDA.local.stack.pop() and None)
    first, second = streams.values()
    stage.model.second.register_forward_pre_hook(lambda *_: second.wait_stream(first))
    for names in ("ab", "bc", "ca"):
        stage.run(*names, on=Stream())


@pytest.mark.parametrize("is_sticky", [True, False])
def test_one_route_on_two_streams(stage: Stage, is_sticky: bool) -> None:
    if is_sticky:
        stage.mux.set_route(["a", "b"])
    with nullcontext() if is_sticky else stage.mux.route(["a", "b"]), torch.no_grad():
        for stream in (Stream(), Stream()):
            with CUDA.stream(stream):
                stage.model(X)
    stage.mux.set_adapter(None)
    stage.mux.prefetch([*"cd"])


def test_a_copy_is_made_of_what_is_about_to_be_overwritten(stage: Stage) -> None:
    stage.mux.prefetch([*"ab"])
    copy.deepcopy(stage.model)
    stage.mux.prefetch([*"cd"])


@pytest.mark.parametrize("on", [None, Stream(name="compute")])
def test_a_routing_that_is_handed_to_a_layer(stage: Stage, on: Stream | None) -> None:
    """Of an attached model, past all routes."""
    stage.mux.pin("a")
    index = CUDA.put(torch.tensor([[stage.mux.adapters["a"]]]))
    with torch.no_grad(), CUDA.stream(on) if on else nullcontext():
        stage.model.first(X[:1], lora_mux.Routing(index))
    stage.mux.remove("a")


def test_a_write_to_all_slots_forgets_no_reader(stage: Stage) -> None:
    """As the first one is, and that after an interrupt."""
    compute = Stream(name="compute")
    x = X[:1].clone().requires_grad_()
    with stage.mux.route(["a"]), CUDA.stream(compute):
        y = stage.model(x)
    stage.mux._adapters._mend()
    with CUDA.stream(compute):
        y.sum().backward()
    del y
    stage.mux.remove("a")


def test_an_interrupt_before_the_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.mux.prefetch([*"ab"])
    stage.run("a", on=Stream(name="compute"))
    wait, side = Stream.wait_event, stage.side

    def interrupted(stream: Stream, event: Event) -> None:
        if stream is side:
            raise KeyboardInterrupt
        wait(stream, event)

    monkeypatch.setattr(Stream, "wait_event", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.mux.prefetch([*"cd"])
    monkeypatch.setattr(Stream, "wait_event", wait)
    stage.mux.prefetch([*"cd"])


def test_the_end_of_a_block_is_noted_before_others_may_evict(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What replays have read on the stream of the block."""
    order: list[str] = []
    router = stage.mux._router
    close, left = router.scopes.close, router.order.left
    monkeypatch.setattr(router.scopes, "close", lambda s: (order.append("close"), close(s)))
    monkeypatch.setattr(router.order, "left", lambda s: (order.append("left"), left(s)))
    with stage.mux.route(["a"]):
        order.clear()
    assert order == ["left", "close"]


def test_layers_that_are_called_by_themselves(stage: Stage) -> None:
    with stage.mux.route(["a"]), CUDA.stream(Stream()), torch.no_grad():
        stage.model.first(X[:1])
    with stage.mux.route(["b"]), torch.no_grad():
        stage.model.first(X[:1])
    stage.mux.prefetch([*"cd"])


def test_a_backward_on_the_stream_of_its_forward(stage: Stage) -> None:
    x, stream = X[:1].clone().requires_grad_(), Stream()
    with CUDA.stream(stream):
        with stage.mux.route(["a"]):
            y = stage.model(x)
        with torch.no_grad(), stage.mux.route(["a"]):
            stage.model(x)  # the end of this pass comes before the backward of the first
        y.sum().backward()
    del y
    stage.mux.prefetch([*"bc"])


def test_a_pass_that_an_interrupt_ends(stage: Stage) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = stage.model.second.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage.run("a", on=Stream())
    handle.remove()
    stage.mux.prefetch([*"bc"])
    stage.run("c")


def test_adapters_that_move(tmp_path: Path, cuda: Cuda) -> None:
    """Who reads one that has moved waits for the move; it waits for who has read it before."""
    stage = Stage(tmp_path, {"a": 3, "b": 3, "c": 3, "d": 3, "e": 6}, 12)
    for name in "abcd":
        stage.run(name, on=Stream(name=name))
    for name in "bd":
        stage.mux.pin(name)  # so that b moves: none of the two may go
    stage.mux.remove("a")
    stage.mux.remove("c")
    before = stage.model.first.mux_pool.spans.copy()
    stage.mux.prefetch([*"e"])
    assert before != {s: stage.model.first.mux_pool.spans[s] for s in before}
    for name in "bde":
        stage.run(name, on=Stream())


def test_tables_that_grow_and_adapters_that_are_replaced(tmp_path: Path, cuda: Cuda) -> None:
    stage = Stage(tmp_path, dict.fromkeys("abcdefghij", 4), 8)
    compute = Stream(name="compute")
    for name in "abj":
        stage.run(name, on=compute)
    with stage.mux.route(["j"]), torch.no_grad(), CUDA.stream(compute):
        stage.mux.load("j", stage.tenants["a"].folder, replace=True)
        stage.model(X[:1])
    stage.tenants["j"] = stage.tenants["a"]
    stage.run("j", on=compute)


def test_values_that_are_not_aligned_are_copied_again_by_the_stream_that_brings_them(
    stage: Stage,
) -> None:
    loaded = stage.mux._adapters._loaded

    def shifted(read: Callable[[bool], PackedTensors]) -> Callable[[bool], PackedTensors]:
        def read_shifted(pinned: bool) -> PackedTensors:
            values = read(pinned)
            data = torch.empty(len(values.data) + 1, dtype=torch.uint8, pin_memory=pinned)
            data[1:] = values.data
            return PackedTensors(
                data, {k: p._replace(start=p.start + 1) for k, p in values.places.items()}
            )

        return read_shifted

    for handle, stored in loaded.items():
        loaded[handle] = dataclasses.replace(stored, read=shifted(stored.read))
    for name in "abcd":
        stage.run(name)


def test_a_copy_of_the_model(stage: Stage) -> None:
    stage.mux._router.begin_to_show()
    stage.mux.set_route(["a", "b"])  # which the copy has, too
    twin = copy.deepcopy(stage.model)
    for buffer in twin.buffers():
        CUDA.put(buffer)
    for model in (stage.model, twin):
        mux = lora_mux.Mux.of(model)
        check(model, X, [[(stage.tenants[name], 1.0)] for name in "ab"])
        mux.set_adapter(None)
    for name in "abcd":
        with lora_mux.Mux.of(twin).route([name]), CUDA.stream(Stream()):
            CUDA.current().wait_stream(CUDA.default)  # as for the parameters
            check(twin, X[:1], [[(stage.tenants[name], 1.0)]])
        stage.run(name, on=Stream())


def test_pools_that_grow(tmp_path: Path, cuda: Cuda) -> None:
    """Adapters are loaded and removed on one stream while passes run on another."""
    stage, compute = Stage(tmp_path, {"a": 4}, None), Stream(name="compute")
    for i, name in enumerate("bcdefghi"):
        stage.tenants[name] = tenant(tmp_path / name, {"first": 4, "second": 4}, i)
        stage.run("a", on=compute)
        with CUDA.stream(Stream(name="loads")):
            stage.load(name)
        stage.run("a", name, on=compute)
        if name in "cfg":
            stage.mux.remove(name)


@pytest.mark.parametrize("rank_rows", [None, 8])
def test_pools_that_grow_under_a_pass(tmp_path: Path, cuda: Cuda, rank_rows: int | None) -> None:
    """Its next layers read the new buffers, for which it has not waited."""
    stage, loads = Stage(tmp_path, {"a": 4}, rank_rows), Stream(name="loads")
    more = [tenant(tmp_path / f"more{i}", {"first": 4, "second": 4}, i) for i in range(9)]

    def load(*_: Any) -> None:
        with CUDA.stream(loads):
            for i, one in enumerate(more):
                stage.mux.load(f"more {i}", one.folder)

    stage.model.second.register_forward_pre_hook(load)
    stage.run("a", on=Stream(name="compute"))


def test_graphs_of_torch_compile(stage: Stage) -> None:
    """They ask when they run whose rows they compute, and so wait for the adapters."""
    router, rows_now = stage.mux._router, torch.ops.lora_mux.rows_now
    (number,) = (number for number, known in ROUTERS.items() if known is router)
    router.begin_to_show()
    for name in "abcda":
        with stage.mux.route([name]), CUDA.stream(Stream()), torch.no_grad():
            view = router.view.cell.route.routing
            given = rows_now(view.index, view.weight, number, "samples", "", False)
            stage.model.first(X[:1], lora_mux.Routing(*given))


class TestOverlap:
    """Who brings adapters does not wait, and keeps nobody waiting."""

    def test_prefetch_and_pin_do_not_keep_the_current_stream_waiting(self, stage: Stage) -> None:
        stage.run("a")
        waits = CUDA.default.waits
        stage.mux.prefetch([*"b"])
        stage.mux.pin("c")
        assert CUDA.default.waits == waits
        stage.run("b")
        assert CUDA.default.waits > waits

    def test_copies_wait_for_those_passes_alone_that_read_what_they_overwrite(
        self, stage: Stage
    ) -> None:
        """So they travel while a pass with other adapters computes."""
        stage.run("b")
        stage.run("a")
        before = CUDA.default.clock[CUDA.default]
        stage.run("a")  # which still runs
        stage.mux.prefetch([*"c"])  # in the place of b
        assert stage.side.clock[CUDA.default] <= before
        stage.run("c")
        stage.mux.prefetch([*"b"])  # in the place of a, which the pass reads
        assert stage.side.clock[CUDA.default] > before

    def test_a_route_costs_one_copy_and_no_wait_of_the_host(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.mux.prefetch([*"ab"])
        stage.run("a", "b")
        copies: list[str] = []
        touch = CUDA.touch

        def noted(tensor: Tensor, writes: bool, what: str) -> None:
            if what == "a copy to the device":
                copies.append(what)
            touch(tensor, writes, what)

        def refuse(*_: Any) -> None:
            raise AssertionError("a view for graphs that nobody has compiled")

        monkeypatch.setattr("lora_mux.routes.compiled._pad", refuse)
        monkeypatch.setattr(CUDA, "touch", noted)
        CUDA.syncs.clear()
        for step, rows in enumerate((["a", "b"], ["b", None], [{"a": 2.0}, "a"]), 1):
            with torch.no_grad():
                stage.mux.set_route(rows)
                stage.model(X)
                assert len(copies) == 2 * step - 1 and not CUDA.syncs
                with stage.mux.route(rows):
                    stage.model(X)
                assert len(copies) == 2 * step and not CUDA.syncs

    def test_adapters_come_and_go_without_a_wait_of_the_host(self, stage: Stage) -> None:
        stage.run("a")
        CUDA.syncs.clear()
        stage.mux.prefetch([*"bc"])
        stage.mux.prefetch([*"ad"])  # two go at once
        assert not CUDA.syncs


class TestGraphs:
    """Replays, of which nobody is told."""

    def test_adapters_come_and_go_between_replays(self, stage: Stage) -> None:
        graph = Graph()
        with stage.mux.route(["a"]), torch.no_grad():
            stage.model(X[:1])
            with CUDA.capture(graph):
                stage.model(X[:1])
            graph.replay()
        for name in "bcad":
            with stage.mux.route([name]):
                stage.mux.prefetch([name])
                graph.replay()

    def test_of_a_route_that_other_streams_have_met(self, stage: Stage) -> None:
        """The graph comes to own one of the copies of its rows, and follows later routes."""
        graph = Graph()
        buffers_on_device(stage.model)  # so that a replay computes the base again
        with stage.mux.route(["a"]), torch.no_grad():
            for stream in (CUDA.default, Stream()):
                with CUDA.stream(stream):
                    stage.model(X[:1])
            CUDA.synchronize()
            with CUDA.capture(graph):
                y = stage.model(X[:1])
        for name in "abc":
            with stage.mux.route([name]), torch.no_grad():
                stage.mux.prefetch([name])
                graph.replay()
                torch.testing.assert_close(y, stage.model(X[:1]))
        assert len(stage.mux._router.captured._all) == 1

    def test_what_comes_during_a_capture(self, stage: Stage) -> None:
        """It is waited for by what replays the graph, and not inside of it."""
        graph, event = Graph(), Event()
        with stage.mux.route(["a"]), torch.no_grad():
            stage.model(X[:1])
            with CUDA.capture(graph):
                with CUDA.stream(CUDA.default):
                    stage.mux.prefetch([*"b"])  # as another thread may
                    CUDA.default.record_event(event)
                stage.model(X[:1])
            graph.replay()
        with stage.mux.route(["b"]):
            graph.replay()
        stage.mux.prefetch([*"cd"])


def test_rows_that_are_chosen_during_a_capture(stage: Stage) -> None:
    """They are copied by the graph, and no stream outside can wait for an event inside of it."""
    graph = Graph()
    index = CUDA.put(torch.tensor([[stage.mux.adapters["a"]]]))
    with CUDA.capture(graph):
        stage.mux.set_route(index)
    graph.replay()
    CUDA.synchronize()
    for stream in (Stream(), Stream()):
        with torch.no_grad(), CUDA.stream(stream):
            check(stage.model, X[:1], [[(stage.tenants["a"], 1.0)]])


def test_means_of_tenants_do_not_stop_the_host(cuda: Cuda) -> None:
    """Whose rows are whose, which the host knows, travels from pinned memory."""
    losses, routing = cuda.put(torch.ones(3)), lora_mux.Routing(torch.tensor([[3], [3], [-1]]))
    before = len(cuda.syncs)
    mean = lora_mux.mean_by_adapter(losses, routing)
    assert cuda.syncs[before:] == [] and float(mean) == 1.0
