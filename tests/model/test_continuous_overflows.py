"""A request whose adapters overflow fails, and no other: neither beside it nor after it."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from continuous import alone, batching

import lora_mux
from peft_oracle import attached_llama, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPT, NEW = [5, 17, 99, 4], 6
ROWS = ["plain", None, {"rslora": 0.5, "biased": -1.0}, "biased"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return attached_llama(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, stage: Any) -> Any:
    """With "huge" and "wide" besides: their values are finite, what comes of them is not."""
    model = copy.deepcopy(stage.model)
    model.set_attn_implementation(request.param)
    mux = lora_mux.Mux.of(model)
    for name, ends in (("huge", ("q_proj", "v_proj")), ("wide", ("down_proj",))):
        linears = {p: model.get_submodule(p) for p in mux.targets if p.endswith(ends)}
        weights = {
            path: (torch.full((2, w.in_features), 1e30), torch.full((w.out_features, 2), 1e30))
            for path, w in linears.items()
        }
        mux.add_adapter(name, weights, alpha=2)
    return model


def answer(stage: Any, row: Any) -> list[int]:
    return alone(stage.base, stage.peft, PROMPT, row, NEW)


def outputs(manager: Any, names: list[str]) -> Iterator[Any]:
    found: dict[str, Any] = {}
    while len(found) < len(names):
        output = manager.get_result(timeout=20)
        assert output is not None, "the manager has ended"
        assert output.request_id not in found
        found[output.request_id] = output
    return map(found.__getitem__, names)


@pytest.mark.parametrize("bad", [{"plain": 1e30}, {"biased": -1e38}, "huge", "wide"])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_overflow_ends_its_own_request_alone(
    stage: Any, model: Any, bad: Any, sampled: bool
) -> None:
    config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=sampled, top_k=1, eos_token_id=255, pad_token_id=0
    )
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=batching(use_cuda_graph=False),
    ) as manager:
        for _ in range(2):
            rows = [*ROWS, bad, *ROWS]
            names = [
                manager.add_request(PROMPT, adapter_names="__base__" if row is None else row)
                for row in rows
            ]
            long = manager.add_request(PROMPT * 9, adapter_names=bad)  # more than a batch holds
            *good, failed = outputs(manager, [*names, long])
            broken = good.pop(len(ROWS))
            assert [o.generated_tokens for o in good] == [answer(stage, row) for row in ROWS] * 2
            for output in (broken, failed):
                assert "sums are finite" in output.error
        end = time.monotonic() + 20
        while manager.batch_processor.scheduler.active_requests:  # cleared before the next batch
            assert time.monotonic() < end
            time.sleep(0.01)


def test_all_sequences_of_a_request_fail_with_it(stage: Any, model: Any) -> None:
    config = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
        eos_token_id=255,
        pad_token_id=0,
    )
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=batching(use_cuda_graph=False),
    ) as manager:
        good, bad = (manager.add_request(PROMPT, adapter_names=row) for row in ("plain", "huge"))
        names = [name + end for name in (good, bad) for end in ("", "__child#0")]
        made = list(outputs(manager, names))
    assert [o.generated_tokens for o in made[:2]] == [answer(stage, "plain")] * 2
    assert all("sums are finite" in o.error for o in made[2:])
