"""Who runs here; and threads that were started inside a block, and run generate() there.

transformers documents its streamers so: `Thread(target=model.generate, ...)`, started next to the
loop that reads the stream. A new thread has an empty context, so that it would get the base model's
answer. Python itself goes this way: with `-X thread_inherit_context` (3.14) threads inherit the
whole context.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

# Threads of a pool serve whoever comes, not the one in whose block they were started.
POOLS = ("concurrent.", "multiprocessing.", "anyio.")

_INHERITED: "WeakKeyDictionary[threading.Thread, Mapping[object, Any]]" = WeakKeyDictionary()


def inherited() -> Mapping[object, Any]:
    """What was in force where this thread was started."""
    return _INHERITED.get(threading.current_thread(), {})


@functools.cache
def follow(in_force: Callable[[], Mapping[object, Any]]) -> None:
    """From now on, note what is in force where threads are started, if anything is."""
    start = threading.Thread.start

    @functools.wraps(start)
    def noting(thread: threading.Thread) -> None:
        target = getattr(thread, "_target", None) or type(thread)
        if not str(target.__module__).startswith(POOLS):
            held = in_force()
            if held:
                _INHERITED[thread] = held
        start(thread)

    threading.Thread.start = noting  # type: ignore[method-assign, assignment]


def running() -> Any:
    """The asyncio task that runs here, else the thread."""
    # The exception of current_task() where no loop runs would take 1 us of each block.
    task = asyncio.current_task() if asyncio._get_running_loop() else None
    return task or threading.current_thread()


def running_name() -> str:
    """The task or thread that runs here, for messages."""
    return name_of(running())


def name_of(running: Any) -> str:
    """A task's or a thread's name, for messages."""
    if isinstance(running, threading.Thread):
        return f"thread {running.name!r}"
    return f"task {running.get_name()!r}"
