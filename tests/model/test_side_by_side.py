"""Threads and tasks that use one model at the same time, without a lock of the user's."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from integers import VALUES, Asked, Squares, answer, attached
from lora_mux import ops
from lora_mux.errors import LoraMuxError, RoutingBusyError
from lora_mux.ops import dispatch
from lora_mux.routes import graphs
from peft_oracle import llama

ENTRIES: list[Any] = [None, "a", "b", "c", ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def often_switched() -> Iterator[None]:
    """Threads take turns every 50 us, and not every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


def together(acts: list[Callable[[], Any]]) -> list[Any]:
    """What functions return that run at once, each in a thread of its own."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], Any]) -> Any:
        barrier.wait(20)
        with torch.no_grad():
            return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result(60) for future in [pool.submit(run, act) for act in acts]]


def beside(change: Callable[[], Any], acts: list[Callable[[], Any]]) -> list[Any]:
    """What functions return beside a thread that goes on changing something until they do."""
    ended: list[Callable[[], Any]] = []

    def run(act: Callable[[], Any]) -> Any:
        try:
            return act()
        finally:
            ended.append(act)

    def changes() -> None:
        while len(ended) < len(acts):
            change()

    _, *results = together([changes, *(partial(run, act) for act in acts)])
    return results


def attached_llama() -> tuple[Any, lora_mux.Mux]:
    model = llama()
    mux = lora_mux.attach(model)
    for rank, name in enumerate("abc", 2):
        weights = {}
        for path in mux.targets:
            layer = model.get_submodule(path)
            A = torch.randn(rank, layer.in_features) / layer.in_features**0.5
            weights[path] = A, torch.randn(layer.out_features, rank) / 4
        mux.add_adapter(name, weights, alpha=rank)
    return model, mux


class TestEager:
    @pytest.mark.parametrize("rows_by", ["block", "call", "block and thread"])
    def test_24_threads(self, rows_by: str) -> None:
        model, mux = attached_llama()
        ids = torch.tensor([[5, 17, 99], [64, 65, 8]])

        def request(i: int) -> tuple[Tensor, Tensor]:
            rows = [ENTRIES[i % 8], ENTRIES[i // 3]]
            if rows_by == "call":
                logits = model(ids, adapter_names=rows).logits
                return logits, model.generate(ids, adapter_names=rows, **GREEDY)
            with mux.route(rows):
                logits = model(ids).logits
                if rows_by == "block":
                    return logits, model.generate(ids, **GREEDY)
                got: list[Tensor] = []
                generate = threading.Thread(
                    target=lambda: got.append(model.generate(ids, **GREEDY))
                )
                generate.start()
                generate.join()
                return logits, got[0]

        with torch.no_grad():
            want = [request(i) for i in range(24)]
        got = together([lambda i=i: request(i) for i in range(24)])  # type: ignore[misc]
        for i, (mine, alone) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(mine[0], alone[0], msg=f"request {i}")
            assert torch.equal(mine[1], alone[1]), i
        assert len({tuple(alone[1].flatten().tolist()) for alone in want}) > 8
        mux._router.refuse_in_use()

    def test_without_any_adapter(self) -> None:
        model = llama()
        lora_mux.attach(model)
        ids = torch.tensor([[5, 17, 99]])
        want = model.generate(ids, **GREEDY)
        for got in together([lambda: model.generate(ids, **GREEDY)] * 4):
            assert torch.equal(got, want)

    def test_rows_that_are_set_beside_passes(self) -> None:
        """A pass has the sticky rows of its beginning in all layers, in any thread."""
        model, mux = attached()

        def set_adapters() -> None:
            for name in (*VALUES, None):
                mux.set_adapter(name)

        def passes() -> set[Any]:
            who = Asked(model)
            return {who() for _ in range(40)}  # which fails for a torn pass

        def blocks() -> set[Any]:
            who, seen = Asked(model), set()
            for _ in range(40):
                with mux.route(["d"]):
                    seen.add(who())
            return seen

        *seen, routed = beside(set_adapters, [passes, passes, blocks])
        assert set().union(*seen) <= {None, *VALUES} and routed == {"d"}


class TestBounded:
    def test_more_adapters_than_fit(self) -> None:
        """set_adapter makes room while passes go on, which is never an error."""
        model, mux = attached(memory=3 * (4 * 2 * 16 + 1) * 2)  # three rank rows in each layer
        mux.set_adapter("a")

        def set_adapters() -> None:
            for name in VALUES:
                mux.set_adapter(name)

        def passes() -> set[Any]:
            who = Asked(model)
            return {who() for _ in range(100)}

        (seen,) = beside(set_adapters, [passes])
        assert seen <= set(VALUES)
        assert sum(info.resident for info in mux.memory().adapters.values()) <= 3

    def test_blocks_that_do_not_fit_are_refused_by_name(self) -> None:
        model, mux = attached(memory=2 * (4 * 2 * 16 + 1) * 2)

        def tenant(name: str) -> int:
            who, served = Asked(model), 0
            for _ in range(60):
                try:
                    with mux.route([name]):
                        assert who() == name
                        served += 1
                except lora_mux.errors.PoolCapacityError:
                    pass
            return served

        acts: list[Callable[[], Any]] = [lambda name=name: tenant(name) for name in VALUES]  # type: ignore[misc]
        assert sum(together(acts)) > 0
        for name in VALUES:  # nothing is held by who is done
            assert tenant(name) == 60


# Where rows of another task make a trace fail, torch.compile looks into the hooks that find rows.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestCompiled:
    """Right, or refused: the rows that a graph reads are those of its thread."""

    @pytest.fixture(autouse=True)
    def no_old_graphs(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def check(got: Any, rows: list[Any]) -> bool:
        """Whether it was answered, which must be right."""
        if isinstance(got, LoraMuxError):
            assert isinstance(got, RoutingBusyError), got
            return False
        assert got == [answer(row) for row in rows], rows
        return True

    def test_several_threads(self) -> None:
        model, mux = attached()
        run = torch.compile(model, backend="aot_eager")
        rows_of = [["a"], ["b", "c"], [None, "d", ("a", "b")], ["c", None]]

        def answers(rows: list[Any]) -> list[Any]:
            got: list[Any] = []
            for _ in range(5):
                try:
                    with mux.route(rows):
                        got.append(run(torch.ones(len(rows), 1)).flatten().tolist())
                except LoraMuxError as error:
                    got.append(error)
            return got

        with torch.no_grad():
            for rows in rows_of:  # dynamo's own tracing is not made for several threads
                answers(rows)
        acts: list[Callable[[], Any]] = [lambda rows=rows: answers(rows) for rows in rows_of * 2]  # type: ignore[misc]
        for rows, got in zip(rows_of * 2, together(acts), strict=True):
            assert all(self.check(one, rows) for one in got)

    @pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
    @pytest.mark.parametrize("alike", [True, False], ids=["as many rows", "other rows"])
    def test_several_tasks(self, grad: bool, alike: bool) -> None:
        model, mux = attached()
        run = torch.compile(model, backend="aot_eager")
        rows_of = [["a", "b"], ["c", None], ["d", "a"]]
        if not alike:
            rows_of = [["a"], ["c", None], ["d", "a", "b"]]
        answered = []

        async def request(rows: list[Any]) -> None:
            for await_between in (True, False, True):
                try:
                    with mux.route(rows):
                        if await_between:
                            await asyncio.sleep(0)
                        got = run(torch.ones(len(rows), 1)).flatten().tolist()
                        await asyncio.sleep(0)
                except LoraMuxError as error:
                    got = error
                right = self.check(got, rows)
                assert right or await_between
                answered.append(right)
            await asyncio.sleep(0)

        async def main() -> None:
            await asyncio.gather(*map(request, rows_of))
            assert run(torch.ones(2, 1)).flatten().tolist() == [1.0, 1.0]

        with torch.set_grad_enabled(grad):
            asyncio.run(main())
        assert any(answered)

    def test_a_generator_between_whose_steps_others_run(self) -> None:
        model, mux = attached()
        run = torch.compile(model, backend="aot_eager")

        def stream(rows: list[Any]) -> Iterator[Any]:
            with mux.route(rows):
                for _ in range(3):
                    try:
                        yield run(torch.ones(2, 1)).flatten().tolist()
                    except LoraMuxError as error:
                        yield error

        with torch.no_grad():
            for one, other in zip(stream(["a", "b"]), stream(["c", None]), strict=True):
                self.check(one, ["a", "b"])
                self.check(other, ["c", None])


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, lora_mux.Mux, Any]:
    """A model that a CUDA graph was captured of, and what the graph reads."""
    model = Squares()
    mux = lora_mux.attach(model, backend="triton")
    pair = torch.ones(1, 1), torch.ones(1, 1)
    for name in "ab":
        mux.add_adapter(name, {"first": pair, "second": pair}, alpha=1)
    mux.set_route(["a", "b"])
    x = torch.ones(2, 1)
    with torch.no_grad():
        model(x)
        with monkeypatch.context() as patch:
            for module in (ops, dispatch):
                patch.setattr(module, "capturing", lambda device: True)
            model(x)
    return model, mux, mux._router.captured[-1].routing


@pytest.mark.interpreter
class TestCapturedGraphs:
    """A replay is no forward pass, so that one block at a time holds what graphs read."""

    def test_a_block_waits_for_that_of_another_thread(self, captured: Any) -> None:
        _, mux, graph = captured
        a, b = mux.adapters.values()
        order: list[str] = []
        waits = threading.Event()

        def other() -> None:
            waits.set()
            with mux.route(["b", "b"]):
                order.append("other")
                assert graph.index.tolist() == [[b], [b]]

        with mux.route(["a", "a"]):
            thread = threading.Thread(target=other)
            thread.start()
            assert waits.wait(20)
            thread.join(0.1)
            assert thread.is_alive() and graph.index.tolist() == [[a], [a]]
            order.append("here")
        thread.join(20)
        assert order == ["here", "other"]
        assert graph.index.tolist() == [[a], [b]]  # the sticky rows

    def test_the_limit_names_both(self, captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        _, mux, graph = captured
        monkeypatch.setattr(graphs, "PATIENCE", 0.05)
        got: list[Any] = []

        def other() -> None:
            try:
                with mux.route(["b", "b"]):
                    pass
            except RoutingBusyError as error:
                got.append(str(error))

        a = mux.adapters["a"]
        with mux.route(["a", "a"]):
            thread = threading.Thread(target=other, name="the other")
            thread.start()
            thread.join(20)
            assert graph.index.tolist() == [[a], [a]]
        here = threading.current_thread().name
        assert (
            f"a block of thread 'the other' cannot begin while the block of thread {here!r}"
            in (got[0])
        )
        assert mux._router.scopes.all_open() == []
        other()  # afterwards it may
        assert len(got) == 1

    def test_two_tasks_of_one_thread_are_refused_at_once(self, captured: Any) -> None:
        _, mux, graph = captured
        a = mux.adapters["a"]

        async def other() -> None:
            with pytest.raises(RoutingBusyError, match="task 'other' cannot begin while the block"):
                with mux.route(["b", "b"]):
                    pass
            assert graph.index.tolist() == [[a], [a]]

        async def main() -> None:
            ready = asyncio.get_running_loop().create_future()

            async def late() -> None:
                await ready
                await other()

            task = asyncio.create_task(late(), name="other")  # before the block, and not inside
            with mux.route(["a", "a"]):
                ready.set_result(None)
                await task

        asyncio.run(main())

    def test_a_dead_thread_does_not_hold_it(self, captured: Any) -> None:
        _, mux, graph = captured
        blocks: list[Any] = []

        def leave_open() -> None:
            blocks.append(mux.route(["a", "a"]))
            blocks[0].__enter__()

        thread = threading.Thread(target=leave_open)
        thread.start()
        thread.join()
        b = mux.adapters["b"]
        with mux.route(["b", "b"]):
            assert graph.index.tolist() == [[b], [b]]
            blocks[0].__exit__(None, None, None)
            assert graph.index.tolist() == [[b], [b]]
