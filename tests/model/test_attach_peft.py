"""attach_peft: a live PeftModel, taken over from memory."""

import copy
import importlib
from collections import OrderedDict
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


def two(**fields: Any) -> Any:
    """Adapters a and b in the same two layers, of other ranks in the second."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = peft.LoraConfig(
        target_modules=["0", "1"], init_lora_weights=False, rank_pattern={"1": 3}, **fields
    )
    both = peft.get_peft_model(model, config, "a")
    both.add_adapter("b", config)
    return both.eval()


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "set_scale")]


def some_scaled(model: Any) -> None:
    layers(model)[1].set_scale("a", 0.25)


def active_twice(model: Any) -> None:
    model.base_model.set_adapter(["a", "a", "b"])


def scaled(model: Any) -> None:
    model.base_model.set_adapter(["a", "b"])
    for layer in layers(model):
        layer.scale_layer(0.3)
        layer.set_scale("b", -2.0)


def absent(model: Any) -> None:
    """One layer holds only one of the adapters, both of which are active."""
    layers(model)[1].delete_adapter("b")
    model.base_model.set_adapter(["a", "b"])


def off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


# What was done to two() -> the weights that are in force then; None: refused, by the layers' names
STATES: dict[Any, Any] = {
    some_scaled: {"a": 1.0},
    active_twice: {"a": 2.0, "b": 1.0},
    scaled: {"a": 0.3, "b": -2.0},
    absent: {"a": 1.0, "b": 1.0},
    off: {},
    lambda model: layers(model)[1].set_adapter("b"): None,
    lambda model: layers(model)[0].enable_adapters(False): None,
}


@pytest.mark.filterwarnings("ignore:.*scales that differ from layer to layer")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("number", range(len(STATES)))
@torch.no_grad()
def test_each_layer_has_its_own_state(number: int, rslora: bool) -> None:
    act, weights = list(STATES.items())[number]
    model, x = two(use_rslora=rslora), torch.randn(3, 8)
    act(model)
    want = model(x)
    if weights is None:
        with pytest.raises(lora_mux.errors.CheckpointError, match=r"active in '[01]' and not in"):
            lora_mux.attach_peft(model)
        assert torch.equal(model(x), want)
        return
    mux = lora_mux.attach_peft(model)
    close(mux.model(x), want)
    found = mux._router.rows().route
    got = {} if found is None else found.routing.weight[0].tolist()
    assert got == pytest.approx(list(weights.values()) or {})
    assert mux.active_adapters == list(weights)


@torch.no_grad()
def test_weights_count_from_what_was_trained() -> None:
    """A scale that was set does not change what a weight of 1 means."""
    model, x = two(), torch.randn(3, 8)
    want = model(x)
    scaled(model)
    mux = lora_mux.attach_peft(model)
    mux.set_adapter("a")
    close(mux.model(x), want)


@torch.no_grad()
def test_ranks_that_hot_swapping_has_padded() -> None:
    model, x = small(r=2), torch.randn(3, 8)
    want = model(x)
    hotswap = importlib.import_module("peft.utils.hotswap")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    mux = lora_mux.attach_peft(model)
    close(mux.model(x), want)
    assert mux.memory().adapters["a"].rank_rows == 4


@torch.no_grad()
def test_a_failure_puts_pefts_layers_back() -> None:
    model = small().half()
    layers(model)[0].lora_A["a"].weight = nn.Parameter(torch.full((8, 8), 1e6))
    before = list(map(type, model.modules()))
    with pytest.raises(lora_mux.errors.AdapterError, match="finite in the pool"):
        lora_mux.attach_peft(model)
    assert list(map(type, model.modules())) == before
    layers(model)[0].lora_A["a"].weight = nn.Parameter(torch.ones(8, 8))
    lora_mux.attach_peft(model)


ASKED = (
    "set_adapter('b')",
    "disable_adapter()",
    "load_adapter('folder', 'c')",
    "delete_adapter('a')",
    "merge_and_unload()",
    "save_pretrained('folder')",
    "active_adapters",
    "base_model.set_adapter(['b'])",
    "base_model.disable_adapter_layers()",
    "base_model.add_weighted_adapter(['a'], [1.0], 'c')",
)


@torch.no_grad()
def test_a_peft_model_that_was_taken_over_answers_or_raises() -> None:
    model, x = two(), torch.randn(3, 8)
    mux = lora_mux.attach_peft(model)
    for call in ASKED:
        with pytest.raises(lora_mux.errors.TargetError, match="must be asked of the Mux"):
            eval(f"model.{call}", {"model": model})
    with pytest.raises(lora_mux.errors.TargetError, match="taken over already"):
        lora_mux.attach_peft(model)
    mux.set_adapter("b")
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(one(x), mux.model(x))
    names = ["a", None, "b"]
    assert torch.equal(model(x, adapter_names=names), mux.model(x, adapter_names=names))
    assert not hasattr(model, "no_such_thing")


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, nn.DataParallel, lambda m: m.base_model],
    ids=["nothing", "parallel", "LoraModel"],
)
@torch.no_grad()
def test_what_may_be_around_the_model(wrap: Any) -> None:
    model, x = two(), torch.randn(3, 8)
    base, want = model.get_base_model(), model(x)
    outer = wrap(model)
    mux = lora_mux.attach_peft(outer)
    assert mux.model is base
    close(outer(x), want)
    with mux.disable_adapter():
        assert not torch.equal(outer(x), want)


class Doubled(peft.tuners.lora.Linear):
    """A layer of PEFT's that somebody has changed."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(x, *args, **kwargs)


def changed() -> Any:
    config = peft.LoraConfig(target_modules=["0"])
    config._register_custom_module({nn.Linear: Doubled})
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)


def plain_beside_kasa() -> Any:
    model = small()
    model.add_adapter("b", peft.LoraConfig(target_modules=["0"]))
    model.peft_config["b"].kasa_config = {"beta": 1}
    return model


def without_values() -> Any:
    model = nn.Sequential(nn.Linear(8, 8))
    config = peft.LoraConfig(target_modules=["0"])
    return peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def mixed() -> Any:
    model = nn.Sequential(nn.Linear(8, 8))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]), mixed=True)


def merged() -> Any:
    model = small()
    model.merge_adapter()
    return model


def attention() -> Any:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))


def dilated() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))


def lora_in_a_saved_module() -> Any:
    head = nn.Sequential(OrderedDict(dense=nn.Linear(8, 4)))
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), head=head))
    config = peft.LoraConfig(target_modules=["first"], modules_to_save=["head"])
    model = peft.get_peft_model(model, config, "a")
    model.add_adapter("b", peft.LoraConfig(target_modules=["dense"]))
    return model


def emptied() -> Any:
    """Its only adapter is in none of the layers any more."""
    model = small()
    model.base_model.model[0].delete_adapter("a")
    return model


def without_a_base() -> Any:
    model = small()
    model.base_model.model[0].base_layer.to("meta")
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "a plain model": (lambda: nn.Linear(2, 2), "peft.PeftModel, or .* got Linear without any"),
    "KaSA beside a plain one": (plain_beside_kasa, "adapter 'b'.*`kasa_config`.*delete_adapter"),
    "another class": (changed, "PEFT's own classes, got Doubled"),
    "no values": (without_values, r"'0\.lora_A\.weight' must hold values"),
    "no layers": (emptied, "at least one adapted layer.* got 1 adapters in 1 layers"),
    "a base without values": (without_a_base, "layer '0' must have weights, got one on the meta"),
    "mixed methods": (mixed, "got a PeftMixedModel"),
    "merged": (merged, "merged adapters; call unmerge_adapter"),
    "attention": (attention, "a linear layer .*got MultiheadAttention"),
    "dilation": (dilated, "can carry adapters, got Conv2d with dilation"),
    "LoRA in a saved module": (lora_in_a_saved_module, "'head' must not be saved as a whole"),
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
    now = {key: value for key, value in model.state_dict().items() if not value.is_meta}
    assert all(torch.equal(value, state[key]) for key, value in now.items())


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
