"""Models and managers of transformers' continuous batching."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
from lora_mux.errors import PoolCapacityError
from peft_oracle import configs, save_adapters, set_weights, transformers


def batching(page: int = 8, **fields: Any) -> Any:
    """A config with few small pages of cache: by itself transformers takes 60 % of the memory."""
    config = transformers.ContinuousBatchingConfig
    is_new = "page_size" in inspect.signature(config).parameters  # block_size in 5.15 to 5.17
    small = {"page_size" if is_new else "block_size": page, "num_blocks": 64}
    return config(**{"max_batch_tokens": 24, "allow_block_sharing": False, **small, **fields})


def collected(manager: Any, count: int, seconds: float = 20.0) -> dict[str, list[int]]:
    """What a manager has answered."""
    results: dict[str, list[int]] = {}
    while len(results) < count:
        result = manager.get_result(timeout=seconds)
        assert result is not None and result.error is None, result
        results[result.request_id] = result.generated_tokens
    return results


def alone(base: Any, theirs: Any, prompt: list[int], row: Any, new: int) -> list[int]:
    """What the plain model, or PEFT's with a row in force, answers to a prompt alone, greedily.

    Args:
        base: the plain model.
        theirs: PEFT's.
        prompt: its tokens.
        row: a name, names, or name -> weight; None or "__base__" = the plain model.
        new: how many tokens the answer has at most.
    """
    model = base
    if row is not None and row != "__base__":
        model = theirs
        names = [row] if isinstance(row, str) else row
        set_weights(model, row if isinstance(row, dict) else dict.fromkeys(names, 1.0))
    ids = torch.tensor([prompt])
    made: list[int] = model.generate(ids, max_new_tokens=new, do_sample=False)[0].tolist()
    return made[len(prompt) :]


def crowded(base: Any, folder: Path) -> lora_mux.Mux:
    """A copy of a Llama with three adapters, of which its memory does not hold all at once."""
    wanted = {name: configs("llama")[name] for name in ("plain", "rslora", "biased")}
    save_adapters(base, wanted, folder)
    mux = lora_mux.attach(copy.deepcopy(base), ["q_proj", "v_proj", "down_proj"], memory="44KiB")
    for name in wanted:
        mux.load(name, folder / name)
    with pytest.raises(PoolCapacityError):
        mux.prefetch(list(wanted))
    return mux
