"""generate() in a thread that was started inside a block, whose rows it has if they are known."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from integers import Asked, attached
from lora_mux.errors import RoutingBusyError, RoutingError


def started(act: Callable[[], Any]) -> Callable[[], Any]:
    """Starts a thread; returns how one gets what act() returned or raised there."""
    results: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            results.put(act())
        except Exception as error:
            results.put(error)

    threading.Thread(target=run).start()
    return lambda: results.get(timeout=20)


def test_the_innermost_block_counts() -> None:
    model, mux = attached()
    who = Asked(model)
    with mux.route(["a"]), mux.route(["b"]):
        assert started(lambda: who("generate"))() == "b"
        assert started(who)() is None  # a forward has the sticky rows
        with mux.disable_adapter():
            assert started(lambda: who("generate"))() is None


def test_a_thread_that_a_thread_starts() -> None:
    model, mux = attached()
    who = Asked(model)
    with mux.route(["a"]):
        assert started(lambda: started(lambda: who("generate"))())() == "a"


def test_its_own_rows_go_first() -> None:
    model, mux = attached()
    who = Asked(model)

    def inside() -> Any:
        with mux.route(["b"]):
            return who("generate"), who("generate", ["c"])

    with mux.route(["a"]):
        assert started(inside)() == ("b", "c")


def test_a_subclass_and_a_timer() -> None:
    model, mux = attached()
    who, got = Asked(model), []

    class Worker(threading.Thread):
        def run(self) -> None:
            got.append(who("generate"))

    with mux.route(["a"]):
        for thread in (Worker(), threading.Timer(0.0, lambda: got.append(who("generate")))):
            thread.start()
            thread.join(20)
    assert got == ["a", "a"]


def test_after_the_block_it_is_refused() -> None:
    model, mux = attached()
    who, go = Asked(model), threading.Event()
    with mux.route(["a"]):
        answered = started(lambda: (go.wait(20), who("generate")))
    go.set()
    error = answered()
    assert isinstance(error, RoutingError) and "has ended" in str(error)


def test_two_models_do_not_mix() -> None:
    (model, mux), (other, others) = attached(), attached()
    who, whose = Asked(model), Asked(other)
    with mux.route(["a"]):
        assert started(lambda: (who("generate"), whose("generate")))() == ("a", None)
        with others.route(["b"]):
            assert started(lambda: (who("generate"), whose("generate")))() == ("a", "b")


@pytest.mark.parametrize("around", [False, True], ids=["plain code", "plain code in a block"])
def test_between_the_steps_of_a_generator(around: bool) -> None:
    """The generator's block is not that of the code that steps it."""
    model, mux = attached()
    who = Asked(model)

    def stream() -> Iterator[Any]:
        with mux.route(["a"]):
            yield started(lambda: who("generate"))()
            yield started(lambda: who("generate"))()

    with mux.route(["b"]) if around else nullcontext():
        streamed = stream()
        assert next(streamed) == "a"
        error = started(lambda: who("generate"))()
        assert isinstance(error, RoutingError) and "between two steps" in str(error)
        with mux.route(["c"]):
            assert started(lambda: who("generate"))() == "c"
            assert next(streamed) == "a"
        streamed.close()


def test_threads_of_a_pool_serve_others() -> None:
    model, mux = attached()
    who = Asked(model)
    with ThreadPoolExecutor(1) as pool:
        with mux.route(["a"]):
            assert pool.submit(who).result(20) is None  # which starts the thread
            with pytest.raises(RoutingBusyError, match="has no rows"):
                pool.submit(who, "generate").result(20)
        assert pool.submit(who, "generate").result(20) is None
