"""Train one query-side LoRA adapter per task with PEFT, on a frozen base."""

from __future__ import annotations

import copy
import importlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_mux

from .corpus import Corpus, Item
from .encoder import Encoder, pooled
from .tasks import Task

STEPS = 60
BATCH = 24
LEARNING_RATE = 2e-3
TEMPERATURE = 0.05
RANK = 8
ALPHA = 16
TARGETS = ("query", "key", "value", "dense")
SEED = 0


def train_adapter(
    encoder: Encoder, task: Task, corpus: Corpus, on_step: Callable[[float], None]
) -> Any:
    """Train an adapter for one task, independent of every other adapter.

    Args:
        encoder: The frozen base; it embeds the answers and stays as it is.
        task: What to train for.
        corpus: Where the training items come from.
        on_step: Called with the loss of each step.

    Returns:
        A PEFT model on a copy of the base, in evaluation mode.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = _with_new_adapter(encoder.model, task.name).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    draw = _sampler(task, corpus.train, rng)
    for _ in range(STEPS):
        loss = _loss(encoder, model, task, draw(), rng)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    return model.eval()


def save_adapter(model: Any, name: str, base_name: str, folder: Path) -> None:
    """Write `folder/name` in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    model.peft_config[name].base_model_name_or_path = base_name
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    # PEFT adds a model card of empty headings (and edits a README that it finds): keep it out.
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(scratch) / name / file, target / file)


def _with_new_adapter(base: Any, name: str) -> Any:
    peft: Any = importlib.import_module("peft")
    layers = base.config.num_hidden_layers
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(layers // 3, layers)),
    )
    try:
        return peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
    except ValueError as error:  # another base, without layers of these names
        raise lora_mux.LoraMuxError(
            f"--retrain: expected an encoder with layers called {', '.join(TARGETS)}: {error}"
        ) from error


def _sampler(task: Task, items: tuple[Item, ...], rng: random.Random) -> Callable[[], list[Item]]:
    """Draw training batches; each kind is as likely as the others, although most are methods."""
    if task.name != "kind":
        return lambda: rng.sample(items, BATCH)
    groups = [[item for item in items if item.kind == kind] for kind in task.candidates(items)]
    return lambda: [rng.choice(rng.choice(groups)) for _ in range(BATCH)]


def _loss(
    encoder: Encoder, model: Any, task: Task, items: list[Item], rng: random.Random
) -> Tensor:
    """Cross entropy over the batch's own answers, or over all of them when they are few."""
    answers = task.candidates(items)
    answer_vectors = encoder.index([task.describe(answer) for answer in answers])
    queries = [task.query(item, rng) for item in items]
    query_vectors = pooled(model, encoder.tokens(queries))
    right = torch.tensor([answers.index(task.label(item)) for item in items])
    logits = query_vectors @ answer_vectors.T / TEMPERATURE
    return torch.nn.functional.cross_entropy(logits, right)
