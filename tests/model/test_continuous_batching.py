"""transformers' continuous batching, each request against PEFT with its adapters alone."""

import copy
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from continuous import alone, batching, collected, crowded
from transformers.generation.continuous_batching import ContinuousBatchingManager as Manager
from transformers.generation.continuous_batching.requests import RequestState

import lora_mux
from lora_mux.adapters import Promise
from lora_mux.errors import UnknownAdapterError
from lora_mux.model.continuous_batching.request_rows import RequestRow, route_of_tokens
from peft_oracle import attached_llama, set_weights, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPTS = [[7, 8, 9] * 5, [5, 17, 99], [7, 8, 9] * 5, [201, 4, 8, 33, 120, 7], [64, 65]]
# The third begins as the first does; the fourth is a sum with weights.
ROWS: list[Any] = ["plain", None, "rslora", {"plain": 0.5, "biased": -1.5}, "biased"]
NEW = 12


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    made = attached_llama(tmp_path_factory.mktemp("adapters"))
    base, theirs = made.base, made.peft
    answers = [alone(base, theirs, *pair, NEW) for pair in zip(PROMPTS, ROWS, strict=True)]
    # Without its adapters, each prompt gets another answer.
    for prompt, row, answer in zip(PROMPTS, ROWS, answers, strict=True):
        assert row is None or answer != alone(base, theirs, prompt, None, NEW)
    made.answers = answers
    return made


def settings(sequences: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=NEW,
            do_sample=sequences > 1,  # greedy search may return one; of the best one the same
            top_k=1 if sequences > 1 else None,
            eos_token_id=255,
            pad_token_id=0,
            num_return_sequences=sequences,
        ),
        "continuous_batching_config": batching(**fields),
    }


def generate_batch(model: Any, **fields: Any) -> list[list[int]]:
    return [
        out.generated_tokens for out in model.generate_batch(PROMPTS, **settings(**fields)).values()
    ]


def test_an_entry_for_each_request(stage: SimpleNamespace) -> None:
    """24 tokens a step: prompts come in pieces, beside tokens of requests that are further."""
    active: list[list[str]] = []
    hook = stage.model.register_forward_hook(lambda *_: active.append(stage.mux.active_adapters))
    with stage.mux.route(ROWS):
        assert generate_batch(stage.model) == stage.answers
    hook.remove()
    # In the manager's thread, what the batch of the moment holds.
    assert {name for names in active for name in names} == {"plain", "rslora", "biased"}
    assert active[0] == ["plain", "rslora"] and len({tuple(names) for names in active}) > 1
    index = torch.tensor(
        [[stage.mux.adapters["biased"], -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]
    )
    with stage.mux.route(index):
        got = generate_batch(stage.model)
    assert got[0] == alone(stage.base, stage.peft, PROMPTS[0], "biased", NEW)
    assert got[1] == stage.answers[1]


def test_one_adapter_for_all_requests(stage: SimpleNamespace) -> None:
    want = [alone(stage.base, stage.peft, prompt, "rslora", NEW) for prompt in PROMPTS]
    stage.mux.set_adapter("rslora")
    try:
        assert generate_batch(stage.model) == want
        with stage.mux.disable_adapter():
            base = generate_batch(stage.model)
    finally:
        stage.mux.set_adapter(None)
    assert base == [alone(stage.base, stage.peft, prompt, None, NEW) for prompt in PROMPTS]


def test_requests_that_come_one_by_one(stage: SimpleNamespace) -> None:
    """Each keeps what it was added with, whatever is routed while the manager's thread works."""
    with stage.model.continuous_batching_context_manager(**settings()) as manager:
        names = []
        for prompt, row in zip(PROMPTS, ROWS, strict=True):
            with stage.mux.route([row]):
                names.append(manager.add_request(prompt))
        with stage.mux.disable_adapter():
            results = collected(manager, 5)
        assert [results[name] for name in names] == stage.answers
        stage.mux.set_adapter("rslora")
        later = manager.add_request(PROMPTS[2], request_id=names[4])  # a name that is free again
        stage.mux.set_adapter(None)
        assert later == names[4] and collected(manager, 1)[later] == stage.answers[2]
        set_weights(stage.peft, {"plain": 1.0})
        ids = torch.tensor([PROMPTS[0]])
        if hasattr(manager, "pause"):  # transformers 5.15 has none
            with manager.pause(), torch.no_grad(), stage.mux.route(["plain"]):
                got, want = stage.model(ids).logits, stage.peft(ids).logits
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
        deadline = time.monotonic() + 10
        while len(manager.mux_requests) and time.monotonic() < deadline:
            time.sleep(0.01)
        kept = len(manager.mux_requests)
    assert not kept  # nothing is kept of finished requests


def test_routing_while_the_manager_works(stage: SimpleNamespace) -> None:
    """Another thread switches all the time: no batch gets its route."""
    done = threading.Event()

    def switch() -> None:
        # Waits, or the manager would get the interpreter's lock back 5 ms after each operator.
        while not done.wait(1e-4):
            with stage.mux.route(["rslora", "rslora"]):
                pass

    with stage.model.continuous_batching_context_manager(**settings()) as manager:
        with stage.mux.route(ROWS):
            names = manager.add_requests(PROMPTS)
        thread = threading.Thread(target=switch)
        thread.start()
        try:
            results = collected(manager, 5)
        finally:
            done.set()
            thread.join()
    assert [results[name] for name in names] == stage.answers


def test_several_sequences_of_one_request(stage: SimpleNamespace) -> None:
    """The children of a request, which begin with its cache, have its adapters."""
    if len(generate_batch(stage.base, sequences=3)) == len(PROMPTS):
        pytest.skip("transformers 5.15 gives back one answer of each")
    with stage.mux.route(ROWS):
        got = generate_batch(stage.model, sequences=3)
    assert got == [answer for answer in stage.answers for _ in range(3)]


def test_a_cache_that_is_too_small(stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that have to begin again keep their adapters."""
    again = []
    begin_again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: again.append(state.request_id) or begin_again(state),
    )
    with stage.mux.route(ROWS):
        assert generate_batch(stage.model, num_blocks=14, page=4) == stage.answers
    assert again


def test_the_output_head_may_be_a_target(stage: SimpleNamespace) -> None:
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model, ["lm_head"])
    A, B = torch.randn(4, 64), torch.randn(256, 4)
    mux.add_adapter("head", {"lm_head": (A, B)}, alpha=4)
    with mux.route([None, "head", None, None, "head"]):
        got = generate_batch(model)
    for prompt, answer, row in zip(PROMPTS, got, [None, "head", None, None, "head"], strict=True):
        plain = copy.deepcopy(stage.base)
        if row:
            with torch.no_grad():
                plain.lm_head.weight += B @ A
        assert answer == alone(plain, None, prompt, None, NEW)


def test_adapters_that_take_turns_in_the_memory(stage: SimpleNamespace, tmp_path: Path) -> None:
    """Each batch brings in the adapters of its requests, and none stays for requests that wait."""
    mux = crowded(stage.base, tmp_path)
    rows = ["plain", None, "rslora", "plain", "biased"]
    how = settings(max_requests_per_batch=1)
    with mux.model.continuous_batching_context_manager(**how) as manager:
        names = []
        for prompt, row in zip(PROMPTS, rows, strict=True):
            with mux.route([row]):
                names.append(manager.add_request(prompt))
        results = collected(manager, 5)
    for name, prompt, row in zip(names, PROMPTS, rows, strict=True):
        assert results[name] == alone(stage.base, stage.peft, prompt, row, NEW)


def test_batches_that_are_prepared_in_turns(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where one batch is prepared while another is computed."""
    kind = type(stage.model.init_continuous_batching(**settings()))
    ours, theirs = kind._generation_step, Manager._generation_step
    used = []

    def in_turns(self: Any) -> None:
        used.append(self.batch_processor.inputs_and_outputs)
        other = SimpleNamespace(requests_in_batch=[], num_q_tokens=1)
        pairs = [SimpleNamespace(host_io=io) for io in (other, used[-1])]
        pair = SimpleNamespace(io_pairs=pairs, current_pair=1)
        self.batch_processor.inputs_and_outputs = pair
        ours(self)

    def compute(self: Any) -> None:
        self.batch_processor.inputs_and_outputs = used[-1]  # of one kind: there is no GPU
        theirs(self)

    monkeypatch.setattr(kind, "_generation_step", in_turns)
    monkeypatch.setattr(Manager, "_generation_step", compute)
    with stage.mux.route(ROWS):
        assert generate_batch(stage.model) == stage.answers
    assert used


@pytest.mark.slow
def test_compiled(stage: SimpleNamespace) -> None:
    """Batches are then padded with tokens that belong to no request."""
    with stage.mux.route(ROWS):
        assert generate_batch(stage.model, default_compile_level=1) == stage.answers


def test_tokens_of_nobody_have_no_adapters() -> None:
    pairs = [(torch.tensor([7, 9]), torch.tensor([0.5, 2.0])), (torch.tensor([8]), torch.ones(1))]
    rows = [RequestRow(*pair, Promise(frozenset(pair[0].tolist()))) for pair in pairs]
    route = route_of_tokens(rows, [1, 2], 5)
    assert route.routing.index.tolist() == [[7, 9], [8, -1], [8, -1], [-1, -1], [-1, -1]]
    assert route.routing.weight[:2].tolist() == [[0.5, 2.0], [1.0, 0.0]]


def test_a_manager_that_outlives_the_mux(stage: SimpleNamespace) -> None:
    model = copy.deepcopy(stage.base)
    for rank in (1, 2):
        mux = lora_mux.attach(model, ["lm_head"])
        A, B = torch.randn(rank, 64), torch.randn(256, rank)
        mux.add_adapter("head", {"lm_head": (A, B)}, scaling=1.0)
        with mux.route(["head"] * 5):
            answers = model.generate_batch(PROMPTS, **settings(), persistent_manager=True)
        plain = copy.deepcopy(stage.base)
        with torch.no_grad():
            plain.lm_head.weight += B @ A
        for prompt, answer in zip(PROMPTS, answers.values(), strict=True):
            assert answer.generated_tokens == alone(plain, None, prompt, None, NEW)
        mux.detach()
    model.destroy_cached_continuous_batching_manager()


class TestRefusals:
    @pytest.mark.parametrize("rows", [ROWS[:4], [*ROWS, None]])
    def test_another_number_of_rows(self, rows: list[Any], stage: SimpleNamespace) -> None:
        message = rf"one entry per request \(5\), got {len(rows)}"
        with stage.mux.route(rows), pytest.raises(lora_mux.LoraMuxError, match=message):
            generate_batch(stage.model)
        with stage.model.continuous_batching_context_manager(**settings()) as manager:
            with stage.mux.route(rows), pytest.raises(lora_mux.LoraMuxError, match=message):
                manager.add_requests(PROMPTS)
            with stage.mux.route(ROWS), pytest.raises(lora_mux.LoraMuxError, match=r"\(1\), got 5"):
                manager.add_request(PROMPTS[0])

    def test_a_row_for_each_token(self, stage: SimpleNamespace) -> None:
        with stage.mux.route_tokens(ROWS), pytest.raises(lora_mux.LoraMuxError, match="each token"):
            generate_batch(stage.model)

    def test_sharing_of_prefixes(self, stage: SimpleNamespace) -> None:
        with pytest.raises(lora_mux.LoraMuxError, match="allow_block_sharing=False, got True"):
            generate_batch(stage.model, allow_block_sharing=True)

    def test_sharing_of_prefixes_with_adapters_that_come_later(
        self, stage: SimpleNamespace
    ) -> None:
        model = copy.deepcopy(stage.base)
        mux = lora_mux.attach(model, ["q_proj"])
        how = settings(allow_block_sharing=True)
        with model.continuous_batching_context_manager(**how) as manager:
            path = mux.targets[0]
            mux.add_adapter("late", {path: (torch.ones(1, 64), torch.ones(64, 1))}, alpha=1)
            manager.add_request(PROMPTS[0])
            with mux.route(["late"]), pytest.raises(lora_mux.LoraMuxError, match="allow_block"):
                manager.add_request(PROMPTS[0])
            assert list(collected(manager, 1).values()) == [
                alone(stage.base, None, PROMPTS[0], None, NEW)
            ]

    def test_graphs(self, stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """No GPU is needed to ask for them; here transformers would turn them off."""
        manager = SimpleNamespace(
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                allow_block_sharing=False, use_cuda_graph=(False, True)
            )
        )
        monkeypatch.setattr(type(stage.model), "init_continuous_batching", lambda model: manager)
        with pytest.raises(lora_mux.LoraMuxError, match="use_cuda_graph=False"):
            stage.model.init_continuous_batching()

    def test_an_adapter_that_is_gone(self, stage: SimpleNamespace) -> None:
        model = copy.deepcopy(stage.base)
        mux = lora_mux.attach(model, ["q_proj"])
        mux.add_adapter("a", {mux.targets[0]: (torch.ones(1, 64), torch.ones(64, 1))}, alpha=1)
        with mux.route(["a"] * 5), pytest.raises(UnknownAdapterError):
            mux.remove("a")
            generate_batch(model)
