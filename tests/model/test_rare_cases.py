"""What a user meets rarely: states that only interrupts leave, and what others have changed."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_mux
from lora_mux.core import LastPass, unchecked_routing
from lora_mux.core.selections import Companion, Companions
from lora_mux.errors import AdapterError, CheckpointError
from lora_mux.layers.gains import Rescaling
from lora_mux.layers.saved_modules import difference
from lora_mux.ops import reference
from lora_mux.routes.compiled import rows_now
from lora_mux.routes.route import Manner
from peft_oracle import llama, peft

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")


def headed() -> Any:
    base = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=nn.Linear(8, 3)))
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    return peft.get_peft_model(base, config)


def another_size(model: Any) -> None:
    model.base_model.model.head.modules_to_save["default"] = nn.Linear(8, 5)


def without_values(model: Any) -> None:
    model.base_model.model.head.modules_to_save["default"].to("meta")


def another_wrapper(model: Any) -> None:
    head = model.base_model.model.head
    head.__class__ = type("Changed", (type(head),), {"__module__": "somewhere"})


def another_factor(model: Any) -> None:
    layer = model.base_model.model.body
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])


def shifted_base(model: Any) -> None:
    model.peft_config["default"].init_lora_weights = "pissa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_size, "must have the shape of the base's"),
        (without_values, "must be a plain tensor"),
        (another_wrapper, "one of modules_to_save or trainable_token_indices, got PEFT's Changed"),
        (another_factor, "must hold LoRA on a linear layer"),
        (shifted_base, r"must be a plain initialisation, got 'pissa'.*convert it with PEFT$"),
    ],
)
def test_a_live_model_that_was_changed_is_refused(change: Any, message: str) -> None:
    model = headed()
    change(model)
    with pytest.raises(CheckpointError, match=message):
        lora_mux.attach_peft(model)


def test_tokens_beside_factors_of_the_same_embedding(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False
    )
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    file, fields = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    held = {k: t for k, t in load_file(file).items() if "base_layer" not in k}
    save_file({**held, key: torch.ones(1, 64)}, file)
    fields.write_text(
        json.dumps({**json.loads(fields.read_text()), "trainable_token_indices": [3]})
    )
    with pytest.raises(CheckpointError, match="must not name modules that have LoRA as well"):
        lora_mux.attach(llama()).load("a", tmp_path)


def test_a_bias_beside_dora_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    config = peft.LoraConfig(target_modules=["0"], use_dora=True)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_bias": True}))
    with pytest.raises(CheckpointError, match="`lora_bias` must be unset with DoRA"):
        lora_mux.attach(base).load("a", tmp_path)


def test_dora_on_a_quantised_embedding_is_refused() -> None:
    table = nn.Embedding(4, 3)
    numbers = torch.zeros(4, 3, dtype=torch.int8)
    table.weight = nn.Parameter(numbers, requires_grad=False)
    with pytest.raises(AdapterError, match="got one that is quantised"):
        lora_mux.MuxLinear(table).add_adapter(
            "a", torch.ones(2, 4), torch.ones(3, 2), alpha=2, magnitude=torch.ones(3)
        )


def test_differences_of_a_bias_alone_and_below_the_dtype() -> None:
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    part = difference(linear, {"bias": linear.bias + 1})
    assert part is not None and part.bias is not None
    torch.testing.assert_close(x @ part.A.T @ part.B.T + part.bias, torch.ones(2, 3))
    half = linear.bfloat16()
    tiny = difference(half, {"weight": half.weight.float() + 1e-12})
    assert tiny is not None and not tiny.A.any() and len(tiny.A) == 1


def test_companions_after_an_interrupt() -> None:
    companions = Companions()
    companions.add(1, Companion(10, frozenset({"head"}), b"a"))
    companions.add(2, Companion(20, frozenset({"head"}), b"b"))
    companions.mend({1, 10, 2})  # 20 is not there any more
    assert companions.handles == {10} and companions.forget(1) == 10


def test_a_plan_that_rescales_passes_strengths_on() -> None:
    plan = reference.plan(torch.tensor([[0], [-1]]), torch.ones(2, 1))
    rescaling = Rescaling(plan, None)
    other = rescaling.with_strength(2 * rescaling.strength)
    assert torch.equal(other.strength, 2 * plan.strength)
    empty = lora_mux.MuxLinear(nn.Linear(2, 2)).mux_pool
    assert rescaling.touches(empty) == plan.touches(empty)


@torch.no_grad()
def test_a_bounded_pool_forgets_what_was_on_its_way() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mux = lora_mux.attach(model, memory="64KiB")
    parts = {"0": (torch.ones(2, 8), torch.ones(8, 2))}
    come, gone = (mux.add_adapter(name, parts, alpha=2) for name in ("come", "gone"))
    adapters: Any = mux._adapters
    mux.prefetch(["gone"])
    adapters._slots.suspend(gone)  # on its way out
    adapters._slots.make_live(come)  # on its way in
    adapters._mend()
    assert not adapters._resident and not adapters._slots.is_live(come)
    x = torch.randn(2, 8)
    base = model(x)
    with mux.route(["come", "gone"]):
        torch.testing.assert_close(model(x) - base, x.sum(1, keepdim=True).expand(2, 8) * 2.0)


def test_a_graph_asks_for_the_rows_of_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile traces, step by step: a router that is gone leaves the rows as given."""
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", False, raising=False)
    given = unchecked_routing(torch.tensor([[-1], [-1]]), torch.ones(2, 1), LastPass())
    gone = rows_now(given, Manner("samples", (), 1), None, 10**9)
    assert torch.equal(gone.index, given.index)
    model = nn.Sequential(nn.Linear(4, 4))
    mux = lora_mux.attach(model)
    with torch.no_grad():
        number = mux._router._plans._number
        rows = rows_now(given, Manner("samples", (("tile", 1),), 1), {"tile": 1}, number)
    assert torch.equal(rows.index, given.index)
