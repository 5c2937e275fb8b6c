"""generate() and batches of other shapes, against PEFT with each adapter alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from peft_oracle import attached_llama, llama, set_weights, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

ROWS: list[Any] = ["plain", None, "rslora", "biased"]
PROMPTS = [[5, 17, 99], [201, 4, 8, 33, 120, 7], [64, 65], [90, 80, 70, 60, 50]]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return attached_llama(tmp_path_factory.mktemp("adapters"))


def alone(stage: SimpleNamespace, entry: str | None) -> Any:
    """PEFT's model, or the plain one, with one adapter."""
    if entry is None:
        return stage.base
    set_weights(stage.peft, {entry: 1.0})
    return stage.peft


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts of unequal lengths as one batch, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_left_padding(stage: SimpleNamespace) -> None:
    batch = padded(PROMPTS)
    with stage.mux.route(ROWS):
        got = stage.model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, prompt, new in zip(ROWS, PROMPTS, got, strict=True):
        want = alone(stage, row).generate(input_ids=torch.tensor([prompt]), **GREEDY)
        assert new.tolist() == want[0, len(prompt) :].tolist()


@torch.no_grad()
def test_every_returned_sequence_has_the_adapter_of_its_prompt(stage: SimpleNamespace) -> None:
    """Sampling with num_return_sequences, where PEFT raises: judged by the logits of each step."""
    ids = torch.tensor([[5, 17, 99, 3], [201, 4, 8, 33], [64, 65, 9, 2], [90, 80, 70, 60]])
    with stage.mux.route(ROWS):
        out = stage.model.generate(
            ids,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=4,
            min_new_tokens=4,
            return_dict_in_generate=True,
            output_logits=True,
        )
    got = torch.stack(out.logits, 1)  # [12, 4, vocabulary]
    for i, sequence in enumerate(out.sequences):
        want = alone(stage, ROWS[i // 3])(input_ids=sequence[None]).logits[0, 3:-1]
        torch.testing.assert_close(got[i], want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_beams_of_a_generation_config(stage: SimpleNamespace) -> None:
    """PEFT sees num_beams only as an argument, and raises here."""
    ids = torch.tensor([[5, 17, 99], [201, 4, 8], [64, 65, 9], [90, 80, 70]])
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    config = transformers.GenerationConfig(**how, pad_token_id=0, eos_token_id=255)
    names = [row or "__base__" for row in ROWS]
    want = stage.peft.generate(
        input_ids=ids, adapter_names=names, **how, pad_token_id=0, eos_token_id=255
    )
    with stage.mux.route(ROWS):
        assert torch.equal(stage.model.generate(ids, generation_config=config), want)
        before = stage.model.generation_config
        stage.model.generation_config = config
        try:
            assert torch.equal(stage.model.generate(ids), want)
        finally:
            stage.model.generation_config = before


@pytest.mark.parametrize("row", ROWS)
def test_assisted_decoding(stage: SimpleNamespace, row: Any) -> None:
    """The draft model is another model, and does not see the route."""
    ids = torch.tensor([PROMPTS[1]])
    want = alone(stage, row).generate(input_ids=ids, **GREEDY)
    draft = llama()
    with stage.mux.route([row]):
        assert torch.equal(stage.model.generate(ids, **GREEDY, assistant_model=draft), want)
        assert torch.equal(stage.model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), want)


def packed(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts one after the other in one sample, each blind to the others."""
    owner = torch.tensor([i for i, p in enumerate(prompts) for _ in p])
    position = torch.tensor([[j for p in prompts for j in range(len(p))]])
    sees = (owner[:, None] == owner) & (position[0][:, None] >= position[0])
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    ids = torch.tensor([[token for p in prompts for token in p]])
    return {"input_ids": ids, "position_ids": position, "attention_mask": mask[None, None]}


@torch.no_grad()
def test_packed_batch_by_lengths(stage: SimpleNamespace) -> None:
    batch, lengths = packed(PROMPTS), [len(p) for p in PROMPTS]
    with stage.mux.route_tokens(ROWS, lengths=lengths):
        got = stage.model(**batch, use_cache=False).logits[0].split(lengths)
    for row, prompt, logits in zip(ROWS, PROMPTS, got, strict=True):
        want = alone(stage, row)(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    with stage.mux.route(["plain"]), pytest.raises(lora_mux.LoraMuxError, match="packed batch"):
        stage.model(**batch, cu_seq_lens_q=torch.tensor([0, 3, 9, 11, 16]))
