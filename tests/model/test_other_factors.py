"""Adapters of which PEFT stores something else than A and B of a layer, against PEFT itself."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_mux
from lora_mux.errors import CheckpointError
from peft_oracle import bert, gpt2, llama, peft, qwen2, set_weights, t5, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

IDS = torch.tensor([[5, 1, 7, 3, 9], [2, 2, 8, 3, 1], [1, 4, 6, 9, 7], [3, 1, 5, 0, 2]])


def trained(base: nn.Module, folder: Path, **configs: Any) -> Any:
    """PEFT's model with adapters whose values are all different, saved in a folder."""
    model = with_adapters(base, configs)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model.eval()


def answer(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found = model(input_ids=ids, **more)
    return getattr(found, "logits", None) if hasattr(found, "logits") else found.last_hidden_state


def tokens(target: str, rows: Any = None) -> Any:
    rows = [1, 3, 9] if rows is None else rows
    return peft.LoraConfig(r=4, target_modules=[target], trainable_token_indices=rows)


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (llama, "q_proj", "embed_tokens"),
    "tied": (qwen2, "q_proj", "embed_tokens"),  # the head has the same weight
    "gpt2": (gpt2, "c_attn", "wte"),
    "t5": (t5, "q", "shared"),
    "bert": (bert, "query", "word_embeddings"),
}


@pytest.mark.parametrize("how", ["load", "attach_peft"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_trained_tokens(kind: str, how: str, tmp_path: Path) -> None:
    """Rows of the embedding, and of a head that is tied to it: each row has its own adapter's."""
    make, attention, embedding = MODELS[kind]
    torch.manual_seed(1)
    base = make()
    wanted = {
        "a": tokens(attention, rows=[1, 3, 9]),
        "b": tokens(attention, rows={embedding: [3, 0]}),
    }
    theirs = trained(base, tmp_path, **wanted)
    more = {"decoder_input_ids": IDS[:, :3]} if kind == "t5" else {}
    want = []
    rows: list[Any] = ["a", "b", None, {"a": 0.5}]  # a weight is not of the tokens
    for i, name in enumerate(rows):
        part = {key: ids[i : i + 1] for key, ids in more.items()}
        if name is None:
            want.append(answer(base, IDS[i : i + 1], **part))
            continue
        set_weights(theirs, {name: 1.0} if isinstance(name, str) else name)
        want.append(answer(theirs, IDS[i : i + 1], **part))
    set_weights(theirs, {"a": 1.0})
    if how == "load":
        model = copy.deepcopy(base)
        mux = lora_mux.attach(model)
        for name in wanted:
            mux.load(name, tmp_path / name)
    else:
        mux = lora_mux.attach_peft(theirs)
        model = mux.model
    with mux.route(rows):
        got = answer(model, IDS, **more)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    assert torch.equal(got[2], answer(base, IDS, **more)[2])
    assert mux.memory().saved_modules > 0


@pytest.mark.parametrize(
    "rows",
    [
        {"lm_head": [1, 3]},
        {"embed_tokens": [1, 3], "lm_head": [3, 9]},
        {"embed_tokens": [1, 3], "lm_head": [1, 3]},
    ],
    ids=["the head's", "each its own", "the same"],
)
@torch.no_grad()
def test_tokens_of_tied_modules(rows: dict[str, list[int]], tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = qwen2()
    theirs = trained(base, tmp_path, a=tokens("q_proj", rows))
    mux = lora_mux.attach(base)
    mux.load("a", tmp_path / "a")
    mux.set_adapter("a")
    torch.testing.assert_close(answer(base, IDS), answer(theirs, IDS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_few_tokens_take_few_rank_rows(tmp_path: Path) -> None:
    base = qwen2()
    trained(base, tmp_path, a=tokens("q_proj"))
    mux = lora_mux.attach(base)
    mux.load("a", tmp_path / "a")
    used = {path: pool.used for path, pool in mux.memory().targets.items()}
    assert used["model.embed_tokens"] == used["lm_head"] == 3


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    base = llama()
    trained(base, tmp_path, a=tokens("q_proj"))
    file = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(file.read_text())
    for rows, message in [
        ([1, 3], r"must be the 2 rows .* got \[3, 64\]"),
        ([1, 3, 256], r"of the base's \[256, 64\]"),
        ([1, 1, 3], "a list of different ints"),
        ([1, 3, -1], "a list of different ints"),
        ({"embed_tokens": [1, 3, 9], "tokens": [1, 3, 8]}, "must name each module once"),
        ({"lm_head": [1, 3, 9]}, "must be the 0 rows"),
    ]:
        file.write_text(json.dumps({**fields, "trainable_token_indices": rows}))
        mux = lora_mux.attach(copy.deepcopy(base))
        with pytest.raises(CheckpointError, match=message):
            mux.load("a", tmp_path / "a")
        assert not mux.adapters


def test_a_file_without_the_tokens_of_its_config(tmp_path: Path) -> None:
    base = llama()
    trained(base, tmp_path, a=tokens("q_proj"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "trainable" not in k}, file)
    with pytest.warns(UserWarning, match="lacks the tokens that its config trains"):
        lora_mux.attach(base).load("a", tmp_path / "a")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def blocks(a: list[str] | None, b: list[str] | None, count: int) -> Any:
    own = peft.tuners.lora.config.BdLoraConfig(
        target_modules_bd_a=a, target_modules_bd_b=b, nblocks=count, match_strict=False
    )
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], use_bdlora=own)


@pytest.mark.parametrize("how", ["load", "attach_peft"])
@torch.no_grad()
def test_factors_in_blocks(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Layers(), torch.randn(4, 12)
    wanted = {
        "both": blocks(["first"], ["second"], 2),
        "A": blocks(["first", "second"], None, 4),
        "one": blocks(None, ["second"], 1),
    }
    theirs = trained(base, tmp_path, **wanted)
    want = []
    for i, name in enumerate(wanted):
        theirs.set_adapter(name)
        want.append(theirs(x[i : i + 1]))
    want.append(base(x[3:]))
    if how == "load":
        model: Any = copy.deepcopy(base)
        mux = lora_mux.attach(model)
        mux.load_many({name: tmp_path / name for name in wanted})
    else:
        mux = lora_mux.attach_peft(theirs)
        model = mux.model
    with mux.route([*wanted, None]):
        torch.testing.assert_close(model(x), torch.cat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", ["two", 0, True, None])
def test_numbers_of_blocks(count: Any, tmp_path: Path) -> None:
    trained(Layers(), tmp_path, a=blocks(["first"], ["second"], 2))
    file = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["use_bdlora"]["nblocks"] = count
    file.write_text(json.dumps(fields))
    mux = lora_mux.attach(Layers())
    with pytest.raises(CheckpointError, match="an object with a number of blocks"):
        mux.load("a", tmp_path / "a")


@torch.no_grad()
def test_what_only_training_needs(tmp_path: Path) -> None:
    """VeLoRA keeps an embedding beside the factors; the forward pass is that of LoRA."""
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=2, init_type="random")
    base, x = Layers(), torch.randn(4, 12)
    config = peft.LoraConfig(r=4, target_modules=["first"], velora_config=velora)
    theirs = trained(base, tmp_path, a=config)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any("velora" in key for key in saved)
    sampler = {"base_model.model.first.lora_monteclora_sampler.std_prior": torch.ones(2)}
    save_file({**saved, **sampler}, tmp_path / "a" / "adapter_model.safetensors")
    mux = lora_mux.attach(base)
    mux.load("a", tmp_path / "a")
    mux.set_adapter("a")
    torch.testing.assert_close(base(x), theirs(x))
