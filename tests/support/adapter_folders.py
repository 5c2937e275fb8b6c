"""Small adapters as PEFT's folders, and what they mean, without PEFT."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IN, OUT, ALPHA = 8, 6, 12


def save(folder: Path, rank: int, seed: int) -> None:
    """A PEFT folder of two layers."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(exist_ok=True)
    tensors = {}
    for layer in ("one", "two"):
        key = f"base_model.model.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, IN, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(OUT, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": ["one", "two"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def delta(folder: Path, layer: str) -> Tensor:
    """alpha / r * B A of a layer, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{layer}.lora_{f}.weight"].double() for f in "AB")
    return config["lora_alpha"] / config["r"] * B @ A
