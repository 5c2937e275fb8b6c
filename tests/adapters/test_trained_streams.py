"""What is trained reaches the pools on one stream, while it is stepped and served on others.

The fixture `cuda` fails a test in which anything races.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from cuda_streams import CUDA, Cuda, Graph, Stream, cuda_streams
from lora_mux.errors import TrainingError
from tenants import Model, attached, tenant

Trained = lora_mux.model.trained.TrainedAdapter
X = torch.linspace(-1, 1, 2 * 12).reshape(2, 12)
ROWS = ["a", "b"]


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with cuda_streams() as made:
        yield made


class Stage:
    """Adapters a, b and c of rank 4, in pools of so many rank rows; None = that grow."""

    def __init__(self, folder: Path, rank_rows: int | None) -> None:
        if rank_rows is None:
            self.model = Model()
            self.mux = lora_mux.attach(self.model)
        else:
            self.model, self.mux = attached(rank_rows)
        for i, name in enumerate("abc"):
            one = tenant(folder / name, {"first": 4, "second": 4}, i)
            self.mux.load(name, one.folder)

    @property
    def pools(self) -> list[Tensor]:
        return [pool.A_rows for pool in self.mux._adapters._pools.values()]


@pytest.fixture(params=[12, None], ids=["with memory=", "all resident"])
def stage(tmp_path: Path, cuda: Cuda, request: pytest.FixtureRequest) -> Stage:
    """Pools that a stream of their own writes, or whichever is current."""
    return Stage(tmp_path, request.param)


def begin(stage: Stage, name: str = "a", **how: Any) -> Trained:
    """Train an adapter, whose parameters lie on the device."""
    trained = stage.mux.train(name, **how)
    for parameter in trained.parameters():
        CUDA.put(parameter.data)
    return trained


def run(stage: Stage, rows: Any = ROWS, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad), stage.mux.route(rows):
        y: Tensor = stage.model(X)
    return y


@torch.no_grad()
def change(trained: Trained) -> None:
    """In place, as load_state_dict does."""
    for parameter in trained.parameters():
        parameter.mul_(1.5)


def step(trained: Trained) -> None:
    for parameter in trained.parameters():
        parameter.grad = CUDA.put(torch.ones_like(parameter))
    torch.optim.SGD(trained.parameters(), lr=0.1).step()


def check(stage: Stage, trained: Trained, y: Tensor) -> None:
    """The first row is answered with what was learnt, by the formula in fp64."""
    with torch.no_grad():
        h = X[:1].double()
        for path, w in trained.weights.items():
            layer: Any = stage.model.get_submodule(path)
            base = layer.weight.double() + w.scaling * w.B.double() @ w.A.double()
            h = h @ base.T + layer.bias.double()
            h = torch.tanh(h) if path == "first" else h
    torch.testing.assert_close(y[:1].double(), h, rtol=1e-4, atol=1e-5)


def test_a_loop(stage: Stage) -> None:
    a = begin(stage)
    for _ in range(3):
        run(stage, grad=True).square().sum().backward()
        step(a)
    check(stage, a, run(stage))


def test_changes_between_passes_without_gradients(stage: Stage) -> None:
    """No pass before them has waited for anything that is trained."""
    a = begin(stage)
    for _ in range(2):
        change(a)
        run(stage)
        run(stage)
    check(stage, a, run(stage))


def test_steps_without_a_pass_between(stage: Stage) -> None:
    a = begin(stage)
    run(stage)
    for _ in range(3):
        step(a)
        stage.mux.publish("a")
    check(stage, a, run(stage))


@pytest.mark.parametrize("trains", [None, Stream(name="trains")])
def test_served_on_another_stream(stage: Stage, trains: Stream | None) -> None:
    """As by continuous batching, which has one of its own."""
    serves = Stream(name="serves")
    with CUDA.stream(trains or CUDA.default):
        CUDA.current().wait_stream(CUDA.default)
        a = begin(stage)
    for act in (step, change, step):
        for _ in range(2):
            with CUDA.stream(trains or CUDA.default):
                act(a)
            with CUDA.stream(serves):
                y = run(stage)
    CUDA.synchronize()
    check(stage, a, y)


def test_stepped_on_another_stream_than_it_began_on(stage: Stage) -> None:
    a, steps = begin(stage), Stream(name="steps")
    for _ in range(2):
        with CUDA.stream(steps):
            steps.wait_stream(CUDA.default)  # which has computed the gradients
            step(a)
        run(stage)
    with CUDA.stream(Stream(name="serves")):
        run(stage)


def test_what_was_learnt_is_read_on_another_stream(stage: Stage) -> None:
    """It is saved, copied and frozen there."""
    a, steps = begin(stage), Stream(name="steps")
    for act in (lambda: stage.mux._adapters.values("a"), lambda: stage.mux.freeze("a")):
        with CUDA.stream(steps):
            steps.wait_stream(CUDA.default)
            step(a)
        CUDA.syncs.clear()
        read = act()
        for part in (read or {}).values():
            CUDA.touch(part.A, False, "a save")


def test_what_was_loaded_is_read_on_another_stream(tmp_path: Path, cuda: Cuda) -> None:
    """By who begins to train it, or saves it: after its load, and before its rows are another's."""
    stage = Stage(tmp_path, None)
    with torch.cuda.stream(Stream()):
        stage.mux.save("b", tmp_path / "b")
        begin(stage)
    stage.mux.remove("b")
    stage.mux.load("b", tmp_path / "b")
    run(stage)


def test_nobody_waits_on_the_host(stage: Stage) -> None:
    a, b = begin(stage), begin(stage, "b")
    run(stage)
    CUDA.syncs.clear()
    for one in (a, b, a):
        change(one)
        with torch.no_grad(), stage.mux.route(ROWS):
            stage.model(X)
        stage.mux.publish("b")
    assert not CUDA.syncs


def test_who_serves_others_waits_for_no_copy(tmp_path: Path, cuda: Cuda) -> None:
    """The masters are read on the stream of the pass, and not behind adapters that travel."""
    stage = Stage(tmp_path, 12)
    a = begin(stage)
    run(stage)
    change(a)
    stage.mux.prefetch(["c"])
    (side,) = stage.mux._adapters._streams.values()
    before = CUDA.default.clock[side]
    stage.mux.publish("a")
    assert CUDA.default.clock[side] == before < side.clock[side]


def test_copies_have_streams_of_their_own(stage: Stage) -> None:
    a = begin(stage)
    step(a)
    twin = copy.deepcopy(a)
    assert a.mux_streams and not twin.mux_streams


class TestCaptures:
    def test_a_pass_that_trains(self, stage: Stage) -> None:
        begin(stage)
        run(stage, grad=True)
        run(stage)
        with pytest.raises(TrainingError, match=r"trains nothing.*'a'.*torch.no_grad\(\)"):
            captured(stage, grad=True)
        captured(stage)
        captured(stage, [None, "b"], grad=True)

    @pytest.mark.parametrize("rows", [ROWS, [None, "b"]])
    def test_dropout(self, stage: Stage, rows: Any) -> None:
        """Also of adapters that are not in the batch: each layer looks for its rows."""
        a = begin(stage, dropout=0.5)
        stage.model.train()
        run(stage, rows)
        with pytest.raises(TrainingError, match=r"eval\(\)"):
            captured(stage, rows)
        a.eval()
        captured(stage, rows)

    def test_a_step_before(self, stage: Stage) -> None:
        """It would be published at each replay, over whatever comes later."""
        a = begin(stage)
        run(stage)
        step(a)
        before = [rows.clone() for rows in stage.pools]
        for act in (lambda: run(stage), lambda: stage.mux.publish("a")):
            with pytest.raises(TrainingError, match=r"got 'a', whose.*publish\(\)"), in_capture():
                act()
        assert all(map(torch.equal, before, stage.pools))
        stage.mux.publish("a")
        graph = captured(stage)
        assert not any("foreach" in launch.func._schema.name for launch in graph.launches)
        check(stage, a, run(stage))

    def test_a_step_that_is_captured(self, stage: Stage) -> None:
        """Nothing can wait for the stream on which it was."""
        a = begin(stage)
        streams = dict(a.mux_streams)
        with in_capture():
            step(a)
        assert a.mux_streams == streams


@contextmanager
def in_capture() -> Iterator[Graph]:
    """Inside, a graph is captured, also if that ends by an error."""
    graph, stream = Graph(), Stream(name="capture")
    CUDA.synchronize()
    stream.captured = []
    CUDA.local.__dict__.setdefault("stack", []).append(stream)
    try:
        yield graph
    finally:
        CUDA.local.stack.pop()
        graph.launches, stream.captured = stream.captured, None


def captured(stage: Stage, rows: Any = ROWS, grad: bool = False) -> Graph:
    """The graph of a pass in a block that has seen one."""
    with torch.set_grad_enabled(grad), stage.mux.route(rows):
        with torch.no_grad():
            stage.model(X)
        with in_capture() as graph:
            stage.model(X)
    return graph
