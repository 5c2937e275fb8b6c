"""Keys of other times and of wrappers, and copies of the base's weights, against PEFT itself."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_mux
from lora_mux.checkpoints import BaseModel, peft_folder
from lora_mux.errors import ArgumentTypeError, CheckpointError, LoraMuxError
from peft_oracle import llama, peft, qwen2, save_adapters, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.tensor([[20, 21, 22], [7, 8, 9]])


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def rewrite(folder: Path, change: Any) -> None:
    """Give each key of a saved adapter another name."""
    tensors = load_file(folder / FILE)
    save_file({change(key): tensor.clone() for key, tensor in tensors.items()}, folder / FILE)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def saved(folder: Path) -> Any:
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    return save_adapters(small(), {"a": config}, folder)


NAMES = {
    "plain": lambda key: key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled inside": lambda key: key.replace(".lora", "._orig_mod.lora", 1),
    "parallel": lambda key: f"module.{key}",
    "parallel inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "both": lambda key: f"_orig_mod.module.{key}",
    "a live model's": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prefixes_that_wrappers_leave(name: str, tmp_path: Path) -> None:
    theirs, x = saved(tmp_path), torch.randn(3, 8)
    rewrite(tmp_path / "a", NAMES[name])
    mux = lora_mux.attach(model := small())
    mux.load("a", tmp_path / "a")
    mux.set_adapter("a")
    close(model(x), theirs(x))


def test_names_that_are_the_model_s_own_are_kept(tmp_path: Path) -> None:
    """A module that is named like a wrapper's prefix is meant as it is."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"q": nn.Linear(8, 8)}), "q": nn.Linear(8, 8)})
    config = peft.LoraConfig(r=2, target_modules=["module.q"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    mux = lora_mux.attach(model)
    mux.load("a", tmp_path)
    assert [len(mux._layers[path].mux_pool.spans) for path in ("module.q", "q")] == [1, 0]


def test_two_names_for_one_module_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "a" / FILE)
    more = {f"module.{key}": tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | more, tmp_path / "a" / FILE)
    with pytest.raises(CheckpointError, match="must be the only one for its tensor"):
        lora_mux.attach(small()).load("a", tmp_path / "a")


@pytest.mark.filterwarnings("ignore:.*modules that its config")
@torch.no_grad()
def test_a_mapping_of_the_user_s(tmp_path: Path) -> None:
    """As PEFT's load_adapter(key_mapping=): the first pattern that matches counts."""
    saved(tmp_path)
    rewrite(tmp_path / "a", lambda key: key.replace(f"{PREFIX}0.", f"{PREFIX}old.first."))
    mapping = {r"^old\.(first|0)\.": "0.", r"^old\.": "2."}
    theirs = peft.PeftModel.from_pretrained(small(), tmp_path / "a", key_mapping=mapping)
    mux, x = lora_mux.attach(model := small()), torch.randn(3, 8)
    with pytest.raises(LoraMuxError, match=r"'old\.first' must be a target"):
        mux.load("a", tmp_path / "a")
    mux.load("a", tmp_path / "a", key_mapping=mapping)
    mux.set_adapter("a")
    close(model(x), theirs.eval()(x))
    for wrong in (3, {"(": ""}, {"a": 3}, {"a": r"\1"}):
        with pytest.raises(ArgumentTypeError, match="`key_mapping` must map patterns"):
            mux.load("b", tmp_path / "a", key_mapping=wrong)  # type: ignore[arg-type]


def llava() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=48, image_size=16, patch_size=8, projection_dim=32
    )
    text = transformers.LlamaConfig(
        **sizes, vocab_size=128, intermediate_size=64, pad_token_id=0, eos_token_id=None
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=5, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_names_that_transformers_has_changed(tmp_path: Path) -> None:
    """language_model.model.layers became model.language_model.layers, which PEFT knows, too."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(2):
        path = f"{PREFIX}language_model.model.layers.{layer}.self_attn.q_proj"
        for part, shape in (("A", (4, 32)), ("B", (32, 4))):
            tensors[f"{path}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, tmp_path / FILE)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ".*lang.*q_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    theirs = peft.PeftModel.from_pretrained(llava(), tmp_path).eval()
    want = theirs(input_ids=IDS).logits
    model = llava()
    base = model(input_ids=IDS).logits
    assert (want - base).abs().max() > 1e-3
    mux = lora_mux.attach(model)
    mux.load("old", tmp_path)
    with mux.route(["old", None]):
        got = model(input_ids=IDS).logits
    close(got[0], want[0])
    assert torch.equal(got[1], base[1])


class OfTransformers4(nn.Module):
    """Which has its own patterns of former names, the first of which that matches counts."""

    _checkpoint_conversion_mapping = {
        r"^visual": "model.visual",
        r"^model(?!\.(language_model|visual))": "model.language_model",
        r"q$": "k",
    }


@pytest.mark.parametrize("of_transformers", [True, False])
def test_names_that_transformers_4_has_changed(
    of_transformers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not of_transformers:  # nobody has imported it, so that the model is not one of its own
        monkeypatch.delitem(sys.modules, "transformers")
    targets = ["model.visual.blocks.0.q", "model.language_model.layers.0.q", "blocks.k"]
    base = BaseModel(targets, OfTransformers4())
    assert base.path("visual.blocks.0.q") == targets[0]
    assert base.path(f"{PREFIX}model.layers.0.q") == targets[1]
    assert base.path("blocks.q") == targets[2]
    for name in (*targets, "visual.blocks.1.q"):  # those of the model, and one of none
        assert base.path(name) == name


def test_a_transformers_that_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before 5.0. Without them its own former names mean nothing, and other ones still do."""
    old, new = "language_model.model.layers.0.q", "model.language_model.layers.0.q"
    targets = [new, "encoder.q"]
    assert BaseModel(targets, llava()).path(old) == new
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    base = BaseModel(targets, llava())
    assert base.path(old) == old and base.path("text_model.encoder.q") == "encoder.q"


def with_head(base: Any, folder: Path, **fields: Any) -> Any:
    """PEFT's model with LoRA on the output head, of which it saves the base's weight as well."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, **fields
    )
    theirs = save_adapters(base, {"a": config}, folder)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(folder / "a" / FILE)
    return theirs


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("memory", [None, "1MiB"])
@pytest.mark.parametrize("make", [llama, qwen2])  # qwen2 has one weight for input and output
@torch.no_grad()
def test_an_adapter_of_the_head(make: Any, memory: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = make()
    theirs = with_head(base, tmp_path)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model, memory=memory)
    before = mux.targets
    mux.load("a", tmp_path / "a")
    assert set(mux.targets) - {"lm_head"} == set(before) - {"lm_head"}
    with mux.route(["a", None]):
        got = model(IDS).logits
    close(got[0], theirs(IDS).logits[0])
    assert torch.equal(got[1], base(IDS).logits[1])
    mux.detach()
    assert type(model.lm_head) is nn.Linear and torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@torch.no_grad()
def test_copies_that_are_not_the_base_s_are_refused(tmp_path: Path) -> None:
    base = llama()
    with_head(base, tmp_path)
    for dtype in (torch.bfloat16, torch.float64):  # as they were saved from another dtype
        other = copy.deepcopy(base).to(dtype)
        lora_mux.attach(other).load("a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    key = f"{PREFIX}lm_head.base_layer.weight"
    last = tensors[key].clone()
    last[-1, -1] += 0.5
    for wrong in (last, tensors[key][:-1].clone()):
        save_file(tensors | {key: wrong}, tmp_path / "a" / FILE)
        mux = lora_mux.attach(copy.deepcopy(base))
        targets = mux.targets
        with pytest.raises(CheckpointError, match=r"copy of 'lm_head\.weight' must be equal"):
            mux.load("a", tmp_path / "a")
        assert mux.targets == targets and not mux.adapters


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_copy_of_a_weight_that_the_base_does_not_show(tmp_path: Path) -> None:
    """An 8-bit head cannot be compared with the one that the adapter was trained on."""
    base = llama()
    with_head(base, tmp_path)
    weight = torch.zeros(256, 64, dtype=torch.int8)
    base.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    mux = lora_mux.attach(base)
    targets = mux.targets
    with pytest.raises(CheckpointError, match="got a base that is quantised.*nothing compares"):
        mux.load("a", tmp_path / "a")
    assert mux.targets == targets and not mux.adapters


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_file_that_changes_between_its_header_and_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama()
    with_head(base, tmp_path)
    shared = peft_folder.shared_outline

    def saved_again(*given: Any) -> Any:
        (tmp_path / "new").write_bytes((tmp_path / "a" / FILE).read_bytes())
        (tmp_path / "new").rename(tmp_path / "a" / FILE)
        return shared(*given)

    mux = lora_mux.attach(base)
    with monkeypatch.context() as patch:
        patch.setattr(peft_folder, "shared_outline", saved_again)
        with pytest.raises(CheckpointError, match="must stay as it is while it is read"):
            mux.load("a", tmp_path / "a")
    assert not mux.adapters
    mux.load("a", tmp_path / "a")


BIASED: dict[str, dict[str, Any]] = {
    "those of LoRA's layers": {"bias": "lora_only"},
    "all": {"bias": "all"},
    "beside lora_bias": {"bias": "all", "lora_bias": True, "use_rslora": True},
    "nothing else": {"bias": "lora_only", "lora_alpha": 0},
}


@pytest.mark.filterwarnings("ignore:.*not produce the same output")
@pytest.mark.parametrize("memory", [None, "1MiB"])
@pytest.mark.parametrize("name", BIASED)
@torch.no_grad()
def test_biases_that_were_trained_along(name: str, memory: Any, tmp_path: Path) -> None:
    base = qwen2()  # with biases on q, k and v
    for key, parameter in base.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    wanted = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=wanted, init_lora_weights=False, **BIASED[name])
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    for key, parameter in trained.named_parameters():
        if key.endswith("bias") and (BIASED[name]["bias"] == "all" or "q_proj" in key):
            parameter += torch.randn_like(parameter) / 2
    trained.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model, memory=memory)
    mux.load("a", tmp_path)
    with mux.route(["a", None]):
        got = model(IDS).logits
    close(got[0], theirs(IDS).logits[0])
    assert torch.equal(got[1], base(IDS).logits[1])


@pytest.mark.filterwarnings("ignore:.*not produce the same output")
@torch.no_grad()
def test_a_bias_that_was_trained_along_of_a_convolution(tmp_path: Path) -> None:
    """Beside LoRA on another layer, so that it has no factors of its own."""
    base = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5))
    config = peft.LoraConfig(r=2, target_modules=["2"], bias="all", init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(base), config)
    trained.base_model.model[0].bias += torch.randn(4)
    trained.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    model, x = copy.deepcopy(base), torch.randn(2, 3, 3, 3)
    mux = lora_mux.attach(model, ["0", "2"])
    mux.load("a", tmp_path)
    with mux.route(["a", None]):
        got = model(x)
    close(got[0], theirs(x)[0])
    assert torch.equal(got[1], base(x)[1])


@pytest.mark.filterwarnings("ignore:.*not produce the same output")
@torch.no_grad()
def test_biases_that_no_adapter_can_hold(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    config = peft.LoraConfig(target_modules=["0"], bias="all", init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(model), config)
    trained.save_pretrained(tmp_path)
    lora_mux.attach(copy.deepcopy(model)).load("a", tmp_path)  # that of the norm has not changed
    trained.base_model.model[1].bias += 1
    trained.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"copy of '1\.bias' must be equal"):
        lora_mux.attach(copy.deepcopy(model)).load("a", tmp_path)


@torch.no_grad()
def test_copies_of_embeddings_that_were_saved_on_demand(tmp_path: Path) -> None:
    """save_embedding_layers=True: the whole embedding and head, beside LoRA on other layers."""
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}model.embed_tokens.weight" in load_file(tmp_path / FILE)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    mux.load("a", tmp_path)
    mux.set_adapter("a")
    close(model(IDS).logits, theirs(IDS).logits)


@torch.no_grad()
def test_a_head_that_joins_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = llama()
    mux = lora_mux.attach(model)
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    mux.add_adapter("q", {"model.layers.0.self_attn.q_proj": (A, B)}, alpha=1)
    run = torch.compile(model, backend="eager")
    with mux.route(["q", None]):
        close(run(IDS).logits, model(IDS).logits)
    mux.add_adapter("head", {"lm_head": (A, torch.randn(256, 2))}, alpha=1)
    base = model(IDS).logits
    with mux.route(["head", "q"]):
        got = run(IDS).logits
        close(got, model(IDS).logits)
    assert (got[0] - base[0]).abs().max() > 0.1


def test_other_targets_than_all_linear_are_all_that_is_meant() -> None:
    mux = lora_mux.attach(llama(), ["q_proj"])
    with pytest.raises(LoraMuxError, match="'lm_head' must be a target"):
        mux.add_adapter("a", {"lm_head": (torch.ones(1, 64), torch.ones(256, 1))}, alpha=1)


def test_a_head_that_an_adapter_does_not_fit_does_not_join() -> None:
    mux = lora_mux.attach(llama())
    targets, q = mux.targets, "model.layers.0.self_attn.q_proj"
    A, B = torch.ones(1, 64), torch.ones(256, 1)
    for weights in ({"lm_head": (A, B[1:])}, {"lm_head": (A, B), "nowhere": (A, B)}):
        with pytest.raises(lora_mux.errors.AdapterError, match="lm_head.*must have|must be a targ"):
            mux.add_adapter("a", weights, alpha=1)
        assert mux.targets == targets
    mux.add_adapter("a", {"lm_head": (A, B), q: (A, torch.ones(64, 1))}, alpha=1)
    assert mux.targets == [*targets, "lm_head"]
