"""Small vision-language models, and batches whose samples have any number of images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_oracle import transformers as T

LENGTH = 30
TEXT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0},
    **{"eos_token_id": None, "bos_token_id": None},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
}


def llava() -> Any:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=5,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return T.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    config = T.Gemma3Config(
        text_config=TEXT | {"sliding_window": 16},
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    model = T.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, 0, 0.5)
    return model


def idefics3() -> Any:
    config = T.Idefics3Config(
        vision_config=VISION,
        text_config=T.LlamaConfig(**TEXT),
        scale_factor=1,
        image_token_id=5,
        pad_token_id=0,
    )
    return T.Idefics3ForConditionalGeneration(config)


def qwen() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {
        **{"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2},
        **{"intermediate_size": 48, "patch_size": 4, "spatial_merge_size": 2},
        **{"temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1]},
    }
    config = T.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        video_token_id=8,
    )
    return T.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {"llava": llava, "gemma3": gemma3, "idefics3": idefics3, "qwen": qwen}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


class Grid(NamedTuple):
    """An image or a video of Qwen-VL, in patches."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


def prompts(images: Sequence[Sequence[int]], token: int = 5) -> Tensor:
    """[samples, LENGTH], where image j of sample i takes images[i][j] tokens."""
    rows = []
    for i, lengths in enumerate(images):
        row = [1]
        for length in lengths:
            row += [6, *[token] * length, 7]
        rows.append(row + [(10 + 31 * i + 7 * j) % 110 + 10 for j in range(LENGTH - len(row))])
    return torch.tensor(rows)


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(kind: str, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The inputs of each sample alone; sample i has counts[i] images."""
    ids = prompts([[4] * count for count in counts])
    found = []
    for i, count in enumerate(counts):
        one = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones(1, LENGTH).long()}
        if kind == "gemma3":
            one["token_type_ids"] = (one["input_ids"] == 5).long()
        if kind == "qwen":
            one["mm_token_type_ids"] = (one["input_ids"] == 5).int()
        if count:
            one |= _images(kind, count, seed=i)
        found.append(one)
    return found


def _images(kind: str, count: int, seed: int) -> dict[str, Tensor]:
    if kind == "qwen":
        pixels = noise(16 * count, 96, seed=seed)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    pixels = noise(count, 3, 16, 16, seed=seed)
    return {"pixel_values": pixels[None] if kind == "idefics3" else pixels}


def together(kind: str, alone: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The samples as one batch, as the model's processor makes it."""
    names = dict.fromkeys(name for one in alone for name in one)
    batch = {n: torch.cat([one[n] for one in alone if n in one]) for n in names if n != PIXELS}
    pixels = [one.get(PIXELS) for one in alone]
    if kind == "idefics3":
        most = max(0 if p is None else p.shape[1] for p in pixels)
        batch[PIXELS] = torch.zeros(len(alone), most, 3, 16, 16)
        for row, p in zip(batch[PIXELS], pixels, strict=True):
            if p is not None:
                row[: p.shape[1]] = p[0]
    elif names.keys() & {PIXELS}:
        batch[PIXELS] = torch.cat([p for p in pixels if p is not None])
    return batch


PIXELS = "pixel_values"
