"""PEFT's own tests, restated against our API, where no other file of ours asks the same.

PEFT                                                        here, or in
TestMixedAdapterBatches::..._mlp, ..._conv1d                test_peft.py::test_mixed_batch
    ..._different_target_layers, ..._partly_overlapping     test_adapters_of_other_layers
    ..._length_mismatch_raises, ..._wrong_adapter_name      test_refusals.py
    ..._disabled                                            test_peft.py::test_disabled_wins_...
    ..._with_dora_raises                                    test_checkpoint.py
    ..._mha_raises                                          test_multihead_attention_is_refused
TestMultipleActiveAdapters::..._forward                     test_peft.py::test_several_summed
TestMultiRankAdapter                                        test_peft.py ("patterns")
test_add_weighted_adapter_negative_weight_...               test_negated_weights
test_adapter_name_makes_no_difference                       test_names_make_no_difference
test_add_adapter_rejects_duplicate_name_without_mutation    test_refusals.py ("name: taken")
test_delete_adapter_with_multiple_adapters_works            test_removing_one_of_several
test_weight_bias_attributes                                 test_weight_and_bias
TestLoraInitialization::..._scaling_..., rank_alpha_...     test_checkpoint.py::test_scaling
TestHotSwapping::..._different_ranks_alphas,                test_loading_another_adapter_in_place
    ..._missing_key_works, ..._extra_key_raises
TestDecoderModels, TestEncoderDecoderModels::
    ..._generate_with_mixed_adapter_batches                 test_peft.py::test_generate
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from peft_oracle import peft, save_adapters, set_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 16)
        self.lin2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.lin1(torch.relu(self.lin0(x))))
        return self.lin2(x)  # type: ignore[no-any-return]


def config(*targets: str, **fields: Any) -> Any:
    return peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, **fields)


def both(folder: Path, **wanted: Any) -> tuple[Any, MLP, lora_mux.Mux]:
    """PEFT's model and ours over the same base, with the same saved adapters."""
    base = MLP()
    theirs = save_adapters(base, wanted, folder)
    mux = lora_mux.attach(base)
    for name in wanted:
        mux.load(name, folder / name)
    return theirs, base, mux


X = torch.linspace(-1, 1, 90).reshape(9, 10)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [(["lin0"], ["lin1"]), (["lin0", "lin1"], ["lin1", "lin2"])],
    ids=["different", "partly overlapping"],
)
@torch.no_grad()
def test_adapters_of_other_layers(first: list[str], second: list[str], tmp_path: Path) -> None:
    theirs, ours, mux = both(tmp_path, a=config(*first, r=4), b=config(*second, r=16))
    names = ["__base__", "a", "b"] * 3
    with mux.route(names):
        got = ours(X)
    close(got, theirs(X, adapter_names=names))
    for name in "ab":
        mux.set_adapter(name)
        theirs.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        close(got[rows], ours(X)[rows])
        close(got[rows], theirs(X)[rows])


@torch.no_grad()
def test_negated_weights(tmp_path: Path) -> None:
    theirs, ours, mux = both(tmp_path, a=config("lin0", "lin2", lora_alpha=3))
    theirs.add_weighted_adapter(["a"], [-1.0], "minus", combination_type="cat")
    theirs.set_adapter("minus")
    mux.set_adapter({"a": -1.0})
    close(ours(X), theirs(X))


@pytest.mark.parametrize("name", ["lora_A", "base_layer", "default.weight", "a b/ü", "0", "lin0"])
@torch.no_grad()
def test_names_make_no_difference(name: str, tmp_path: Path) -> None:
    theirs, ours, mux = both(tmp_path, plain=config("lin0", "lin1"))
    mux.load(name, tmp_path / "plain")
    with mux.route([name, None, ("plain", name)] * 3):
        got = ours(X)
    set_weights(theirs, {"plain": 2.0})
    close(got[2::3], theirs(X)[2::3])
    set_weights(theirs, {"plain": 1.0})
    close(got[0::3], theirs(X)[0::3])


@torch.no_grad()
def test_removing_one_of_several(tmp_path: Path) -> None:
    """PEFT makes another adapter active; here a route that still names it raises."""
    theirs, ours, mux = both(tmp_path, a=config("lin0"), b=config("lin0"), c=config("lin2"))
    mux.set_adapter(["a", "b"])
    mux.remove("a")
    with pytest.raises(lora_mux.errors.UnknownAdapterError, match="was removed"):
        ours(X)
    assert mux.active_adapters == ["b"] and list(mux.adapters) == ["b", "c"]
    mux.set_adapter(["b", "c"])
    set_weights(theirs, {"b": 1.0, "c": 1.0})
    close(ours(X), theirs(X))


def test_weight_and_bias(tmp_path: Path) -> None:
    base = MLP()
    weight, bias = base.lin0.weight, base.lin0.bias
    lora_mux.attach(base)
    assert base.lin0.weight is weight and base.lin0.bias is bias


@torch.no_grad()
def test_loading_another_adapter_in_place(tmp_path: Path) -> None:
    """Another rank and alpha, and layers that the first did not touch, or no longer does."""
    theirs, ours, mux = both(tmp_path, a=config("lin0", "lin1", r=8, lora_alpha=16))
    theirs.add_adapter("next", config("lin1", "lin2", r=3, lora_alpha=5))
    theirs.save_pretrained(tmp_path)
    mux.remove("a")
    mux.load("a", tmp_path / "next")
    mux.set_adapter("a")
    theirs.set_adapter("next")
    close(ours(X), theirs(X))
    narrow = lora_mux.attach(other := MLP(), ["lin1"])
    before = other(X)
    with pytest.raises(lora_mux.errors.AdapterError, match="'lin2' must be a target"):
        narrow.load("a", tmp_path / "next")
    assert torch.equal(other(X), before) and not narrow.adapters


def test_multihead_attention_is_refused() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    assert lora_mux.attach(model).targets == ["out"]
    for targets in (["mha"], ["mha.out_proj"]):
        plain = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
        with pytest.raises(lora_mux.errors.TargetError):
            lora_mux.attach(plain, targets)
