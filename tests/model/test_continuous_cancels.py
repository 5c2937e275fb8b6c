"""A request that is cancelled is gone, alone, and its name is free: a cancellation is of a request,
not of its name.

Where the order matters, a test makes the batches of a manager by hand, without its thread.
"""

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from continuous import alone, batching, collected
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.requests import RequestStatus

from lora_mux.errors import RoutingError
from peft_oracle import attached_llama, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPT, NEW = [5, 17, 99, 4], 6
ENTRIES = pytest.mark.parametrize("entry", ["plain", "__base__"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return attached_llama(tmp_path_factory.mktemp("adapters"))


def answer(stage: Any, entry: str) -> list[int]:
    return alone(stage.base, stage.peft, PROMPT, entry, NEW)


def settings(new: int = NEW, sequences: int = 1, **fields: Any) -> dict[str, Any]:
    config = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=sequences > 1,
        top_k=1 if sequences > 1 else None,
        eos_token_id=255,
        pad_token_id=0,
        num_return_sequences=sequences,
    )
    return {"generation_config": config, "continuous_batching_config": batching(**fields)}


@pytest.fixture
def model(stage: Any) -> Any:
    return copy.deepcopy(stage.model)


@contextmanager
def managed(model: Any, **how: Any) -> Iterator[Any]:
    manager = model.init_continuous_batching(**settings(**how))
    with started(manager):
        yield manager


@contextmanager
def started(manager: Any) -> Iterator[None]:
    """Until the end of the block, also where requests hang: they would keep the process."""
    manager.start()
    try:
        yield
    finally:
        manager.stop(block=True, hard_stop=True)


def by_hand(model: Any, **how: Any) -> Any:
    """A manager whose batches the test makes itself."""
    manager = model.init_continuous_batching(**settings(**how))
    manager.batch_processor = manager._create_batch_processor()
    return manager


def before_each_batch(model: Any, action: Callable[[], None]) -> Any:
    return model.model.layers[1].register_forward_pre_hook(lambda *_: action())


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_left(manager: Any) -> bool:
    return bool(len(manager.mux_requests) or manager.mux._adapters.has_promises)


@ENTRIES
def test_one_that_was_never_there(stage: Any, model: Any, entry: str) -> None:
    manager = model.init_continuous_batching(**settings())
    manager.cancel_request("x")
    manager.add_request(PROMPT, "x", adapter_names=entry)
    with started(manager):
        assert collected(manager, 1) == {"x": answer(stage, entry)}
    assert not is_left(manager)


@ENTRIES
def test_one_that_is_over(stage: Any, model: Any, entry: str) -> None:
    """Between two batches of another, so that its name comes with the cancellation."""

    def again() -> None:
        if done:
            manager.cancel_request(done.pop())
            manager.add_request(PROMPT, "x", adapter_names=entry)

    done: list[str] = []
    with managed(model) as manager:
        manager.add_request(PROMPT, "x", adapter_names=entry)
        assert collected(manager, 1) == {"x": answer(stage, entry)}
        done.append("x")
        hook = before_each_batch(model, again)
        manager.add_request(PROMPT, "other", adapter_names="biased")
        found = collected(manager, 2)
        hook.remove()
        assert found == {"x": answer(stage, entry), "other": answer(stage, "biased")}
        eventually(lambda: not is_left(manager))


@ENTRIES
def test_a_name_that_is_not_cleared_away_yet(stage: Any, model: Any, entry: str) -> None:
    manager = model.init_continuous_batching(**settings())
    manager.add_request(PROMPT, "x", adapter_names=entry)
    for _ in range(2):
        manager.cancel_request("x")
        with pytest.raises(RoutingError, match="got 'x', which was cancelled .* leave it out"):
            manager.add_request(PROMPT, "x", adapter_names=entry)
    with started(manager):
        eventually(lambda: not is_left(manager))
        manager.cancel_request("x")
        manager.add_request(PROMPT, "x", adapter_names=entry)
        assert collected(manager, 1) == {"x": answer(stage, entry)}
    assert manager.get_result(timeout=0.1) is None and not is_left(manager)


@ENTRIES
def test_all_while_the_cache_is_full(stage: Any, model: Any, entry: str) -> None:
    """transformers lets new ones in when a request ends: when all are cancelled, none does."""
    names = [f"q{i}" for i in range(8)]
    full: list[bool] = []

    def cancel() -> None:
        if manager.batch_processor.scheduler.block_new_requests and not full:
            full.append(True)
            for name in names:
                manager.cancel_request(name)

    with managed(model, new=60, num_blocks=32, page=4) as manager:
        hook = before_each_batch(model, cancel)
        for name in names:
            manager.add_request(PROMPT, name, adapter_names=entry)
        eventually(lambda: bool(full) and not len(manager.mux_requests))
        hook.remove()
        for name in ("q0", "new"):
            manager.add_request(PROMPT, name, max_new_tokens=NEW, adapter_names=entry)
        assert collected(manager, 2) == dict.fromkeys(("q0", "new"), answer(stage, entry))
    assert not is_left(manager)


def test_all_sequences_of_a_request(model: Any) -> None:
    """Those that go on by themselves too; one of them alone by its own name."""
    begun = threading.Event()

    def cancel() -> None:
        if "x__child#1" in manager.batch_processor.scheduler.active_requests and not begun.is_set():
            manager.cancel_request("x")
            manager.cancel_request("y__child#0")
            begun.set()

    with managed(model, sequences=3, max_batch_tokens=64) as manager:
        hook = before_each_batch(model, cancel)
        for name in "xy":
            manager.add_request(PROMPT, name, adapter_names="plain")
        found = collected(manager, 2)
        hook.remove()
        assert begun.is_set() and found.keys() == {"y", "y__child#1"}
        assert manager.get_result(timeout=0.3) is None
        eventually(lambda: not is_left(manager))


def test_from_the_callback_of_a_result(stage: Any, model: Any) -> None:
    async def main(manager: Any) -> list[int]:
        got: list[int] = []

        def first(output: Any) -> None:
            got.append(len(output.generated_tokens))
            manager.cancel_request("x")

        manager.register_result_handler("x", first)
        manager.add_request(PROMPT, "x", streaming=True, adapter_names="plain")
        end = time.monotonic() + 20
        while not got or is_left(manager):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        return got

    with managed(model, new=100) as manager:
        assert max(asyncio.run(main(manager))) < 100
        manager.output_router.result_handlers.clear()  # its handler is the caller's to take away
        manager.add_request(PROMPT, "x", max_new_tokens=NEW, adapter_names="plain")
        assert collected(manager, 1) == {"x": answer(stage, "plain")}


def test_one_that_is_added_while_the_thread_looks(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cancellation is not seen before it is."""
    drain = continuous_api.drain_queue
    manager = by_hand(model)

    def slowly(queue: Any) -> Any:
        found = drain(queue)
        if queue is manager.input_queue and not added:
            added.append(manager.add_request(PROMPT, "x", adapter_names="plain"))
            manager.cancel_request("x")
        return found

    added: list[str] = []
    monkeypatch.setattr(continuous_api, "drain_queue", slowly)
    assert not manager.batch_processor.prepare_next_batch() and is_left(manager)
    assert not manager.batch_processor.prepare_next_batch() and not is_left(manager)


def test_in_a_batch_that_is_computed(model: Any) -> None:
    """On GPUs the next one is made meanwhile: what comes of it is of nobody."""
    manager = by_hand(model, sequences=2)
    scheduler = manager.batch_processor.scheduler
    manager.add_request(PROMPT, "x", adapter_names="plain")
    assert manager.batch_processor.prepare_next_batch()
    state = scheduler.active_requests["x"]
    assert scheduler._requests_to_fork == [state]
    manager.cancel_request("x")
    assert not manager.batch_processor.prepare_next_batch() and not is_left(manager)
    assert not scheduler._requests_to_fork
    assert state.status == RequestStatus.FINISHED  # of which transformers takes no token


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_learn_of_it(
    model: Any, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """With tensor parallelism, by transformers' own queue."""
    manager = model.init_continuous_batching(**settings())
    monkeypatch.setattr(manager.distributed_helper, "tp_size", processes)
    manager.cancel_request("x")
    assert manager.cancel_queue.qsize() == processes - 1


def test_adapters_need_one_process(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would not learn what a request asks for."""
    manager = model.init_continuous_batching(**settings())
    monkeypatch.setattr(manager.distributed_helper, "tp_size", 2)
    with pytest.raises(RoutingError, match="one of 2 with tensor parallelism"):
        manager.add_request(PROMPT, adapter_names="plain")


def test_a_name_of_before_a_stop(stage: Any, model: Any) -> None:
    """Whatever the thread has left of it when it ended."""
    manager = by_hand(model)
    manager.add_request(PROMPT, "x", adapter_names="plain")
    assert manager.batch_processor.prepare_next_batch()
    manager.batch_processor = None  # as stop() does
    assert manager.add_request(PROMPT, "x", adapter_names="plain") == "x"
