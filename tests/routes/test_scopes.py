"""Blocks and calls in all the places where Python lets one open them."""

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from integers import Asked, X, answer, attached
from lora_mux.errors import RoutingBusyError, RoutingError


@pytest.fixture
def stage() -> Iterator[SimpleNamespace]:
    """A model, its Mux, and `who()`: whose answer a pass gives that runs here and now."""
    model, mux = attached()
    who = Asked(model)
    yield SimpleNamespace(model=model, mux=mux, who=who)
    gc.collect()
    assert mux._router.scopes.all_open() == []
    assert who() is None


def in_thread(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(20)


def in_copy(act: Callable[[], Any]) -> Any:
    return contextvars.copy_context().run(act)


def stream(stage: SimpleNamespace, name: str, steps: int = 3) -> Generator[Any, None, None]:
    with stage.mux.route([name]):
        for _ in range(steps):
            yield stage.who()


class TestHelpers:
    """A block that a context manager opens is that of whoever enters it."""

    def test_a_context_manager(self, stage: SimpleNamespace) -> None:
        @contextmanager
        def tenant(name: str) -> Iterator[None]:
            with stage.mux.route([name]):
                yield

        with tenant("a"):
            assert stage.who() == "a"
            with tenant("b"):
                assert stage.who() == "b"
            assert stage.who() == "a"

    def test_a_context_manager_as_a_decorator(self, stage: SimpleNamespace) -> None:
        @contextmanager
        def tenant() -> Iterator[None]:
            with stage.mux.route(["a"]):
                yield

        assert tenant()(stage.who)() == "a"

    def test_an_exit_stack(self, stage: SimpleNamespace) -> None:
        with ExitStack() as stack:
            for name in "ab":
                stack.enter_context(stage.mux.route([name]))
                assert stage.who() == name
            kept = stack.pop_all()
        assert stage.who() == "b"
        kept.close()

    def test_a_class_that_enters_for_others(self, stage: SimpleNamespace) -> None:
        class Tenant:
            async def __aenter__(self) -> None:
                self.block = stage.mux.route(["a"])
                self.block.__enter__()

            async def __aexit__(self, *error: Any) -> None:
                self.block.__exit__(*error)

        async def main() -> None:
            async with Tenant():
                await asyncio.sleep(0)
                assert stage.who() == "a"

        asyncio.run(main())

    def test_an_async_context_manager(self, stage: SimpleNamespace) -> None:
        @asynccontextmanager
        async def tenant(name: str) -> AsyncIterator[None]:
            with stage.mux.route([name]):
                yield

        async def main() -> None:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(tenant("a"))
                assert stage.who() == "a"
                assert await asyncio.to_thread(stage.who) == "a"

        asyncio.run(main())

    def test_a_generator_that_enters_for_others_is_refused(self, stage: SimpleNamespace) -> None:
        """It cannot be told from a stream that is not at its end."""
        with ExitStack() as stack:
            for _ in (stack.enter_context(stage.mux.route([name])) for name in "ab"):
                pass
            with pytest.raises(RoutingError, match="generator"):
                stage.who()
            assert in_thread(stage.who) is None


class TestGenerators:
    def test_one_inside_another(self, stage: SimpleNamespace) -> None:
        def outer() -> Iterator[Any]:
            with stage.mux.route(["a"]):
                inner = stream(stage, "b")
                yield next(inner), stage.who()
                yield next(inner), stage.who()

        assert list(outer()) == [("b", "a")] * 2

    def test_plumbing_has_the_rows_of_whoever_steps_it(self, stage: SimpleNamespace) -> None:
        def passes() -> Iterator[Any]:
            while True:
                yield stage.who()

        pipe = passes()
        with stage.mux.route(["a"]):
            assert next(pipe) == "a"
        with stage.mux.route(["b"]):
            assert next(pipe) == "b"
        assert next(pipe) is None

    def test_beside_a_block_of_plain_code(self, stage: SimpleNamespace) -> None:
        streamed = stream(stage, "a")
        assert next(streamed) == "a"
        with pytest.raises(RoutingError, match="between two steps of a generator"):
            stage.who()
        with stage.mux.route(["b"]):
            assert (stage.who(), next(streamed), stage.who()) == ("b", "a", "b")
        streamed.close()
        assert stage.who() is None

    def test_rows_with_the_call_between_its_steps(self, stage: SimpleNamespace) -> None:
        streamed = stream(stage, "a")
        next(streamed)
        assert stage.who(rows=["b"]) == "b" and stage.who(rows=[None]) is None
        assert stage.mux.call(["c"])(stage.who) == "c"

    @pytest.mark.parametrize("close", ["close", "drop"])
    @pytest.mark.parametrize("where", [in_thread, in_copy], ids=["thread", "copied context"])
    def test_closed_in_another_context(
        self, stage: SimpleNamespace, where: Any, close: str
    ) -> None:
        held = [stream(stage, "a")]
        with stage.mux.route(["b"]):
            next(held[0])
            act = held[0].close if close == "close" else held.clear
            where(act)
            del act
            gc.collect()
            assert [str(s.route.handles) for s in stage.mux._router.scopes.all_open()] == [
                str(frozenset({stage.mux.adapters["b"]}))
            ]
            with stage.mux.route(["c"]):
                assert stage.who() == "c"

    def test_collected_in_a_cycle(self, stage: SimpleNamespace) -> None:
        streamed = stream(stage, "a")
        next(streamed)
        holder: dict[str, Any] = {"stream": streamed}
        holder["self"] = holder
        del streamed, holder
        gc.collect()
        assert stage.who() is None

    def test_an_event_loop_inside_a_later_step(self, stage: SimpleNamespace) -> None:
        """The task's context is a copy of one that never saw the block of the generator."""

        async def passes() -> Any:
            own = stage.who()
            with stage.mux.route(["c"]):
                inside = stage.who(), await asyncio.create_task(_asked(stage))
            return own, inside, stage.who()

        def steps() -> Iterator[Any]:
            with stage.mux.route(["a"]):
                yield None
                yield asyncio.run(passes())

        with stage.mux.route(["b"]), ThreadPoolExecutor(1) as pool:
            streamed = steps()
            for want in (None, ("a", ("c", "c"), "a")):
                step = contextvars.copy_context().run
                assert pool.submit(step, next, streamed).result(20) == want
            streamed.close()

    def test_a_thread_that_a_later_step_starts(self, stage: SimpleNamespace) -> None:
        got: list[Any] = []

        def steps() -> Iterator[None]:
            with stage.mux.route(["a"]):
                yield
                thread = threading.Thread(target=lambda: got.append(stage.who("generate")))
                thread.start()
                thread.join()
                yield

        streamed = steps()
        for _ in range(2):
            in_copy(lambda: next(streamed))
        assert got == ["a"]
        streamed.close()

    def test_beside_a_block_of_plain_code_from_elsewhere(self, stage: SimpleNamespace) -> None:
        """Whoever starts a thread while the generator rests may mean either block."""
        with stage.mux.route(["a"]):
            streamed = stream(stage, "b")
            assert next(streamed) == "b"
            inside = contextvars.copy_context()
            with pytest.raises(RoutingError, match="one and of the code that steps it"):
                in_thread(lambda: inside.run(stage.who))
            streamed.close()
            inside = contextvars.copy_context()
            assert in_thread(lambda: inside.run(stage.who)) == "a"

    def test_what_a_generator_starts_in_a_step_is_its_own(self, stage: SimpleNamespace) -> None:
        def steps() -> Iterator[Any]:
            with stage.mux.route(["b"]):
                for _ in range(2):
                    inside = contextvars.copy_context()
                    yield in_thread(lambda inside=inside: inside.run(stage.who))

        with stage.mux.route(["a"]):
            assert list(steps()) == ["b", "b"]

    def test_what_an_async_generator_waits_for_is_its_own(self, stage: SimpleNamespace) -> None:
        """Until it has yielded: then the task may be that of whoever steps it."""

        async def steps() -> AsyncIterator[Any]:
            with stage.mux.route(["b"]):
                for _ in range(2):
                    yield await asyncio.create_task(_asked(stage))

        async def main() -> None:
            with stage.mux.route(["a"]):
                streamed = steps()
                assert await anext(streamed) == "b"
                with pytest.raises(RoutingError, match="one and of the code that steps it"):
                    await asyncio.create_task(_asked(stage))
                assert await anext(streamed) == "b"
                await streamed.aclose()  # type: ignore[attr-defined]
                assert await asyncio.create_task(_asked(stage)) == "a"

        asyncio.run(main())


def _refused_or(stage: SimpleNamespace) -> Any:
    try:
        return stage.who()
    except RoutingError as error:
        assert "several generators" in str(error)
        return "refused"


async def _asked(stage: SimpleNamespace) -> Any:
    return stage.who()


class TestTasks:
    def test_async_generators_take_turns(self, stage: SimpleNamespace) -> None:
        async def steps(name: str) -> AsyncIterator[Any]:
            with stage.mux.route([name]):
                for _ in range(3):
                    await asyncio.sleep(0)
                    yield stage.who(), await asyncio.to_thread(_refused_or, stage)

        async def read(name: str) -> list[Any]:
            return [part async for part in steps(name)]

        async def main() -> Any:
            first, second = steps("a"), steps("b")  # in one task
            assert await anext(first) == ("a", "a")
            for _ in range(2):
                assert await anext(second) == ("b", "refused")
                assert await anext(first) == ("a", "refused")
            await first.aclose()  # type: ignore[attr-defined]
            assert await anext(second) == ("b", "b")
            await second.aclose()  # type: ignore[attr-defined]
            assert stage.who() is None
            return await asyncio.gather(*map(read, "abc"))

        assert asyncio.run(main()) == [[(name, name)] * 3 for name in "abc"]

    def test_an_async_generator_that_is_dropped(self, stage: SimpleNamespace) -> None:
        async def steps() -> AsyncIterator[Any]:
            with stage.mux.route(["a"]):
                while True:
                    yield stage.who()

        async def main() -> None:
            streamed = steps()
            assert await anext(streamed) == "a"
            del streamed
            gc.collect()
            await asyncio.sleep(0.01)  # the loop closes it in a task of its own
            assert stage.who() is None
            assert await asyncio.create_task(_asked(stage)) is None

        asyncio.run(main())

    def test_producers_that_are_started_in_a_block(self, stage: SimpleNamespace) -> None:
        async def steps() -> AsyncIterator[Any]:
            queue: asyncio.Queue[Any] = asyncio.Queue()

            async def produce() -> None:
                for _ in range(3):
                    await queue.put(stage.who())
                    await asyncio.sleep(0)

            with stage.mux.route(["a"]):
                producer = asyncio.create_task(produce())
                for _ in range(3):
                    yield await queue.get()
                await producer

        async def main() -> None:
            assert [part async for part in steps()] == ["a"] * 3

        asyncio.run(main())

    def test_a_task_that_outlives_the_block_is_refused(self, stage: SimpleNamespace) -> None:
        async def main() -> None:
            go = asyncio.Event()

            async def late() -> Any:
                await go.wait()
                with pytest.raises(RoutingError, match="has ended"):
                    stage.who()
                with stage.mux.route(["b"]):
                    assert stage.who() == "b"
                return stage.who(rows=["c"])

            with stage.mux.route(["a"]):
                task = asyncio.create_task(late())
                await asyncio.sleep(0)
            go.set()
            assert await task == "c"

        asyncio.run(main())

    @pytest.mark.parametrize("where", ["plain code", "task"])
    def test_a_callback_that_outlives_the_block_is_refused(
        self, stage: SimpleNamespace, where: str
    ) -> None:
        loop = asyncio.new_event_loop()
        got: list[Any] = []

        def late() -> None:
            try:
                got.append(stage.who())
            except RoutingError as error:
                got.append(str(error))

        def schedule() -> None:
            with stage.mux.route(["a"]):
                loop.call_later(0.001, late)

        async def main() -> None:
            if where == "task":
                schedule()
            await asyncio.sleep(0.02)

        if where != "task":
            schedule()
        loop.run_until_complete(main())
        loop.close()
        assert len(got) == 1 and "has ended" in str(got[0])

    def test_a_scheduler_that_is_a_generator(self, stage: SimpleNamespace) -> None:
        """As trio's: it runs coroutines, each in a context of its own, and yields in between."""

        class Turn:
            def __await__(self) -> Generator[None, None, None]:
                yield

        got: dict[str, list[Any]] = {"a": [], "b": [], "": []}

        async def passes(name: str) -> None:
            with stage.mux.route([name]) if name else ExitStack():
                for _ in range(3):
                    got[name].append(stage.who())
                    await Turn()

        def scheduler() -> Iterator[None]:
            waiting = [(passes(name), contextvars.copy_context()) for name in got]
            while waiting:
                task, context = waiting.pop(0)
                try:
                    context.run(task.send, None)
                except StopIteration:
                    continue
                waiting.append((task, context))
                yield

        for _ in scheduler():
            pass
        assert got == {"a": ["a"] * 3, "b": ["b"] * 3, "": [None] * 3}


class TestCopiedContexts:
    def test_they_have_the_block_that_they_were_copied_in(self, stage: SimpleNamespace) -> None:
        with stage.mux.route(["a"]):
            inside = contextvars.copy_context()
            assert inside.run(stage.who) == "a"
            assert in_thread(lambda: inside.run(stage.who)) == "a"
            with stage.mux.route(["b"]):
                assert inside.run(stage.who) == "a"
        with pytest.raises(RoutingError, match="has ended"):
            inside.run(stage.who)
        with pytest.raises(RoutingError, match="has ended"):
            in_thread(lambda: inside.run(stage.who))
        assert stage.who() is None

    def test_a_block_left_in_another_thread(self, stage: SimpleNamespace) -> None:
        block = stage.mux.route(["a"])
        block.__enter__()
        assert stage.who() == "a"
        in_thread(lambda: block.__exit__(None, None, None))
        assert stage.who() is None
        with stage.mux.route(["b"]):
            assert stage.who() == "b"

    def test_a_pass_that_another_thread_runs_in_a_copy_of_its_context(
        self, stage: SimpleNamespace
    ) -> None:
        """It is a pass of its own, and does not end the one that it was copied in."""
        got: list[Any] = []

        def beside(*_: Any) -> None:
            if not got:  # in the outer pass
                got.append(None)
                inside = contextvars.copy_context()
                got.append(in_thread(lambda: inside.run(lambda: stage.who(rows=["b"]))))

        stage.model.first.register_forward_hook(beside)
        with stage.mux.route(["c"]):
            assert stage.who(rows=["a"]) == "a"
        assert got == [None, "b"]


class TestCrossedBlocks:
    def test_nothing_of_them_is_left(self, stage: SimpleNamespace) -> None:
        blocks = [stage.mux.route([name]) for name in "abc"]
        for block in blocks:
            block.__enter__()
        with pytest.raises(RoutingError, match="opposite order"):
            blocks[1].__exit__(None, None, None)
        assert stage.who() is None and stage.mux.active_adapters == []
        with stage.mux.route(["d"]):
            blocks[2].__exit__(None, None, None)
            blocks[0].__exit__(None, None, None)
            assert stage.who() == "d"

    def test_the_starter_of_a_task_keeps_its_block(self, stage: SimpleNamespace) -> None:
        async def crossed() -> None:
            first, second = stage.mux.route(["b"]), stage.mux.route(["c"])
            first.__enter__()
            second.__enter__()
            with pytest.raises(RoutingError, match="opposite order"):
                first.__exit__(None, None, None)
            second.__exit__(None, None, None)
            assert stage.who() == "a"  # the starter's

        async def main() -> None:
            with stage.mux.route(["a"]):
                await asyncio.create_task(crossed())
                assert stage.who() == "a"

        asyncio.run(main())

    def test_a_stream_keeps_its_block(self, stage: SimpleNamespace) -> None:
        streamed = stream(stage, "a")
        next(streamed)
        first, second = stage.mux.route(["b"]), stage.mux.route(["c"])
        first.__enter__()
        second.__enter__()
        with pytest.raises(RoutingError, match="opposite order"):
            first.__exit__(None, None, None)
        assert next(streamed) == "a"
        second.__exit__(None, None, None)
        streamed.close()

    def test_in_a_generator_whose_contexts_change(self, stage: SimpleNamespace) -> None:
        def steps() -> Iterator[None]:
            first, second = stage.mux.route(["a"]), stage.mux.route(["b"])
            first.__enter__()
            yield
            second.__enter__()
            yield
            with pytest.raises(RoutingError, match="opposite order"):
                first.__exit__(None, None, None)
            assert stage.who() is None
            second.__exit__(None, None, None)
            yield

        streamed = steps()
        for _ in range(3):
            in_copy(lambda: next(streamed))


class TestCalls:
    def test_a_call_goes_before_blocks_inside_it(self, stage: SimpleNamespace) -> None:
        def inside() -> Any:
            with stage.mux.route(["b"]):
                return stage.who(), stage.who(rows=["c"])

        assert stage.mux.call(["a"])(inside) == ("a", "c")
        assert stage.who() is None

    def test_a_block_that_ends_inside_a_call(self, stage: SimpleNamespace) -> None:
        """generate() keeps its rows to its end, whatever ends meanwhile."""
        block = stage.mux.route(["a"])
        block.__enter__()
        with torch.no_grad():
            got = stage.model.generate(X, lambda: block.__exit__(None, None, None))
        assert float(got) == answer("a")

    def test_a_block_that_a_call_leaves_open(self, stage: SimpleNamespace) -> None:
        with ExitStack() as stack:
            stage.mux.call(["a"])(stack.enter_context, stage.mux.route(["b"]))
            assert stage.who() == "b"


class TestLeftBehind:
    def test_a_dead_thread_with_a_living_generator(self, stage: SimpleNamespace) -> None:
        streamed = stream(stage, "a")
        thread = threading.Thread(target=lambda: next(streamed))
        thread.start()
        thread.join()
        assert stage.who() is None and stage.who("generate") is None
        for _ in range(20):  # one of them gets the dead one's number
            assert in_thread(stage.who) is None
        assert next(streamed) == "a"
        stage.mux._router.refuse_in_use()  # detach() need not wait for it
        streamed.close()

    def test_a_thread_without_rows(self, stage: SimpleNamespace) -> None:
        with stage.mux.route(["a"]):
            assert in_thread(stage.who) is None
            with pytest.raises(RoutingBusyError, match="has no rows for generate"):
                in_thread(lambda: stage.who("generate"))
            assert in_thread(lambda: stage.who("generate", [None])) is None
            stage.mux.set_adapter("b")
            assert in_thread(lambda: stage.who("generate")) == "b"
            stage.mux.set_adapter(None)
            assert in_thread(lambda: stage.who("generate")) is None
