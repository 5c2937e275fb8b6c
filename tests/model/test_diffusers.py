"""A diffusion transformer whose batch mixes styles per sample, against PEFT one by one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import add_adapters, assert_equal, differ, with_adapter
from torch import Tensor

import lora_mux
from diffusion import diffusers, flux, unet
from lora_mux.errors import RoutingError, TargetError
from peft_oracle import peft, save_adapters, set_weights, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")


def inputs(kind: str, samples: int) -> dict[str, Tensor]:
    torch.manual_seed(samples)
    if kind == "unet":
        return {
            "sample": torch.randn(samples, 4, 8, 8),
            "timestep": torch.tensor(5),
            "encoder_hidden_states": torch.randn(samples, 7, 32),
        }
    return {
        "img_ids": torch.zeros(6, 3),  # first, and no batch
        "txt_ids": torch.zeros(5, 3),
        "hidden_states": torch.randn(samples, 6, 4),
        "encoder_hidden_states": torch.randn(samples, 5, 32),
        "pooled_projections": torch.randn(samples, 16),
        "timestep": torch.full((samples,), 0.5),
    }


def rows_of(batch: dict[str, Tensor], samples: int, row: int) -> dict[str, Tensor]:
    return {
        k: v[row : row + 1] if v.ndim and len(v) == samples and "ids" not in k else v
        for k, v in batch.items()
    }


STYLES = ["to_q", "to_k", "to_v", "to_out.0"]
ROWS: list[Any] = ["ink", {"ink": 0.6, "pixel": 0.3}, None]


@pytest.mark.parametrize("kind", ["flux", "unet"])
@torch.no_grad()
def test_styles_per_sample(kind: str, tmp_path: Path) -> None:
    base = flux() if kind == "flux" else unet()
    shared = {"target_modules": STYLES, "init_lora_weights": False}
    wanted = {
        "ink": peft.LoraConfig(r=4, lora_alpha=8, **shared),
        "pixel": peft.LoraConfig(r=2, lora_alpha=6, **shared),
    }
    theirs = save_adapters(base, wanted, tmp_path)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    for name in wanted:
        mux.load(name, tmp_path / name)

    guided = inputs(kind, 6)  # classifier-free guidance: the batch of 3 twice over
    with mux.route(ROWS, expand="tile"):
        got = model(**guided).sample
    with mux.route(ROWS), pytest.raises(lora_mux.LoraMuxError, match=r'\(6\), got 3; .*"tile"'):
        model(**guided)
    for i in range(6):
        row = ROWS[i % 3]
        if row is None:
            want = base(**rows_of(guided, 6, i)).sample
        else:
            set_weights(theirs, row if isinstance(row, dict) else {row: 1.0})
            want = theirs(**rows_of(guided, 6, i)).sample
        torch.testing.assert_close(got[i], want[0], rtol=0, atol=5e-5 * float(want.abs().max()))


def pipeline(model: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
    ).eval()
    shared = {"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 100}
    text = transformers.CLIPTextConfig(**shared, hidden_size=32, intermediate_size=48)
    pipe = diffusers.StableDiffusionPipeline(
        unet=model,
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pipeline(images: int, guidance: float) -> None:
    """A pipeline repeats prompts for their images, and then all of them for guidance."""
    model = unet()
    pipe, mux = pipeline(model), lora_mux.attach(model, STYLES)
    add_adapters(model, mux, size=0.2)
    prompts, negative = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    noise = torch.randn(2 * images, 4, 8, 8)

    def run(i: slice = slice(None)) -> Tensor:
        latents = noise.unflatten(0, (2, images))[i].flatten(0, 1)
        return pipe(
            prompt_embeds=prompts[i],
            negative_prompt_embeds=negative[i],
            latents=latents,
            num_images_per_prompt=images,
            num_inference_steps=2,
            guidance_scale=guidance,
            output_type="latent",
            height=16,
            width=16,
        ).images

    want = [
        with_adapter(mux, name, lambda i=i: run(slice(i, i + 1))) for i, name in enumerate("ab")
    ]
    assert differ(with_adapter(mux, "b", lambda: run(slice(0, 1))), want[0])
    orders: dict[Any, Any] = {
        (1, 1.0): None,
        (2, 1.0): "interleave",
        (1, 5.0): "tile",
        (2, 5.0): {"interleave": 2, "tile": 2},
    }
    got = mux.call(["a", "b"], expand=orders[images, guidance])(run)
    assert_equal(got, torch.cat(want))
    if images == 2 and guidance == 5.0:
        with mux.route(["a", "b"], expand="tile"):
            with pytest.raises(RoutingError, match='"interleave": 2, "tile": 2'):
                run()
    if images == 2:
        with mux.route(["a", "b"]), pytest.raises(RoutingError, match="expand="):
            run()


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter in the format of kohya's scripts: an alpha of its own beside each pair."""
    renamed = {}
    for key, tensor in state.items():
        path, _, part = key.removesuffix(".weight").rpartition(".lora_")
        name = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        renamed[f"{name}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(6.0)
    return renamed


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@torch.no_grad()
def test_adapters_that_diffusers_loaded(style: str, tmp_path: Path) -> None:
    """load_lora_weights reads many formats; what it made of them is taken over from memory."""
    base = unet()
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    trained = copy.deepcopy(base)
    trained.add_adapter(config, "ink")
    state = {
        f"unet.{key}": tensor.clone()
        for key, tensor in peft.get_peft_model_state_dict(trained, adapter_name="ink").items()
    }
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    if style == "kohya":
        state = kohya(state)
    read, alphas = loader.lora_state_dict(state, unet_config=base.config)[:2]
    model = copy.deepcopy(base)
    for name in ("ink", "twice"):
        loader.load_lora_into_unet(read, network_alphas=alphas, unet=model, adapter_name=name)
    model.set_adapters(["ink", "twice"], [0.5, 2.0])
    batch = inputs("unet", 3)
    want = model(**batch).sample
    assert (want - base(**batch).sample).abs().max() > 1e-3
    mux = lora_mux.attach_peft(model)
    assert mux.active_adapters == ["ink", "twice"]
    with pytest.raises(TargetError, match="`set_adapters` must be asked of the Mux"):
        model.set_adapters(["ink"])
    got = model(**batch).sample
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5 * float(want.abs().max()))
    mux.detach()
    assert torch.equal(model(**batch).sample, base(**batch).sample)
