"""Small models, and adapters made and saved by PEFT itself: the oracle for semantics."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import lora_mux

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

transformers.logging.set_verbosity_error()


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=255,
            pad_token_id=0,
            bos_token_id=1,
        )
    ).eval()


def qwen2() -> Any:
    """With biases on q, k and v, and one head for input and output."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=255,
            pad_token_id=0,
            bos_token_id=1,
        )
    ).eval()


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            eos_token_id=255,
            pad_token_id=0,
            bos_token_id=1,
        )
    ).eval()


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=256,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()


def bert() -> Any:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    ).eval()


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5, "bert": bert}


def configs(model: str) -> dict[str, Any]:
    """Adapters of every supported kind, each on its own layers with its own ranks and scales."""
    first, second, third = {
        "llama": ("q_proj", "v_proj", "down_proj"),
        "qwen2": ("q_proj", "v_proj", "down_proj"),
        "gpt2": ("c_attn", "c_fc", "mlp.c_proj"),
        "t5": ("q", "v", "wo"),
        "bert": ("query", "value", "output.dense"),
    }[model]
    layers = {"gpt2": "h", "t5": "block", "bert": "layer"}.get(model, "layers")
    common = {"init_lora_weights": False, "fan_in_fan_out": model == "gpt2"}

    def config(*targets: str, **fields: Any) -> Any:
        return peft.LoraConfig(**{"target_modules": list(targets), **common, **fields})

    return {
        "plain": config(first, second),
        "rank1": config(third, r=1, lora_alpha=3),
        "rank64": config(first, third, r=64, lora_alpha=16),
        "rslora": config(first, second, third, r=5, lora_alpha=16, use_rslora=True),
        "biased": config(second, third, r=4, lora_alpha=6, lora_bias=True),
        "patterns": config(
            first,
            second,
            third,
            r=6,
            lora_alpha=12,
            rank_pattern={first: 3, rf"{layers}\.1\..*{second}": 9},
            alpha_pattern={second: 5, third: 7.5},
        ),
        "rs-patterns": config(
            first, second, use_rslora=True, rank_pattern={second: 3}, alpha_pattern={first: 4}
        ),
        "regex": config(**{"target_modules": rf".*\.{layers}\.0\..*{first.split('.')[-1]}"}),
        "one-layer": config(first, second, layers_to_transform=[1], layers_pattern=layers),
        "excluding": config(first, second, exclude_modules=[second]),
        "all-linear": config(**{"target_modules": "all-linear"}, r=2, lora_alpha=4),
        "dropout": config(first, lora_dropout=0.5),
        "alpha0": config(first, second, lora_alpha=0),
        "negative": config(second, third, lora_alpha=-8),
    }


def with_adapters(
    base: nn.Module, wanted: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Any:
    """A PeftModel over a copy of `base` with these adapters."""
    model: Any = None
    half = {} if dtype is None else {"autocast_adapter_dtype": False}  # else PEFT keeps fp32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of names that begin like its own prefixes
        for seed, (name, config) in enumerate(wanted.items()):
            torch.manual_seed(seed)
            if model is None:
                model = peft.get_peft_model(copy.deepcopy(base), config, name, **half)
            else:
                model.add_adapter(name, config, **half)
    return model.eval()


def save_adapters(
    base: nn.Module, wanted: Mapping[str, Any], folder: Path, dtype: torch.dtype | None = None
) -> Any:
    """A PeftModel over a copy of `base` with these adapters, which are saved as folder/name."""
    model = with_adapters(base, wanted, dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            with torch.no_grad():  # the same numbers wherever the model is
                parameter.copy_(torch.randn(parameter.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of embeddings that it saves along
        model.save_pretrained(folder)
    return model


def set_weights(model: Any, weights: Mapping[str, float]) -> None:
    """Activate these adapters of a PeftModel, each scaled by its weight."""
    model.base_model.set_adapter(list(weights))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            for name, weight in weights.items():
                module.set_scale(name, weight)


def attached_llama(folder: Path) -> SimpleNamespace:
    """A plain model, PEFT's with three adapters, and ours with the same ones, saved in a folder."""
    torch.manual_seed(0)
    base = llama()
    wanted = {name: configs("llama")[name] for name in ("plain", "rslora", "biased")}
    theirs = save_adapters(base, wanted, folder)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    for name in wanted:
        mux.load(name, folder / name)
    return SimpleNamespace(base=base, peft=theirs, model=model, mux=mux)
