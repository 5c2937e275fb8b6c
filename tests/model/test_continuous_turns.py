"""Who waits while the adapters of a request of continuous batching do not fit, and for how long."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous import batching, collected

import lora_mux
from peft_oracle import llama, peft, save_adapters, set_weights, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

PROMPT, NEW = [5, 17, 99, 4], 6
RANKS = {"tiny": 3, "a": 6, "mid": 5, "b": 6, "wide": 8, "whole": 20}
ROOM = 20  # rank rows


class Stage:
    """A Llama whose memory holds 20 rank rows, PEFT's, and what was in each batch."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = llama()
        wanted = {
            name: peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
            for name, rank in RANKS.items()
        }
        self.peft = save_adapters(self.base, wanted, folder)
        rows = lora_mux.attach(copy.deepcopy(self.base), ["q_proj"]).memory().targets.values()
        memory = ROOM * sum(pool.row_bytes for pool in rows)
        self.mux = lora_mux.attach(copy.deepcopy(self.base), ["q_proj"], memory=memory)
        self.mux.load_many({name: folder / name for name in RANKS})
        self.manager = self.mux.model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
            ),
            continuous_batching_config=batching(max_batch_tokens=64, num_blocks=256),
        )
        self.batches: list[list[str]] = []
        self.meanwhile: Callable[[], Any] = list
        self.rows: dict[str, Any] = {}
        self.mux.model.model.layers[1].register_forward_pre_hook(self._step)

    def _step(self, *_: Any) -> None:
        """In the manager's thread, in which no other batch is made meanwhile."""
        self.batches.append([*self.manager.batch_processor.scheduler.active_requests])
        self.meanwhile()

    def add(self, row: Any, **how: Any) -> str:
        name: str = self.manager.add_request(PROMPT, adapter_names=row, **how)
        self.rows[name] = row
        return name

    def first_batch(self, name: str) -> int:
        return next(i for i, batch in enumerate(self.batches) if name in batch)

    def check(self) -> None:
        """Each answer is PEFT's; it ends, and nothing is kept of anybody."""
        results: dict[str, list[int]] = {}
        while len(results) < len(self.rows):  # more come meanwhile
            results |= collected(self.manager, 1)
        self.manager.stop(block=True)
        wanted = {row: self._answer(row) for row in {*self.rows.values()}}
        for name, row in self.rows.items():
            new = len(results[name])
            assert results[name] == wanted[row][:new] and new in (1, NEW)
        assert not self.mux._adapters.has_promises

    def _answer(self, row: str) -> list[int]:
        set_weights(self.peft, {row: 1.0})
        how = {"max_new_tokens": NEW, "do_sample": False}
        made: list[int] = self.peft.generate(input_ids=torch.tensor([PROMPT]), **how)[0].tolist()
        return made[len(PROMPT) :]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.manager.stop(block=True, hard_stop=True)


def test_what_fits_beside_the_first_passes(stage: Stage) -> None:
    """The wide one waits for one of a, mid and b, and leaves room for two of them."""
    for row in ("a", "mid", "b"):
        stage.add(row)
    wide, *later = (stage.add(row) for row in ("wide", "a", "mid", "b", "tiny", "a"))
    stage.manager.start()
    stage.check()
    a, mid, b, tiny, again = (stage.first_batch(name) for name in later)
    assert a == mid == again == 0 < stage.first_batch(wide) < b == tiny


def test_order_is_kept_otherwise(stage: Stage) -> None:
    """One that needs all the room is passed by nobody, and those behind it keep their order."""
    stage.add("a")
    whole, b, a, wide = (stage.add(row) for row in ("whole", "b", "a", "wide"))
    stage.manager.start()
    stage.check()
    starts = [stage.first_batch(name) for name in (whole, b, a, wide)]
    assert starts[0] == NEW and starts[1:] == [2 * NEW] * 3


@pytest.mark.parametrize("waits", ["wide", "whole"])
def test_nobody_waits_for_ever(stage: Stage, waits: str) -> None:
    """Others come without end. It goes when those have ended that ran when it came."""
    rows, added = ("a", "mid", "b", "tiny"), list[str]()

    def feed() -> None:
        step = len(stage.batches)
        if step == 3:
            added.append(stage.add(waits))
        if step < 16:
            added.extend(stage.add(row) for row in rows)

    stage.meanwhile = feed
    stage.add("a")
    stage.manager.start()
    stage.check()
    (slow,) = (name for name in added if stage.rows[name] == waits)
    went = stage.first_batch(slow)
    assert went <= 3 + NEW
    passed = [name for name in added[added.index(slow) :] if stage.first_batch(name) < went]
    assert bool(passed) == (waits == "wide")


def test_adapters_that_lie_in_the_way_move(stage: Stage) -> None:
    """Those of a and b are in use without end, and what is free beside them lies in two parts."""
    stage.mux.prefetch(["tiny"])
    for row in ("tiny", "a", "mid", "b"):
        stage.mux.prefetch([row])
        stage.add(row)
    added: list[str] = []

    def feed() -> None:
        step = len(stage.batches)
        if step == 1:
            added.append(stage.add("wide"))
        if step < 16:
            added.extend((stage.add("a"), stage.add("b")))

    stage.meanwhile = feed
    stage.manager.start()
    stage.check()
    assert stage.first_batch(added[0]) <= 1 + NEW


def test_one_that_is_pinned_meanwhile(stage: Stage) -> None:
    """There was room for all three, and now there is none: the other two leave theirs."""
    added: list[str] = []

    def feed() -> None:
        step = len(stage.batches)
        if step == 1:
            added.append(stage.add("wide"))
        if step == 3:
            stage.mux.pin("b")
        if step < 16:
            added.extend((stage.add("a"), stage.add("mid")))

    stage.meanwhile = feed
    for row in ("a", "mid", "b"):
        stage.add(row)
    stage.manager.start()
    stage.check()
    passed = [name for name in added[1:] if stage.first_batch(name) in (2, 3)]
    assert passed and stage.first_batch(added[0]) <= 3 + 1 + NEW


def test_the_first_is_cancelled(stage: Stage) -> None:
    """It is cancelled, and nobody waits for it any more."""
    for row in ("a", "mid", "b"):
        stage.add(row)
    gone = stage.manager.add_request(PROMPT, adapter_names="whole")
    later = stage.add("b")

    def cancel() -> None:
        if len(stage.batches) == 2:
            stage.manager.cancel_request(gone)

    stage.meanwhile = cancel
    stage.manager.start()
    stage.check()
    assert stage.first_batch(later) == 2


def test_the_last_one_leaves_no_promise(stage: Stage) -> None:
    """It waits, and is over in its first batch."""
    stage.add("a")
    stage.add("whole", max_new_tokens=1)
    stage.manager.start()
    stage.check()
    stage.mux.detach()
