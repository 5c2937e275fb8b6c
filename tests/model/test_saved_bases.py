"""What savers of models write of an attached one: the plain checkpoint, byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_mux

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
}
WAYS: dict[str, Callable[[Any, Path], object]] = {
    "save_file": lambda model, file: safetensors.torch.save_file(model.state_dict(), file),
    "save_model": lambda model, file: safetensors.torch.save_model(model, str(file)),
    "torch.save": lambda model, file: torch.save(model.state_dict(), file),
    "save_pretrained": lambda model, file: model.save_pretrained(file),
}


def contents(path: Path) -> dict[str, Any]:
    """Each file's bytes; of a pickle, which also has the names of all modules, the values'."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    if path.read_bytes().startswith(b"PK"):
        return {key: value.numpy().tobytes() for key, value in torch.load(path).items()}
    return {"": path.read_bytes()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_saved_as_if_it_were_plain(tmp_path: Path, way: str, tied: bool) -> None:
    """With adapters in its layers, its head and its embedding, of which one is trained."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    if way == "save_file" and tied:
        with pytest.raises(RuntimeError, match="share memory"):  # of a plain one as well
            WAYS[way](model, tmp_path / "file")
        return
    (tmp_path / "plain").mkdir(), (tmp_path / "attached").mkdir()
    WAYS[way](model, tmp_path / "plain" / "saved")
    mux = lora_mux.attach(model)
    tokens = (torch.ones(1, 30), torch.ones(16, 1))
    mux.add_adapter("tokens", {"model.embed_tokens": tokens}, alpha=1)
    mux.add_adapter("head", {"lm_head": (torch.ones(1, 16), torch.ones(30, 1))}, alpha=1)
    mux.create("learns", r=2, alpha=4)
    mux.train("learns")
    with mux.route(["head", "tokens", "learns"]):
        model(torch.zeros(3, 2, dtype=torch.long)).logits.sum().backward()
        WAYS[way](model, tmp_path / "attached" / "saved")
    saved, plain = (contents(tmp_path / name / "saved") for name in ("attached", "plain"))
    assert saved == plain and plain


def test_what_is_trained_is_saved_by_the_mux(tmp_path: Path) -> None:
    """safetensors refuses B, which lies transposed; save_model and torch take it."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8))
    mux = lora_mux.attach(model)
    mux.create("new", r=2, alpha=4, seed=0)
    new, file = mux.train("new"), str(tmp_path / "new.safetensors")
    with torch.no_grad():
        for p in new.parameters():
            p.normal_()
    want = {key: p.clone() for key, p in new.state_dict().items()}
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.torch.save_file(new.state_dict(), file)
    safetensors.torch.save_model(new, file)
    mux.save("new", tmp_path)
    folder = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for found in (safetensors.torch.load_file(file), folder):
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], value) for key, value in want.items())
    with torch.no_grad():
        for p in new.parameters():
            p.zero_()
    new.load_state_dict(folder)
    assert all(torch.equal(p, want[key]) for key, p in new.state_dict().items())
