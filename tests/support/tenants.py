"""A small model and the adapters of many tenants, in PEFT folders and in fp64."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_mux
from oracle import Adapter, forward

KINDS = ("weight", "bias")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"first": (12, 10), "second": (10, 7)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(*SIZES["first"])
        self.second = nn.Linear(*SIZES["second"])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tenant:
    """An adapter: the factors of the layers that it touches, and a folder that holds it."""

    folder: Path
    parts: Mapping[str, Adapter]
    # The weight and the bias of "second", if the adapter saved that as a whole, and their seed.
    saved: tuple[Tensor, Tensor] | None = None
    saved_seed: int | None = None

    @property
    def rows(self) -> dict[str, int]:
        return {p: len(part.A) + (part.magnitude is not None) for p, part in self.parts.items()}

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {path: (part.A, part.B) for path, part in self.parts.items()}


def tenant(
    folder: Path,
    ranks: Mapping[str, int],
    seed: int,
    saved_seed: int | None = None,
    dora: bool = False,
) -> Tenant:
    """A tenant's adapter, saved as PEFT would; with a seed for "second" that as a whole."""
    generator = torch.Generator().manual_seed(seed)
    parts, tensors = {}, {}
    for path, r in ranks.items():
        K, N = SIZES[path]
        A = torch.randn(r, K, generator=generator) / K**0.5
        B = torch.randn(N, r, generator=generator) / r**0.5
        magnitude = 0.5 + torch.rand(N, generator=generator) if dora else None
        parts[path] = Adapter(A, B, 4.0 / r, magnitude=magnitude)
        if magnitude is not None:
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
        tensors |= {
            f"base_model.model.{path}.lora_A.weight": A,
            f"base_model.model.{path}.lora_B.weight": B,
        }
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 4, "use_dora": dora}
    config["rank_pattern"] = dict(ranks)
    config["target_modules"] = list(ranks)
    saved = None
    if saved_seed is not None:
        K, N = SIZES["second"]
        generator = torch.Generator().manual_seed(saved_seed)
        weight = torch.randn(N, K, generator=generator) / K**0.5
        saved = weight, torch.randn(N, generator=generator)
        config["modules_to_save"] = ["second"]
        tensors |= {f"base_model.model.second.{n}": t for n, t in zip(KINDS, saved, strict=True)}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return Tenant(folder, parts, saved, saved_seed)


Row = Sequence[tuple[Tenant, float]]  # what one row selects


def truth(model: Model, x: Tensor, rows: Sequence[Row]) -> Tensor:
    """The model's answer in fp64, each row with its own tenants."""

    def of(path: str) -> list[list[tuple[Adapter, float]]]:
        return [[(t.parts[path], w) for t, w in row if path in t.parts] for row in rows]

    with torch.no_grad():
        h = forward(model.first, x, of("first"))
        y = forward(model.second, torch.tanh(h), of("second"))
        for m, row in enumerate(rows):
            for weight, bias in [t.saved for t, _ in row if t.saved is not None][:1]:
                own = torch.tanh(h[m]) @ model.second.weight.double().T + model.second.bias.double()
                y[m] += torch.tanh(h[m]) @ weight.double().T + bias.double() - own
        return y


def check(model: Model, x: Tensor, rows: Sequence[Row]) -> None:
    """Under the route in force, the model answers the truth."""
    with torch.no_grad():
        got = model(x)
    # Sums whose terms cancel are off by dozens of these units, another tenant's answer by millions.
    unit = torch.finfo(got.dtype).eps * max(1.0, got.abs().max().item())
    error = (got.double() - truth(model, x, rows)).abs().max().item() / unit
    assert error <= 64, f"{error:.1f} units of eps * max|y|"


def attached(rank_rows: int) -> tuple[Model, lora_mux.Mux]:
    """A model whose pools have exactly `rank_rows` rank rows in each layer."""
    model = Model()
    row = sum(4 * 2 * 16 + 1 for _ in SIZES)  # both widths of both layers round up to 16
    return model, lora_mux.attach(model, memory=rank_rows * row)
