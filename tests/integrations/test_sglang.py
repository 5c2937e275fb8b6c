"""A composed folder as SGLang 0.5.23 reads and computes it, with the code of its wheel, on the CPU.

The rest of SGLang needs a GPU. Its wheel alone, 38 MB to download and 223 MB on disk, is enough:

    pip install --no-deps sglang==0.5.23
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_mux
from peft_oracle import llama, peft, save_adapters

FOUND = importlib.util.find_spec("sglang")
if FOUND is None:
    pytest.skip(
        "needs SGLang's wheel: pip install --no-deps sglang==0.5.23", allow_module_level=True
    )

# Packages without what they import, and names that are for annotations here.
PACKAGES = "sglang", "sglang.srt.configs", "sglang.srt.model_loader", "sglang.srt.utils"
STAND_INS = {
    "sglang.srt.configs.load_config": "LoadConfig",
    "sglang.srt.lora.backend.base_backend": "BaseLoRABackend",
    "sglang.srt.model_executor.forward_batch_info": "ForwardBatch",
    "sglang.srt.model_loader.loader": "DefaultModelLoader",
    "sglang.srt.utils.hf_transformers_utils": "AutoConfig",
}
SLICES = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
TARGETS = {"sql": "all-linear", "french": ["q_proj", "v_proj"], "legal": ["q_proj", "v_proj"]}
RANKS = {"sql": 8, "french": 4, "legal": 3}
MAX_RANK = 16


@pytest.fixture(scope="module")
def sglang() -> Iterator[Any]:
    """SGLang's own config, adapter, names of targets, and reference."""
    (root,) = FOUND.submodule_search_locations or ()
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PACKAGES, *STAND_INS):
            module = types.ModuleType(name)
            if name in STAND_INS:
                setattr(module, STAND_INS[name], object)
            else:
                module.__path__ = [str(Path(root, *name.split(".")[1:]))]
            patch.setitem(sys.modules, name, module)
        yield SimpleNamespace(
            LoRAConfig=importlib.import_module("sglang.srt.lora.lora_config").LoRAConfig,
            LoRAAdapter=importlib.import_module("sglang.srt.lora.lora").LoRAAdapter,
            utils=importlib.import_module("sglang.srt.lora.utils"),
            ops=importlib.import_module("sglang.srt.lora.torch_ops.lora_ops"),
        )
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PEFT's model with all adapters, and their folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    wanted = {
        name: peft.LoraConfig(
            r=RANKS[name],
            lora_alpha=2 * RANKS[name],
            target_modules=targets,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        for name, targets in TARGETS.items()
    }
    model = save_adapters(llama(), wanted, folder)
    return SimpleNamespace(model=model, folders={name: folder / name for name in TARGETS})


def delta(model: Any, path: str, row: dict[str, float]) -> torch.Tensor:
    """PEFT's change of a layer's weight."""
    layer = model.get_base_model().get_submodule(path)
    total = torch.zeros_like(layer.weight, dtype=torch.float64)
    for name, weight in row.items():
        if name in getattr(layer, "lora_A", {}):
            total += weight * layer.get_delta_weight(name).double()
    return total


@pytest.mark.parametrize("text", ["sql+-0.4*french", "0.5*french+2*legal", "legal", "sql+french"])
def test_a_mix_is_the_one_of_peft(sglang: Any, stage: Any, tmp_path: Path, text: str) -> None:
    """Beside rows of the base model, in buffers in which another adapter has left NaN."""
    row = lora_mux.parse_row(text)
    mix = lora_mux.compose(stage.folders, row, tmp_path / "mix")
    config = sglang.LoRAConfig(str(mix))
    rank = config.r
    assert rank == sum(RANKS[name] for name in row)
    # Its memory pool refuses other targets than --lora-target-modules.
    targets = sglang.utils.get_normalized_target_modules(config.target_modules)
    assert targets <= {name.rpartition(".")[2] for name in SLICES}
    base = stage.model.get_base_model()
    adapter = sglang.LoRAAdapter("1", config, base.config, None, None)
    adapter.initialize_weights_from_tensors(load_file(mix / "adapter_model.safetensors"))
    ranks, scalings = torch.tensor([0, rank]), torch.tensor([0.0, adapter.scaling])
    segments, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
    for i, layer in enumerate(adapter.layers):
        for merged, paths in SLICES.items():
            if merged.rpartition(".")[2] not in targets:
                continue
            prefix = f"model.layers.{i}"
            key = f"base_model.model.{prefix}.{merged}"
            own_A, own_B = (layer.weights.pop(f"{key}.lora_{f}.weight") for f in "AB")
            A = torch.full((2, len(paths) * MAX_RANK, own_A.shape[1]), torch.nan)
            B = torch.full((2, len(own_B), MAX_RANK), torch.nan)
            A[1, : len(own_A)], B[1, :, :rank] = own_A, own_B
            wanted = [delta(stage.model, f"{prefix}.{path}", row) for path in paths]
            ends = torch.tensor([0, *(len(part) for part in wanted)]).cumsum(0)
            x = torch.randn(5, own_A.shape[1])
            h = sglang.ops.sgemm_lora_a_fwd(
                x, A, segments, lengths, ranks, scalings, num_slices=len(paths)
            )
            y = sglang.ops.sgemm_lora_b_fwd(h, B, segments, lengths, ranks, ends)
            want = x.double() @ torch.cat(wanted).T
            torch.testing.assert_close(y[2:].double(), want[2:], rtol=1e-5, atol=1e-5)
            assert not y[:2].any() and want[2:].abs().max() > 1e-2
        assert not layer.weights  # all that was composed was computed
