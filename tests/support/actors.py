"""Threads, asyncio tasks, generators and plain code that run functions step by step.

An actor's `do(act)` runs act() in its context, and returns what that returns or raises.
"""

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

Act = Callable[[], Any]
PATIENCE = 20.0  # seconds; a test that waits longer hangs


def caught(act: Act) -> Any:
    """What act() returns, or the exception that it raises."""
    try:
        return act()
    except Exception as error:
        return error


class Actor(Protocol):
    """Runs functions in a context of its own."""

    def do(self, act: Act) -> Any: ...

    def close(self) -> None: ...


class Plain:
    """The thread that runs the test."""

    def do(self, act: Act) -> Any:
        return caught(act)

    def close(self) -> None:
        pass


class InThread:
    """A thread that lives as long as the actor."""

    def __init__(self) -> None:
        self._acts: queue.SimpleQueue[Act | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()

    def serve(self) -> None:
        """Run what comes, until None comes. An act may serve itself: the call then spans steps."""
        while (act := self._acts.get(timeout=PATIENCE)) is not None:
            self._results.put(caught(act))

    def begin(self, around: Callable[[Act], Any]) -> Any:
        """Run around(serve) until `end`: what is done meanwhile is done inside of it."""

        def inside() -> None:
            self._results.put("begun")
            self.serve()

        return self.do(lambda: around(inside))

    def end(self) -> Any:
        """Let the innermost around(serve) return; what it returns."""
        self._acts.put(None)
        return self._results.get(timeout=PATIENCE)

    def do(self, act: Act) -> Any:
        self._acts.put(act)
        return self._results.get(timeout=PATIENCE)

    def close(self) -> None:
        self._acts.put(None)
        self._thread.join(PATIENCE)


class InTask:
    """An asyncio task; those of one loop run in one thread, and take turns at awaits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._acts: asyncio.Queue[Act | None] = asyncio.Queue()
        self._results: asyncio.Queue[Any] = asyncio.Queue()
        self._task = loop.create_task(self._serve())

    async def _serve(self) -> None:
        while (act := await self._acts.get()) is not None:
            await self._results.put(caught(act))

    def do(self, act: Act) -> Any:
        self._acts.put_nowait(act)
        return self._loop.run_until_complete(self._results.get())

    def close(self) -> None:
        self._acts.put_nowait(None)
        self._loop.run_until_complete(self._task)


def steps() -> Generator[Any, Act, None]:
    """A generator that does what it is sent."""
    result: Any = None
    while True:
        act = yield result
        result = caught(act)


class InGenerator:
    """A generator that runs in the context of whoever steps it."""

    def __init__(self) -> None:
        self._generator = steps()
        self._step(lambda: next(self._generator))

    def _step(self, step: Act) -> Any:
        return step()

    def do(self, act: Act) -> Any:
        return self._step(lambda: self._generator.send(act))

    def close(self) -> None:
        self._step(self._generator.close)


class InCopiedContexts(InGenerator):
    """A generator each of whose steps runs in a copy of the context."""

    def _step(self, step: Act) -> Any:
        return contextvars.copy_context().run(step)


class InPool(InGenerator):
    """As Starlette iterates generators: each step in another pool thread and copied context."""

    def __init__(self, pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor]) -> None:
        self._pools = pools
        super().__init__()

    def _step(self, step: Act) -> Any:
        self._pools = self._pools[::-1]
        return self._pools[0].submit(contextvars.copy_context().run, step).result(PATIENCE)
