"""Continuous batching: requests whose rows are given with the call, each against PEFT alone."""

import asyncio
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from continuous import alone, batching, collected, crowded

import lora_mux
from lora_mux.errors import (
    ArgumentTypeError,
    RoutingBusyError,
    RoutingError,
    UnknownAdapterError,
)
from peft_oracle import attached_llama, configs, save_adapters, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPTS = [[7, 8, 9] * 3, [5, 17, 99], [201, 4, 8, 33], [64, 65], [7, 8, 9]]
ROWS: list[Any] = ["plain", None, ("plain", "rslora"), {"plain": 0.5, "biased": -1.5}, "biased"]
NEW = 8


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    made = attached_llama(tmp_path_factory.mktemp("adapters"))
    made.folder = tmp_path_factory.mktemp("more")
    made.answers = [answer_to(made, *pair) for pair in zip(PROMPTS, ROWS, strict=True)]
    for prompt, row, answer in zip(PROMPTS, ROWS, made.answers, strict=True):
        assert row is None or answer != answer_to(made, prompt, None)
    return made


def answer_to(stage: SimpleNamespace, prompt: list[int], row: Any) -> list[int]:
    return alone(stage.base, stage.peft, prompt, row, NEW)


def settings(**fields: Any) -> dict[str, Any]:
    return {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
        ),
        "continuous_batching_config": batching(**{"max_batch_tokens": 16, **fields}),
    }


def test_one_by_one(stage: SimpleNamespace) -> None:
    """Under a block that has nothing to do with them, and after it."""
    rows = ["__base__" if row is None else row for row in ROWS]
    with stage.model.continuous_batching_context_manager(**settings()) as manager:
        with stage.mux.route(["rslora"] * 7):
            first = [
                manager.add_request(p, adapter_names=row)
                for p, row in zip(PROMPTS, rows, strict=True)
            ]
        again = [
            manager.add_request(p, None, NEW, adapter_names=[row])
            for p, row in zip(PROMPTS, rows, strict=True)
        ]
        results = collected(manager, 10)
    for names in (first, again):
        assert [results[name] for name in names] == stage.answers


def test_index_tensors(stage: SimpleNamespace) -> None:
    handles = stage.mux.adapters
    index = torch.tensor([handles["plain"], handles["rslora"]])
    with stage.model.continuous_batching_context_manager(**settings()) as manager:
        names = [manager.add_request(PROMPTS[2], adapter_names=i) for i in (index, index[None])]
        none = manager.add_request(PROMPTS[1], adapter_names=torch.tensor([-1]))
        results = collected(manager, 3)
    assert results[names[0]] == results[names[1]] == stage.answers[2]
    assert results[none] == stage.answers[1]


def test_many_at_once(stage: SimpleNamespace) -> None:
    with stage.model.continuous_batching_context_manager(**settings()) as manager:
        with stage.mux.disable_adapter():
            names = manager.add_requests(PROMPTS, adapter_names=ROWS)
        stage.mux.set_adapter("rslora")
        try:
            sticky = manager.add_requests(PROMPTS[:1], adapter_names=None)
        finally:
            stage.mux.set_adapter(None)
        results = collected(manager, 6)
    assert [results[name] for name in names] == stage.answers
    assert results[sticky[0]] == answer_to(stage, PROMPTS[0], "rslora")


def test_generate_batch(stage: SimpleNamespace) -> None:
    with stage.mux.route(["rslora"]):
        out = stage.model.generate_batch(PROMPTS, adapter_names=ROWS, **settings())
    assert [one.generated_tokens for one in out.values()] == stage.answers
    assert stage.model.generate_batch([], adapter_names=[]) == {}


def test_generate_batch_keeps_the_rows_that_it_began_with(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody chooses other rows before transformers has added the requests."""
    kind = type(stage.model)
    init = kind.init_continuous_batching

    def late(*args: Any, **kwargs: Any) -> Any:
        stage.mux.set_adapter("rslora")
        return init(*args, **kwargs)

    monkeypatch.setattr(kind, "init_continuous_batching", late)
    stage.mux.set_adapter("biased")
    try:
        out = stage.model.generate_batch([PROMPTS[4]], **settings())
    finally:
        stage.mux.set_adapter(None)
    assert [one.generated_tokens for one in out.values()] == [stage.answers[4]]


def from_threads(add: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=add, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def from_tasks(add: Callable[[int], None]) -> None:
    async def one(i: int) -> None:
        await asyncio.sleep(0)
        add(i)

    async def main() -> None:
        await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))

    asyncio.run(main())


@pytest.mark.parametrize("how", [from_threads, from_tasks])
def test_from_anywhere(how: Callable[[Any], None], stage: SimpleNamespace) -> None:
    """While blocks of others are open, and nobody waits for the model."""
    names: dict[int, str] = {}

    with stage.model.continuous_batching_context_manager(**settings()) as manager:

        def add(i: int) -> None:
            row = ROWS[i] or "__base__"
            names[i] = manager.add_request(PROMPTS[i], adapter_names=row)

        with stage.mux.route(["rslora"] * 3):
            how(add)
            results = collected(manager, 5)
    assert [results[names[i]] for i in range(5)] == stage.answers


def test_while_a_batch_is_computed(stage: SimpleNamespace) -> None:
    """Inside the manager's forward another thread uses the model in every way, but detach."""
    model = copy.deepcopy(stage.model)
    mux = lora_mux.Mux.of(model)
    wanted = {"late": configs("llama")["plain"]}
    theirs = save_adapters(stage.base, wanted, stage.folder)
    ids = torch.tensor([[5]])  # one token: with more, the plain model is wrong here without us
    with torch.no_grad():
        want = {"late": theirs(ids).logits, None: stage.base(ids).logits}
    done: list[str] = []
    failed: list[BaseException] = []

    def user() -> None:
        try:
            mux.load("late", stage.folder / "late")
            with torch.no_grad():
                with mux.route(["late"]):
                    same(model(ids).logits, want["late"])
                mux.set_adapter("late")
                same(model(ids).logits, want["late"])
                mux.set_adapter(None)
                same(model(ids).logits, want[None])
            with pytest.raises(RoutingBusyError, match="cannot be detached while the call"):
                mux.detach()
            mux.remove("late")
            done.append("late")
        except BaseException as error:
            failed.append(error)

    def same(got: torch.Tensor, right: torch.Tensor) -> None:
        torch.testing.assert_close(got, right, rtol=0, atol=2e-5 * float(right.abs().max()))

    def in_the_middle(module: Any, args: Any) -> None:
        if threading.current_thread().name == "user":
            return
        thread = threading.Thread(target=user, name="user")
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(in_the_middle)
    with model.continuous_batching_context_manager(**settings()) as manager:
        names = manager.add_requests(PROMPTS, adapter_names=ROWS)
        results = collected(manager, 5)
    hook.remove()
    if failed and "called without a paged attention cache" in str(failed[0]):
        pytest.skip("transformers 5.17 refuses plain passes of a model that has a manager")
    assert not failed, failed[0]
    assert [results[name] for name in names] == stage.answers
    assert len(done) > NEW
    mux.detach()


def test_requests_that_wait_keep_no_adapter_in_the_memory(
    stage: SimpleNamespace, tmp_path: Path
) -> None:
    mux = crowded(stage.base, tmp_path)
    rows = ["plain", None, "rslora", "plain", "biased"]
    how = settings(max_requests_per_batch=1)
    out = mux.model.generate_batch(PROMPTS, adapter_names=rows, **how)
    for made, prompt, row in zip(out.values(), PROMPTS, rows, strict=True):
        assert made.generated_tokens == answer_to(stage, prompt, row)


class TestRefusals:
    def test_of_one_request(self, stage: SimpleNamespace) -> None:
        cases: list[tuple[Any, type[Exception], str]] = [
            ("x", UnknownAdapterError, "unknown adapter 'x'"),
            ("", UnknownAdapterError, "unknown adapter ''"),
            (3, ArgumentTypeError, r"`adapter_names\[0\]` must be None, a name"),
            (["plain", None], ArgumentTypeError, r"`adapter_names\[0\]` must name adapters"),
            (torch.tensor([[-1], [-1]]), RoutingError, r"`adapter_names` .*\(1\), got 2"),
            (torch.tensor([[[-1]]]), RoutingError, r"`adapter_names` .*each token"),
            (torch.tensor([99]), UnknownAdapterError, "never given out"),
        ]
        with stage.model.continuous_batching_context_manager(**settings()) as manager:
            for row, kind, message in cases:
                with pytest.raises(kind, match=message):
                    manager.add_request(PROMPTS[0], adapter_names=row)
            assert not len(manager.mux_requests)
            name = manager.add_request(PROMPTS[0], adapter_names="plain")
            assert collected(manager, 1) == {name: stage.answers[0]}

    def test_none_where_rows_are_in_force(self, stage: SimpleNamespace) -> None:
        """It is an entry of `rows`, the base model, and what functions hand on by default."""
        with stage.model.continuous_batching_context_manager(**settings()) as manager:
            with (
                stage.mux.route(["plain"]),
                pytest.raises(RoutingError, match='must be "__base__" for the base model'),
            ):
                manager.add_request(PROMPTS[0], adapter_names=None)
            with stage.mux.disable_adapter():
                name = manager.add_request(PROMPTS[1], adapter_names=None)
            assert collected(manager, 1) == {name: stage.answers[1]}

    @pytest.mark.parametrize("rows", [ROWS[:4], [*ROWS, None], [None], [None] * 6])
    def test_another_number(self, rows: list[Any], stage: SimpleNamespace) -> None:
        message = rf"`adapter_names` must have one entry per request \(5\), got {len(rows)}"
        with pytest.raises(RoutingError, match=message):
            stage.model.generate_batch(PROMPTS, adapter_names=rows, **settings())
        with stage.model.continuous_batching_context_manager(**settings()) as manager:
            with pytest.raises(RoutingError, match=message):
                manager.add_requests(PROMPTS, adapter_names=rows)
            assert not len(manager.mux_requests)

    def test_without_rows_beside_the_block_of_another_thread(self, stage: SimpleNamespace) -> None:
        """As for generate(): the request may belong to the block."""
        model = copy.deepcopy(stage.base)
        mux = lora_mux.attach(model, ["q_proj"])
        mux.add_adapter("a", {mux.targets[0]: (torch.ones(1, 64), torch.ones(64, 1))}, alpha=1)
        caught: list[BaseException] = []
        ready, over = threading.Event(), threading.Event()

        def other() -> None:
            ready.wait(10)
            try:
                manager.add_request(PROMPTS[0])
            except RoutingBusyError as error:
                caught.append(error)
            names.append(manager.add_request(PROMPTS[0], adapter_names="__base__"))
            over.set()

        names: list[str] = []
        with model.continuous_batching_context_manager(**settings()) as manager:
            thread = threading.Thread(target=other)
            thread.start()
            with mux.route(["a"]):
                ready.set()
                assert over.wait(10)
            thread.join()
            assert collected(manager, 1) == {names[0]: answer_to(stage, PROMPTS[0], None)}
        assert "has no rows" in str(caught[0])
