"""A diffusion transformer whose batch mixes styles per sample, against PEFT one by one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_mux
from diffusion import diffusers, flux
from peft_oracle import peft, save_adapters, set_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


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
    got = model(**batch).sample
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5 * float(want.abs().max()))
    mux.detach()
    assert torch.equal(model(**batch).sample, base(**batch).sample)
