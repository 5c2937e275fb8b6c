"""attach_peft: a live PeftModel, taken over from memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_mux
from peft_oracle import MODELS, configs, peft, save_adapters, set_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    base = MODELS[kind]()
    theirs = save_adapters(base, configs(kind), tmp_path)
    inputs = {"input_ids": torch.randint(2, 250, (3, 5))}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, 250, (3, 2))
    names = list(configs(kind))
    want = {}
    for name in names:
        set_weights(theirs, {name: 1.0})
        want[name] = theirs(**inputs)[0]
    plain = theirs.get_base_model()
    mux = lora_mux.attach_peft(theirs)
    assert mux.model is plain and list(mux.adapters) == names
    assert mux.active_adapters == [names[-1]]
    close(plain(**inputs)[0], want[names[-1]])
    for name in names:
        mux.set_adapter(name)
        close(plain(**inputs)[0], want[name])
    mux.detach()
    assert torch.equal(plain(**inputs)[0], base(**inputs)[0])
    assert list(plain.state_dict()) == list(base.state_dict())


def small(name: str = "a", **fields: Any) -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **fields)
    return peft.get_peft_model(model, config, name)


@torch.no_grad()
def test_the_state_of_the_moment() -> None:
    """Scales that were set, several active adapters, and a bias."""
    model = small(lora_bias=True)
    model.add_adapter("b", peft.LoraConfig(target_modules=["2"], init_lora_weights=False, r=3))
    set_weights(model, {"a": 0.25, "b": -2.0})
    x = torch.randn(3, 8)
    want = model(x)
    mux = lora_mux.attach_peft(model)
    assert mux.active_adapters == ["a", "b"] and mux.targets == ["0", "2"]
    close(mux.model(x), want)


@torch.no_grad()
def test_disabled_adapters_are_not_in_force() -> None:
    model = small()
    x = torch.randn(3, 8)
    model.base_model.disable_adapter_layers()
    want = model(x)
    mux = lora_mux.attach_peft(model)
    assert mux.active_adapters == [] and torch.equal(mux.model(x), want)


def dora() -> Any:
    return small(use_dora=True)


def merged() -> Any:
    model = small()
    model.merge_adapter()
    return model


def conv() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))


def head() -> Any:
    return small(modules_to_save=["2"])


REFUSED: dict[str, tuple[Any, str]] = {
    "a plain model": (lambda: nn.Linear(2, 2), "peft.PeftModel, or .* got Linear without any"),
    "DoRA": (dora, "adapter 'a'.*`use_dora` must be unset"),
    "merged": (merged, "merged adapters; call unmerge_adapter"),
    "convolution": (conv, "2-dimensional"),
    "modules_to_save": (head, "`modules_to_save` must be unset"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_change_nothing(what: str) -> None:
    build, message = REFUSED[what]
    model = build()
    before = copy.deepcopy(model)
    with pytest.raises(lora_mux.LoraMuxError, match=message):
        lora_mux.attach_peft(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    state = before.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def with_transformers(base: Any, folder: Path) -> Any:
    model = copy.deepcopy(base)
    model.load_adapter(str(folder / "plain"), "plain")
    model.load_adapter(str(folder / "biased"), "biased")
    try:
        model.set_adapter(["plain", "biased"])
    except ValueError as error:  # transformers 5.24 wants peft 0.22, which is not out
        if "version of PEFT you are using is not compatible" in str(error):
            pytest.skip(str(error))
        raise
    return model


@torch.no_grad()
def test_adapters_that_transformers_put_into_a_model(tmp_path: Path) -> None:
    base = MODELS["llama"]()
    wanted = {name: configs("llama")[name] for name in ("plain", "biased")}
    save_adapters(base, wanted, tmp_path)
    model = with_transformers(base, tmp_path)
    ids = torch.randint(2, 250, (3, 5))
    want = model(ids).logits
    mux = lora_mux.attach_peft(model)
    assert mux.model is model and mux.active_adapters == ["plain", "biased"]
    close(model(ids).logits, want)
    alone = with_transformers(base, tmp_path)
    alone.set_adapter("biased")
    with mux.route(["biased", None, "plain"]):
        got = model(ids).logits
    close(got[0], alone(ids).logits[0])
    assert torch.equal(got[1], base(ids).logits[1])
    mux.detach()
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert list(model.state_dict()) == list(base.state_dict())
    assert not hasattr(model, "peft_config")
    model.save_pretrained(tmp_path / "plain model")  # which asks the model for its adapters
    model.load_adapter(str(tmp_path / "plain"), "plain")


def test_a_model_with_adapters_of_transformers_wants_attach_peft(tmp_path: Path) -> None:
    base = MODELS["llama"]()
    wanted = {name: configs("llama")[name] for name in ("plain", "biased")}
    save_adapters(base, wanted, tmp_path)
    with pytest.raises(lora_mux.LoraMuxError, match="use attach_peft"):
        lora_mux.attach(with_transformers(base, tmp_path))
