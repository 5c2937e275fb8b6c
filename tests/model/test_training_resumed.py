"""Training that goes on elsewhere, against PEFT: the order of parameters, dropout, and targets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupted
from torch import Tensor, nn

import lora_mux
from peft_oracle import peft, transformers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers', at PEFT

IDS = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(0))


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()


def steps(model: Any, mux: lora_mux.Mux, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        with mux.route(["b"] * 3):
            logits = model(IDS).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [None, "200KiB"])
@pytest.mark.parametrize("way", ["folder", "tensors"])
def test_the_order_of_parameters_is_pefts(
    dtype: torch.dtype, memory: Any, way: str, tmp_path: Path
) -> None:
    """By it an optimizer's state finds them again. Files, and users' tensors, have another."""
    model = llama(dtype)
    mux = lora_mux.attach(model, memory=memory)
    mux.create("b", r=4, alpha=8, seed=1)
    first = mux.train("b")
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    steps(model, mux, optimizer, 3)
    mux.save("b", tmp_path)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    kept = torch.load(_saved(optimizer, tmp_path / "o.pt"))

    again = llama(dtype)
    other = lora_mux.attach(again, memory=memory)
    other.load("b", tmp_path)
    weights = None
    if way == "tensors":
        weights = {path: (w.A, w.B) for path, w in reversed(first.weights.items())}
    second = other.train("b", weights=weights)
    tuned: Any = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    names = [key for key, p in tuned.named_parameters() if p.requires_grad]
    assert [key for key, _ in second.named_parameters()] == [
        key.replace(".default", "") for key in names
    ]
    assert all(torch.equal(value, state[key]) for key, value in second.state_dict().items())
    resumed = torch.optim.AdamW(second.parameters())
    resumed.load_state_dict(kept)
    steps(model, mux, optimizer, 2)
    steps(again, other, resumed, 2)
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key


def _saved(optimizer: torch.optim.Optimizer, file: Path) -> Path:
    torch.save(optimizer.state_dict(), file)
    return file


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("memory", [None, "200KiB"])
def test_dropout_stays_what_a_checkpoint_says(memory: Any, tmp_path: Path) -> None:
    """As in PEFT's from_pretrained(is_trainable=True)."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "peft")
    model = llama()
    mux = lora_mux.attach(model, memory=memory)
    mux.load("p", tmp_path / "peft")
    mux.create("c", r=2, alpha=2, targets=["q_proj"], dropout=0.25)
    for name, rate in (("p", 0.5), ("c", 0.25)):
        mux.save(name, tmp_path / name)
        assert config_of(tmp_path / name)["lora_dropout"] == rate
        mux.load(f"{name}2", tmp_path / name)
        mux.train(f"{name}2")
        mux.save(f"{name}2", tmp_path / name)
        assert config_of(tmp_path / name)["lora_dropout"] == rate

    def masked() -> bool:
        with torch.no_grad():
            for p in mux.train("p2").parameters():
                p.fill_(0.1)
            found: list[Tensor] = []
            for _ in range(2):
                with mux.route(["p2"] * 3):
                    found.append(model(IDS).logits)
        return not torch.equal(*found)

    assert masked()
    mux.train("p2", dropout=0)
    assert not masked()


@pytest.mark.parametrize("value", [None, "0.5", 1.5, float("nan"), -1, [0.1], True])
def test_a_dropout_that_is_none_hinders_no_serving(value: Any, tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    config = {**config_of(tmp_path), "lora_dropout": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    mux = lora_mux.attach(llama())
    mux.load("p", tmp_path)
    mux.save("p", tmp_path / "again")
    assert config_of(tmp_path / "again")["lora_dropout"] == 0.0


def test_a_dropout_is_there_with_the_name() -> None:
    """Whatever line of create() an interrupt hits."""
    line, going, named = 0, True, 0
    while going:
        model = nn.Sequential(nn.Linear(6, 8)).requires_grad_(False)
        mux = lora_mux.attach(model)
        going = interrupted(lambda mux=mux: mux.create("n", r=2, alpha=2, dropout=0.5), line)
        if "n" in mux.adapters:
            mux.train("n")
            assert mux._slots.dropout, line
            named += going
        line += 1
    assert named > 2


def test_all_linear_leaves_the_head_out(tmp_path: Path) -> None:
    """Also where it carries adapters: with `memory`, or since one that touches it was loaded."""
    head = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(llama(), head).save_pretrained(tmp_path, save_embedding_layers=False)
    for memory in (None, "200KiB"):
        mux = lora_mux.attach(llama(), memory=memory)
        mux.load("head", tmp_path)
        for name, targets in (("none", None), ("all", "all-linear")):
            mux.create(name, r=2, alpha=2, targets=targets)
            keys = list(mux.train(name).state_dict())
            assert len(keys) == 2 * 2 * 7 and not any("lm_head" in key for key in keys)
        mux.create("named", r=2, alpha=2, targets=["lm_head"])
        assert len(mux.train("named").state_dict()) == 2
    mux = lora_mux.attach(llama(), targets=["q_proj", "lm_head"])  # whoever names it means it
    for targets, count in ((None, 3), ("all-linear", 2)):
        mux.create(f"{targets}", r=2, alpha=2, targets=targets)
        assert len(mux.train(f"{targets}").state_dict()) == 2 * count
