"""A request that the cache can never hold fails, and no other; so does one without tokens."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from continuous import alone, batching, collected, crowded

from lora_mux.errors import InputError
from lora_mux.model.continuous_batching.lengths import most_tokens
from peft_oracle import attached_llama, transformers

# Before, a cache holds two tokens less than its room, and generate_batch waits for what failed.
pytest.importorskip("transformers", "5.23")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPT, NEW = [5, 17, 99, 4], 6
ROOM = 32  # tokens
ENTRIES = pytest.mark.parametrize("entry", ["plain", "__base__"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return attached_llama(tmp_path_factory.mktemp("adapters"))


def answer(stage: Any, entry: str, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    return alone(stage.base, stage.peft, prompt, entry, new)


def settings(**fields: Any) -> dict[str, Any]:
    config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
    )
    small = {"page": 4, "num_blocks": ROOM // 4} | fields
    return {"generation_config": config, "continuous_batching_config": batching(**small)}


@pytest.fixture
def model(stage: Any) -> Any:
    return copy.deepcopy(stage.model)


@ENTRIES
def test_refused_when_it_is_added(stage: Any, model: Any, entry: str) -> None:
    with model.continuous_batching_context_manager(**settings()) as manager:
        wrong = {"at least one token, got none": [], rf"at most {ROOM} tokens .*, got 33": [7] * 33}
        for text, prompt in wrong.items():
            with pytest.raises(InputError, match=text):
                manager.add_request(prompt, adapter_names=entry)
            with pytest.raises(InputError, match=text):  # before any of them is added
                manager.add_requests([PROMPT, prompt], adapter_names=[entry, entry])
        assert not len(manager.mux_requests)
        name = manager.add_request(iter(PROMPT), adapter_names=entry)
        assert collected(manager, 1) == {name: answer(stage, entry)}
        assert manager.is_running()


@ENTRIES
def test_added_before_the_cache_is_there(stage: Any, model: Any, entry: str) -> None:
    manager = model.init_continuous_batching(**settings())
    with pytest.raises(InputError, match="got none"):
        manager.add_request([], adapter_names=entry)
    names = [manager.add_request(p, adapter_names=entry) for p in (PROMPT, [7] * 33, PROMPT)]
    manager.start()
    results = [manager.get_result(timeout=20) for _ in names]
    manager.stop(block=True, hard_stop=True)
    found = {output.request_id: output for output in results}
    assert f"at most {ROOM} tokens" in found[names[1]].error
    for name in (names[0], names[2]):
        assert found[name].generated_tokens == answer(stage, entry)
    assert not len(manager.mux_requests) and not manager.mux._adapters.has_promises


def test_generate_batch_answers_the_others(stage: Any, model: Any) -> None:
    prompts = [PROMPT, [], [7] * 33, PROMPT]
    rows = ["plain", "plain", "biased", None]
    found = [*model.generate_batch(prompts, adapter_names=rows, **settings()).values()]
    assert "at least one token" in found[1].error and f"at most {ROOM}" in found[2].error
    assert [found[i].generated_tokens for i in (0, 3)] == [
        answer(stage, entry) for entry in ("plain", "__base__")
    ]


@ENTRIES
def test_one_that_grows_beyond_the_cache(stage: Any, model: Any, entry: str) -> None:
    with model.continuous_batching_context_manager(**settings()) as manager:
        large = manager.add_request(PROMPT, max_new_tokens=90, adapter_names=entry)
        small = manager.add_request(PROMPT, adapter_names="biased")
        found = {o.request_id: o for o in (manager.get_result(timeout=20) for _ in range(2))}
        assert found[small].generated_tokens == answer(stage, "biased")
        assert f"at most {ROOM} tokens" in found[large].error
        again = manager.add_request(PROMPT, large, adapter_names=entry)
        assert collected(manager, 1) == {again: answer(stage, entry)}
        full = manager.add_request([7] * ROOM, max_new_tokens=1, adapter_names=entry)
        assert collected(manager, 1) == {full: answer(stage, entry, [7] * ROOM, 1)}


def by_hand(model: Any) -> tuple[Any, Callable[[], bool]]:
    """A manager, and what makes and computes its next batch, without its thread."""
    manager = model.init_continuous_batching(**settings())
    processor = manager.batch_processor = manager._create_batch_processor()

    def batch() -> bool:
        if is_made := processor.prepare_next_batch():
            manager._generation_step()
            processor.update_batch()
        return is_made

    return manager, batch


def test_one_that_fails_while_another_grows(stage: Any, model: Any) -> None:
    """The other has made room for it at that moment, and begins again."""
    manager, batch = by_hand(model)
    prompts = [7] * 16, [8] * 9
    grows, fails = (
        manager.add_request(p, max_new_tokens=8, adapter_names="plain") for p in prompts
    )
    assert all(batch() for _ in range(5))
    del manager.mux_requests._requests[fails]  # as if it had been added past the manager
    assert not batch()
    while batch():
        pass
    outputs = [manager.output_router.output_queue.get(timeout=1) for _ in prompts]
    assert [o.request_id for o in outputs] == [fails, grows] and outputs[0].error
    assert outputs[1].generated_tokens == answer(stage, "plain", prompts[0], 8)


def test_a_full_cache_whose_adapters_have_no_room(stage: Any, tmp_path: Path) -> None:
    """While another's block keeps those of the running request out, both wait."""
    mux = crowded(stage.base, tmp_path)
    manager, batch = by_hand(mux.model)
    prompt, entries = [7] * (ROOM - 8), ("rslora", "__base__")

    names = [manager.add_request(prompt, adapter_names=entries[0])]
    assert batch() and batch()
    with mux.route(["plain", "biased"]):
        names.append(manager.add_request(prompt, adapter_names=entries[1]))
        assert not batch()
    while batch():
        pass
    outputs = {
        o.request_id: o for o in (manager.output_router.output_queue.get(timeout=1) for _ in names)
    }
    for name, entry in zip(names, entries, strict=True):
        assert outputs[name].generated_tokens == answer(stage, entry, prompt)


def test_a_model_that_sees_the_last_tokens_only() -> None:
    """Its cache holds a request of any length."""
    sliding, none = SimpleNamespace(read_cache_limit=8), SimpleNamespace(read_cache_limit=None)
    for cache, scheduler in ((sliding, none), (none, sliding)):
        assert most_tokens(SimpleNamespace(cache=cache, scheduler=scheduler)) is None
