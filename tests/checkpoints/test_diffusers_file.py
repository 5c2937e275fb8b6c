"""LoRA files of diffusers, against diffusers itself."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_mux
from diffusion import diffusers, flux
from lora_mux.checkpoints import BaseModel, read_diffusers_file
from peft_oracle import peft, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

FILE = "pytorch_lora_weights.safetensors"
STYLES = ["to_q", "to_v", "to_out.0"]


def text_encoder() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    ).eval()


INPUTS = {
    "hidden_states": torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)),
    "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)),
    "pooled_projections": torch.randn(2, 16, generator=torch.Generator().manual_seed(3)),
    "timestep": torch.full((2,), 0.5),
    "img_ids": torch.zeros(6, 3),
    "txt_ids": torch.zeros(5, 3),
}


def trained(base: Any, targets: list[str], **fields: Any) -> tuple[dict[str, Tensor], Any]:
    """A LoRA of the model, and its config, as a training script has them at its end."""
    model = copy.deepcopy(base)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
    model.add_adapter(config, "default")
    return peft.get_peft_model_state_dict(model, adapter_name="default"), model.peft_config


CONFIGS: dict[str, dict[str, Any]] = {
    "one rank": {"r": 4, "lora_alpha": 4},
    "an alpha": {"r": 4, "lora_alpha": 6},
    "patterns": {"r": 4, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 3}},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "a bias": {"r": 3, "lora_alpha": 3, "lora_bias": True},
}


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_part_of_each_model(name: str, metadata: bool, tmp_path: Path) -> None:
    """One file for two models. Without metadata its alphas are lost, in diffusers as well."""
    base, encoder = flux(), text_encoder()
    state, configs = trained(base, STYLES, **CONFIGS[name])
    of_text, text_configs = trained(encoder, ["q_proj"], r=2, lora_alpha=8)
    known = {
        "transformer_lora_adapter_metadata": configs["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": text_configs["default"].to_dict(),
    }
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path, state, of_text, **(known if metadata else {})
    )
    theirs = copy.deepcopy(base)
    loader = diffusers.FluxPipeline
    read, _, fields = loader.lora_state_dict(
        tmp_path, return_alphas=True, return_lora_metadata=True
    )
    loader.load_lora_into_transformer(read, None, theirs, adapter_name="ink", metadata=fields)
    want = theirs(**INPUTS).sample
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    mux.load("ink", tmp_path)
    with mux.route([None, "ink"]):
        got = model(**INPUTS).sample
    plain = base(**INPUTS).sample
    assert torch.equal(got[0], plain[0]) and (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5 * float(want.abs().max()))

    ids = torch.randint(64, (1, 5))
    theirs = copy.deepcopy(encoder)
    config = text_configs["default"]
    if not metadata:
        config.lora_alpha = config.r
    theirs.load_adapter(peft_config=config, adapter_state_dict=of_text)
    text_mux = lora_mux.attach(encoder, ["q_proj"])
    text_mux.load("ink", tmp_path)
    text_mux.set_adapter("ink")
    torch.testing.assert_close(encoder(ids).last_hidden_state, theirs(ids).last_hidden_state)


@torch.no_grad()
def test_the_file_of_one_model(tmp_path: Path) -> None:
    base = flux()
    theirs = copy.deepcopy(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=STYLES, init_lora_weights=False)
    theirs.add_adapter(config, "ink")
    theirs.save_lora_adapter(tmp_path, "ink")
    mux = lora_mux.attach(base, STYLES)
    mux.load("ink", tmp_path)
    mux.set_adapter("ink")
    want = theirs(**INPUTS).sample
    got = base(**INPUTS).sample
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def tensors(*keys: str) -> dict[str, Tensor]:
    return {k: torch.ones(2, 8) if k.endswith("lora_A.weight") else torch.ones(8, 2) for k in keys}


PAIR = ("transformer.0.lora_A.weight", "transformer.0.lora_B.weight")
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "kohya's": (tensors("lora_unet_0.lora_down.weight"), "another format; load it with diffusers"),
    "diffusers' older": (tensors("unet.0.lora.down.weight"), "another format; .* attach_peft"),
    "an alpha": (tensors(*PAIR, "transformer.0.alpha"), "another format"),
    "other models": (
        tensors("unet.x.lora_A.weight", "vae.x.lora_A.weight"),
        r"others \(unet, vae\); attach with targets",
    ),
    "two that fit": (
        tensors(*PAIR, *(key.replace("former.", "former_2.") for key in PAIR)),
        r"several \(transformer, transformer_2\); say which one by component=",
    ),
    "half a pair": (tensors(PAIR[0]), "lora_B.weight is missing"),
    "not finite": ({PAIR[0]: torch.full((2, 8), torch.nan), **tensors(PAIR[1])}, "finite"),
    "no row": ({PAIR[0]: torch.ones(0, 8), PAIR[1]: torch.ones(8, 0)}, r"shape is \[0, 8\]"),
    "half a convolution": (
        {PAIR[0]: torch.ones(2, 8, 1, 1), **tensors(PAIR[1])},
        r"lora_B.weight' must be as lora_A, with a kernel of 1, got shape \[8, 2\]",
    ),
    "nothing": ({}, "one component"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path) -> None:
    state, message = REFUSED[what]
    save_file(state, tmp_path / FILE)
    refused(tmp_path, message)


CONFIG_REFUSED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "must be JSON"),
    "too long": (" " * (1 << 20) + "{}", "must be at most 1048576 bytes"),
    "a list": ("[1]", "must hold a JSON object"),
    "DoRA": (
        json.dumps({f"transformer.{k}": v for k, v in [("peft_type", "LORA"), ("use_dora", 1)]}),
        "`use_dora` must be unset",
    ),
    "another rank": (
        json.dumps({f"transformer.{k}": v for k, v in [("peft_type", "LORA"), ("r", 3)]}),
        "the config's rank 3",
    ),
}


@pytest.mark.parametrize("what", CONFIG_REFUSED)
def test_refused_metadata(what: str, tmp_path: Path) -> None:
    metadata, message = CONFIG_REFUSED[what]
    save_file(tensors(*PAIR), tmp_path / FILE, metadata={"lora_adapter_metadata": metadata})
    refused(tmp_path, message)


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\x00" * 20)
    refused(tmp_path, "whole safetensors file")


@pytest.mark.parametrize("memory", [None, "64KiB"], ids=["unbounded", "bounded"])
@torch.no_grad()
def test_values_of_other_components_are_not_read(memory: str | None, tmp_path: Path) -> None:
    """They lie before, between and behind those of this model, and would be refused."""
    A, B = torch.randn(2, 8), torch.randn(8, 2, dtype=torch.float16)
    state = dict(zip(PAIR, (A, B), strict=True))
    for component in ("a", "z"):
        state[f"{component}.x.lora_A.weight"] = torch.full((5, 5), torch.nan)
        state[f"{component}.x.lora_B.weight"] = torch.full((5, 5), torch.nan, dtype=torch.float16)
    save_file(state, tmp_path / FILE)
    values = read_diffusers_file(tmp_path, BaseModel(["0"])).read(False)
    assert values.data.numel() == A.nbytes + B.nbytes
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    weight = model[0].weight.clone()
    mux = lora_mux.attach(model, memory=memory)
    mux.load("ink", tmp_path)
    mux.set_adapter("ink")
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), x @ (weight + B.float() @ A).T)


def test_a_rank_of_its_own_for_each_of_thousands(tmp_path: Path) -> None:
    """Their ranks are looked up, not matched by patterns: that would take hours."""
    begin, header = 0, {}
    for i in range(5000):
        for part, shape in (("A", [1 + i, 1]), ("B", [1, 1 + i])):
            end = begin + 4 * (1 + i)
            offsets = [begin, end]
            header[f"{i}.lora_{part}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": offsets,
            }
            begin = end
    text = json.dumps(header).encode()
    with (tmp_path / FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    outline = read_diffusers_file(tmp_path, BaseModel(["0"])).outline
    assert outline.rank_rows == {str(i): 1 + i for i in range(5000)}
    assert set(outline.scaling.values()) == {1.0}


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    save_file(tensors(*PAIR), tmp_path / "another tenant's")
    (tmp_path / "mine" / FILE).symlink_to(tmp_path / "another tenant's")
    refused(tmp_path / "mine", "must be a file of its folder, got a link to")


def refused(folder: Path, message: str) -> None:
    mux = lora_mux.attach(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(lora_mux.LoraMuxError, match=message) as caught:
        mux.load("ink", folder)
    assert FILE in str(caught.value) and not mux.adapters


def test_a_folder_with_peft_s_files_is_peft_s(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, r=2)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    save_file(tensors("lora_unet_0.lora_down.weight"), tmp_path / FILE)
    mux = lora_mux.attach(model)
    mux.load("a", tmp_path)
    assert list(mux.adapters) == ["a"]


def test_paths_are_no_patterns(tmp_path: Path) -> None:
    """A stranger's path with a rank of its own is compared literally."""
    odd = {"transformer.[.lora_A.weight": torch.ones(1, 8)}
    odd["transformer.[.lora_B.weight"] = torch.ones(8, 1)
    save_file(tensors(*PAIR) | odd, tmp_path / FILE)
    mux = lora_mux.attach(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(lora_mux.LoraMuxError, match=r"'\[' must be a target"):
        mux.load("ink", tmp_path)


def clip(kind: Any, width: int) -> Any:
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": 2}
    return kind(transformers.CLIPTextConfig(**sizes, vocab_size=64, projection_dim=16)).eval()


@pytest.mark.parametrize("widths", [(32, 32), (32, 48)])
@torch.no_grad()
def test_the_text_encoders_of_sdxl(widths: tuple[int, int], tmp_path: Path) -> None:
    """Sizes tell components apart, else component= does; names of transformers 4 are known."""
    kinds = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    parts, file = dict(zip(("text_encoder", "text_encoder_2"), kinds, strict=True)), {}
    for component, width in zip(parts, widths, strict=True):
        for layer in range(2):
            path = f"{component}.text_model.encoder.layers.{layer}.self_attn.q_proj"
            file[f"{path}.lora_A.weight"] = torch.randn(4, width) * 0.3
            file[f"{path}.lora_B.weight"] = torch.randn(width, 4) * 0.3
    save_file(file, tmp_path / FILE)
    ids = torch.tensor([[0, 5, 6, 2]])
    for (component, kind), width in zip(parts.items(), widths, strict=True):
        theirs, model = clip(kind, width), clip(kind, width)
        diffusers.StableDiffusionXLPipeline.load_lora_into_text_encoder(
            dict(file), None, theirs, prefix=component
        )
        mux = lora_mux.attach(model)
        if widths[0] == widths[1]:
            with pytest.raises(lora_mux.errors.CheckpointError, match="several .*component="):
                mux.load("x", tmp_path)
            with pytest.raises(lora_mux.errors.CheckpointError, match="it has text_encoder, text"):
                mux.load("x", tmp_path, component="unet")
            mux.load("x", tmp_path, component=component)
        else:
            mux.load("x", tmp_path)
        mux.set_adapter("x")
        want = theirs(ids).last_hidden_state
        assert (want - clip(kind, width)(ids).last_hidden_state).abs().max() > 1e-2
        torch.testing.assert_close(model(ids).last_hidden_state, want)
