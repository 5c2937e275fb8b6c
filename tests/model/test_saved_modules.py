"""Modules that adapters saved as a whole: rows of one batch with heads of their own, as in PEFT."""

import copy
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.errors import (
    AdapterError,
    CheckpointError,
    PoolCapacityError,
    RoutingError,
    TargetError,
)
from peft_oracle import llama, peft, qwen2, transformers, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 4, "pad_token_id": 0, "num_labels": 3}
IDS = torch.randint(2, 60, (4, 5), generator=torch.Generator().manual_seed(1))


def llama_classifier(**how: Any) -> Any:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL | how))


def bert_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def roberta_classifier() -> Any:
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config)


def gpt2_classifier() -> Any:
    names = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "pad_token_id": 0}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**names))


HEAD = {"task_type": "SEQ_CLS"}  # which lets PEFT save the head by itself
MODELS: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any]]] = {
    "llama": (llama_classifier, ["q_proj", "v_proj"], HEAD),
    "bert": (bert_classifier, ["query", "value"], HEAD),
    "roberta": (roberta_classifier, ["query", "value"], HEAD),
    "gpt2": (gpt2_classifier, ["c_attn"], {**HEAD, "fan_in_fan_out": True}),
    "lm_head": (llama, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "tied lm_head": (qwen2, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "embedding": (llama, ["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    "both": (llama, ["q_proj"], {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "untied": (qwen2, ["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    "tied": (
        qwen2,
        ["q_proj"],
        {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True},
    ),
    "a layer": (llama, ["q_proj"], {"modules_to_save": ["up_proj"]}),
    "Conv1D": (gpt2_classifier, ["c_fc"], {"modules_to_save": ["score", "c_attn"]}),
}
# Which values the saved modules have; None = those of the base, or there are none: PEFT adds the
# head to every adapter of a classifier.
SEEDS = {"a": 1, "b": 2, "c": 3, "like a": 1, "headless": None}


def saved_by_peft(base: nn.Module, kind: str, seeds: Mapping[str, int | None], to: Path) -> Any:
    """A PeftModel with such adapters, each saved as a folder of its name."""
    _, targets, fields = MODELS[kind]
    plain = {"target_modules": targets, "init_lora_weights": False}
    wanted = {
        name: peft.LoraConfig(r=i + 1, **plain, **({} if seed is None else fields))
        for i, (name, seed) in enumerate(seeds.items())
    }
    model = with_adapters(base, wanted)
    for name, seed in seeds.items():
        generator = torch.Generator().manual_seed(seed or 0)
        for path, parameter in model.named_parameters():
            if seed is not None and f"modules_to_save.{name}." in path:
                noise = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    parameter.add_(noise / parameter.shape[-1] ** 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(to)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make(request.param, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make("llama", tmp_path_factory.mktemp("adapters"))


def make(kind: str, folder: Path) -> SimpleNamespace:
    torch.manual_seed(0)
    base = MODELS[kind][0]().eval()
    theirs = saved_by_peft(base, kind, SEEDS, folder)

    def attached(*names: str, to: nn.Module = base, **how: Any) -> tuple[Any, lora_mux.Mux]:
        model = copy.deepcopy(to)
        mux = lora_mux.attach(model, **how)
        for name in names or SEEDS:
            mux.load(name, folder / name)
        return model, mux

    def alone(name: str | None) -> Tensor:
        """PEFT's answer with one adapter."""
        if name is None:
            return run(base)
        theirs.set_adapter(name)
        return run(theirs)

    return SimpleNamespace(
        kind=kind, base=base, peft=theirs, folder=folder, attached=attached, alone=alone
    )


def run(model: Any, ids: Tensor = IDS, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **how).logits  # type: ignore[no-any-return]


def used(mux: lora_mux.Mux) -> dict[str, int]:
    """Target -> the rank rows that adapters have there."""
    return {path: pool.used for path, pool in mux.memory().targets.items()}


def close(got: Tensor, want: Tensor, units: float = 2e-5) -> None:
    assert (got - want).abs().max() <= units * want.abs().max()


@pytest.mark.parametrize("rows", [["a", None, "b", "c"], ["headless", "like a", "a", None]])
def test_rows_have_the_modules_of_their_adapters(whole: SimpleNamespace, rows: list[Any]) -> None:
    model, mux = whole.attached()
    with mux.route(rows):
        got = run(model)
    base = run(whole.base)
    for i, name in enumerate(rows):
        if name is None:
            assert torch.equal(got[i], base[i])
        else:
            assert not torch.equal(got[i], base[i])
            close(got[i], whole.alone(name)[i])


def test_what_is_in_force_is_taken_over(whole: SimpleNamespace) -> None:
    for active in ("b", "headless"):
        theirs = copy.deepcopy(whole.peft)
        theirs.set_adapter(active)
        want = run(theirs)
        mux = lora_mux.attach_peft(theirs)
        close(run(mux.model), want)
        assert mux.active_adapters == [active]
        assert not any("modules_to_save" in path for path, _ in mux.model.named_modules())
        with mux.route(["a", None, "c", "headless"]):
            got = run(mux.model)
        for i, name in enumerate(["a", None, "c", "headless"]):
            close(got[i], whole.alone(name)[i])
        assert torch.equal(got[1], run(whole.base)[1])
        model = mux.model
        mux.detach()
        assert torch.equal(run(model), run(whole.base))


@pytest.mark.parametrize("kind", ["llama", "roberta", "lm_head"])
def test_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """Both are judged by the model in fp32. PEFT computes W x where we compute W_0 x + (W - W_0) x,
    each rounded."""
    made = make(kind, tmp_path)
    rows = ["a", None, "b", "headless"]
    model, mux = made.attached(to=copy.deepcopy(made.base).bfloat16())
    with mux.route(rows):
        got = run(model)
    assert got.dtype == torch.bfloat16
    truth = torch.stack([made.alone(name)[i] for i, name in enumerate(rows)])
    half = copy.deepcopy(made.peft).bfloat16()
    close(got, truth, 0.03)
    assert torch.equal(got[1], run(copy.deepcopy(made.base).bfloat16())[1])
    error, theirs = (got - truth).norm(), 0.0
    for i, name in enumerate(rows):
        if name is not None:
            half.set_adapter(name)
            theirs += float((run(half)[i] - truth[i]).norm() ** 2)
    assert error <= 2 * theirs**0.5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends(small: SimpleNamespace, backend: Any) -> None:
    model, mux = small.attached("a", "b", backend=backend)
    with mux.route(["a", None, "b", "a"]):
        got = run(model)
    for i, name in enumerate(["a", None, "b", "a"]):
        close(got[i], small.alone(name)[i])


def test_a_long_side_in_the_kernels(tmp_path: Path) -> None:
    """A head with more outputs than inputs, whose identity comes first, and an embedding."""
    made = make("both", tmp_path)
    model, mux = made.attached("a", "b", backend="triton")
    with mux.route(["a", None, "b"]):
        got = run(model, IDS[:3, :2])
    for i, name in enumerate(["a", None, "b"]):
        if name is not None:
            made.peft.set_adapter(name)
        close(got[i], run(made.peft if name else made.base, IDS[:3, :2])[i])


def test_weights_are_those_of_lora_alone(small: SimpleNamespace) -> None:
    """As with PEFT's set_scale, which does not change a saved module."""
    theirs = copy.deepcopy(small.peft)
    theirs.set_adapter("a")
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 0.25)
    want = run(theirs)
    model, mux = small.attached("a", "headless")
    mux.set_adapter({"a": 0.25})
    close(run(model), want)
    with mux.route([{"a": 0.25}, {"headless": 0.0}, "a", {"a": 0.25, "headless": 0.0}]):
        got = run(model)
    close(got[[0, 3]], want[[0, 3]])
    close(got[1], run(small.base)[1])
    taken = lora_mux.attach_peft(theirs)
    close(run(taken.model), want)
    handle = mux.adapters["a"]
    with mux.route(torch.tensor([[handle]] * 4), torch.full((4, 1), 0.25)):
        close(run(model), want)


def test_equal_modules_are_held_and_applied_once(small: SimpleNamespace) -> None:
    model, mux = small.attached("a", "like a", "b")
    assert used(mux)["score"] == 6  # three labels each, twice
    with mux.route([("a", "like a"), None, ("like a", "headless")[:1], "b"]):
        got = run(model)
    theirs = copy.deepcopy(small.peft)  # PEFT refuses both at once: the LoRA part of both, by hand
    theirs.set_adapter("a")
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_adapter(["a", "like a"])
    close(got[0], run(theirs)[0])
    close(got[2], small.alone("like a")[2])
    mux.remove("a")
    assert used(mux)["score"] == 6
    mux.remove("like a")
    assert used(mux)["score"] == 3
    mux.remove("b")
    memory = mux.memory()
    assert memory.used == memory.saved_modules == memory.targets["score"].used == 0


def test_memory_is_counted(small: SimpleNamespace) -> None:
    _, mux = small.attached()
    memory = mux.memory()
    assert memory.saved_modules == 9 * memory.targets["score"].row_bytes
    held = sum(adapter.bytes for adapter in memory.adapters.values())
    assert memory.used == held + memory.saved_modules + memory.replaced


@pytest.mark.parametrize("rows", [[("a", "b")], [None, {"b": 0.5, "a": 1.0}]])
def test_different_modules_in_one_row_are_refused(small: SimpleNamespace, rows: list[Any]) -> None:
    _, mux = small.attached("a", "b")
    handles = [mux.adapters["a"], mux.adapters["b"]]
    for act in (
        lambda: mux.route(rows),
        lambda: mux.route(torch.tensor([handles])),
        lambda: mux.route_tokens(rows),
        lambda: mux.set_adapter(["a", "b"]),
    ):
        with pytest.raises(RoutingError, match="got '[ab]' and '[ab]', which both saved 'score'"):
            act()
    assert mux.active_adapters == []


def test_routes_by_index_and_per_token(small: SimpleNamespace) -> None:
    model, mux = small.attached()
    handles = [mux.adapters["a"], -1, mux.adapters["headless"], mux.adapters["c"]]
    names = ["a", None, "headless", "c"]
    for index in (
        torch.tensor(handles)[:, None],
        torch.tensor(handles, dtype=torch.int32)[:, None],
    ):
        with mux.route(index) as routing:
            got = run(model)
            with mux.route(routing.index, routing.weight) as again:  # has all that it needs
                assert torch.equal(again.index, routing.index)
        for i, name in enumerate(names):
            close(got[i], small.alone(name)[i])
    tokens = [name for name in names for _ in range(5)]
    with mux.route_tokens(tokens):
        assert torch.equal(run(model), got)
    with mux.route_tokens(names, lengths=[5] * 4):
        assert torch.equal(run(model), got)


def test_a_routing_that_is_handed_to_a_layer(small: SimpleNamespace) -> None:
    model, mux = small.attached("a", "b")
    x = torch.randn(3, 32)
    index = torch.tensor([[mux.adapters["a"]], [-1], [mux.adapters["b"]]])
    got = model.score(x, lora_mux.Routing(index))
    for i, name in enumerate(["a", None, "b"]):
        weight = small.base.score.weight
        if name is not None:
            weight = small.peft.get_submodule("base_model.model.score").modules_to_save[name].weight
        close(got[i].detach(), (x @ weight.T)[i].detach())


def test_names_follow_a_reload(small: SimpleNamespace) -> None:
    model, mux = small.attached("a")
    mux.set_adapter("a")
    for name in ("headless", "b", "like a", "headless", "c"):
        mux.load("a", small.folder / name, replace=True)
        close(run(model), small.alone(name))
        assert used(mux)["score"] == (0 if name == "headless" else 3)
    with mux.route(["a"] * 4):
        mux.load("a", small.folder / "b", replace=True)
        close(run(model), small.alone("c"))  # a block keeps what it began with
    close(run(model), small.alone("b"))


def test_a_reload_that_would_not_fit_the_rows_in_force(small: SimpleNamespace) -> None:
    model, mux = small.attached("a", "like a")
    mux.set_adapter(["a", "like a"])
    before, memory = run(model), used(mux)
    with pytest.raises(RoutingError, match="which both saved 'score'"):
        mux.load("a", small.folder / "b", replace=True)
    assert torch.equal(run(model), before)
    assert used(mux) == memory


def test_where_one_adapter_fits(small: SimpleNamespace) -> None:
    """Three rank rows for the head of one; the LoRA parts take up to five in other layers."""
    row = sum(pool.row_bytes for pool in small.attached("a")[1].memory().targets.values())
    model, mux = small.attached(memory=5 * row)
    for name in ("a", "b", "headless", "like a", "c", "b"):
        mux.set_adapter(name)
        close(run(model), small.alone(name))
        memory = mux.memory()
        assert memory.targets["score"].used <= 5
    mux.set_adapter(None)
    with mux.route(["like a", None, "a", "a"]):
        got = run(model)
    for i, name in enumerate(["like a", None, "a", "a"]):
        close(got[i], small.alone(name)[i])
    with pytest.raises(PoolCapacityError):
        mux.route(["a", "b", "a", "b"]).__enter__()
    mux.set_adapter(None)
    mux.pin("b")
    assert mux.memory().saved_modules
    with pytest.raises(PoolCapacityError):
        mux.prefetch(["c"])
    mux.unpin("b")
    mux.prefetch(["c"])
    mux.load("c", small.folder / "a", replace=True)
    mux.set_adapter("c")
    close(run(model), small.alone("a"))
    for name in SEEDS:
        mux.remove(name)
    mux.set_adapter(None)
    assert mux.memory().used == 0


@pytest.mark.parametrize("memory", [None, "1MiB"])
def test_copies(small: SimpleNamespace, memory: Any) -> None:
    model, mux = small.attached(memory=memory)
    mux.set_adapter("b")
    want = run(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(run(twin), want)
    other = lora_mux.Mux.of(twin)
    other.set_adapter("a")
    close(run(twin), small.alone("a"))
    other.remove("b")
    other.remove("c")
    assert torch.equal(run(model), want)
    assert len(other.adapters) == 3 and len(mux.adapters) == 5


def test_a_failure_leaves_nothing(small: SimpleNamespace, tmp_path: Path) -> None:
    model, mux = small.attached("a")
    memory, adapters = used(mux), dict(mux.adapters)
    with pytest.raises(CheckpointError):
        mux.load_many({"b": small.folder / "b", "none": tmp_path})
    with pytest.raises(AdapterError, match="already loaded"):
        mux.load("a", small.folder / "b")
    assert used(mux) == memory
    assert dict(mux.adapters) == adapters
    mux.load_many({"b": small.folder / "b", "c": small.folder / "c"})
    assert used(mux)["score"] == 9


@pytest.mark.parametrize("kind", ["lm_head", "tied"])
def test_generation(kind: str, tmp_path: Path) -> None:
    """The modules of each row at every step, for all beams of a sample."""
    made = make(kind, tmp_path)
    model, mux = made.attached()
    rows = ["a", None, "b", "headless"]
    how: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    got = model.generate(IDS, adapter_names=[row or "__base__" for row in rows], **how)
    for i, name in enumerate(rows):
        of = made.base
        if name is not None:
            made.peft.set_adapter(name)
            of = made.peft
        assert torch.equal(got[i], of.generate(input_ids=IDS[i : i + 1], **how)[0])


def test_beside_dora(tmp_path: Path) -> None:
    """All kinds in one batch: a head with LoRA, one with DoRA, an embedding, and the base."""
    torch.manual_seed(0)
    base = llama_classifier().eval()
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": ["q_proj"], **HEAD},
        "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, **HEAD},
        "tokens": {"target_modules": ["embed_tokens", "v_proj"]},
    }
    rows = [*kinds, None]
    alone = []
    for name, fields in kinds.items():
        config = peft.LoraConfig(r=3, init_lora_weights=False, **fields)
        theirs = peft.get_peft_model(copy.deepcopy(base), config, name).eval()
        for path, parameter in theirs.named_parameters():
            if "modules_to_save" in path or "magnitude" in path:
                nn.init.normal_(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path)
        alone.append(run(theirs))
    for memory in (None, "1MiB"):
        model = copy.deepcopy(base)
        targets = ["q_proj", "v_proj", "down_proj", "score", "embed_tokens"]
        mux = lora_mux.attach(model, targets, memory=memory)
        for name in kinds:
            mux.load(name, tmp_path / name)
        with mux.route(rows):
            got = run(model)
        for i, want in enumerate(alone):
            close(got[i], want[i])
        assert torch.equal(got[3], run(base)[3])


def test_gradients_reach_x(small: SimpleNamespace) -> None:
    model, mux = small.attached("a", "b")
    x = torch.randn(3, 32, requires_grad=True)
    handles = torch.tensor([[mux.adapters["a"]], [-1], [mux.adapters["b"]]])
    model.score(x, lora_mux.Routing(handles)).sum().backward()
    weights = [small.base.score.weight.sum(0)] * 3
    for i, name in ((0, "a"), (2, "b")):
        head = small.peft.get_submodule("base_model.model.score").modules_to_save[name]
        weights[i] = head.weight.sum(0)
    assert x.grad is not None
    close(x.grad, torch.stack(weights).detach())


def test_compiled(small: SimpleNamespace) -> None:
    model, mux = small.attached()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (["a", None, "b", "c"], ["headless", "a", "b", None]):
        with mux.route(rows):
            got = run(compiled)
        for i, name in enumerate(rows):
            close(got[i], small.alone(name)[i])


def test_an_index_on_a_device(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may look at its values; here it lies on the CPU all the same."""
    model, mux = small.attached()
    names = ["a", None, "headless", "c"]
    handles = torch.tensor([[mux.adapters[name] if name else -1] for name in names])
    monkeypatch.setattr("lora_mux.core.selections.host_may_read", lambda tensor: False)
    block = mux.route(handles)
    with pytest.raises(RoutingError, match=r"`rows` must be on the CPU, or have shape \[rows, 1\]"):
        mux.route(handles.expand(-1, 2))
    monkeypatch.undo()
    with block:
        got = run(model)
    for i, name in enumerate(names):
        close(got[i], small.alone(name)[i])
    for name in ("a", "b", "c", "like a"):
        mux.remove(name)
    monkeypatch.setattr("lora_mux.core.selections.host_may_read", lambda tensor: False)
    with mux.route(torch.tensor([[mux.adapters["headless"], -1]] * 4)):
        pass


def test_a_compiled_layer_with_a_routing(small: SimpleNamespace) -> None:
    model, mux = small.attached("a", "b")
    compiled = torch.compile(model.score, backend="eager", fullgraph=True)
    x = torch.randn(3, 32)
    for names in (["a", None, "b"], ["b", "b", "a"]):
        index = torch.tensor([[mux.adapters[name] if name else -1] for name in names])
        want = model.score(x, lora_mux.Routing(index))
        assert torch.equal(compiled(x, lora_mux.Routing(index)), want)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 2), nn.Conv1d(3, 2, 1), nn.Embedding(7, 3)])
def test_other_layers(layer: nn.Module) -> None:
    x = torch.randint(7, (2, 4)) if isinstance(layer, nn.Embedding) else torch.randn(2, 3, 4, 4)
    x = x[..., 0] if isinstance(layer, nn.Conv1d) else x
    base = nn.Sequential(OrderedDict(it=layer, other=nn.Linear(3, 3)))
    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["it"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in theirs.base_model.model.it.modules_to_save.parameters():
        nn.init.normal_(parameter)
    want = theirs.base_model.model.it(x)
    mux = lora_mux.attach_peft(theirs)
    close(mux.model.it(x).detach(), want.detach())
    with mux.route(["default", None]):
        got = mux.model.it(x)
    close(got[0].detach(), want[0].detach())
    assert torch.equal(got[1], layer(x)[1])


# What is refused.


def folder_of(
    small: SimpleNamespace, to: Path, change: Callable[[dict[str, Tensor]], None]
) -> Path:
    """A's folder with other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(small.folder / "a", to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


HEAD_KEY = "base_model.model.score.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "another number of labels": (
        lambda t: t.update({HEAD_KEY: torch.ones(4, 32)}),
        r"'score.weight' must have the shape of the base's, \[3, 32\], got \[4, 32\].*num_labels",
    ),
    "NaN": (lambda t: t.update({HEAD_KEY: torch.full((3, 32), torch.nan)}), "must be finite"),
    "LoRA as well": (
        lambda t: t.update(
            {
                "base_model.model.score.lora_A.weight": torch.ones(1, 32),
                "base_model.model.score.lora_B.weight": torch.ones(3, 1),
            }
        ),
        "`modules_to_save` must not name modules that have LoRA as well, got 'score'",
    ),
    "a weight that was not saved": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
        "copy of 'model.norm.weight' must be equal to the base's",
    ),
    "a parameter that is not there": (
        lambda t: t.update({"base_model.model.score.bias": torch.ones(3)}),
        "'base_model.model.score.bias'.* that is not there; load the base with the head",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(small: SimpleNamespace, tmp_path: Path, what: str) -> None:
    change, says = REFUSED[what]
    _, mux = small.attached("b")
    memory = used(mux)
    with pytest.raises(CheckpointError, match=says):
        mux.load("a", folder_of(small, tmp_path / "a", change))
    assert used(mux) == memory
    assert list(mux.adapters) == ["b"]


def test_modules_equal_to_the_base_cost_nothing(small: SimpleNamespace, tmp_path: Path) -> None:
    equal = folder_of(
        small, tmp_path / "a", lambda t: t.update({HEAD_KEY: small.base.score.weight.detach()})
    )
    _, mux = small.attached("b")
    mux.load("a", equal)
    with mux.route([("a", "b"), "a", None, "b"]):
        pass
    assert used(mux)["score"] == 3


def test_what_a_config_saves_and_a_file_lacks_is_named(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    lacking = folder_of(small, tmp_path / "a", lambda t: t.pop(HEAD_KEY))
    _, mux = small.attached("b")
    with pytest.warns(UserWarning, match="lacks what its config saves: score.weight"):
        mux.load("a", lacking)


@pytest.mark.parametrize("differs", [False, True])
def test_a_norm_may_not_differ(tmp_path: Path, differs: bool) -> None:
    torch.manual_seed(0)
    base = llama_classifier().eval()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    if differs:
        nn.init.normal_(theirs.base_model.model.model.norm.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    for act in (
        lambda: lora_mux.attach(base).load("a", tmp_path),
        lambda: lora_mux.attach_peft(theirs),
    ):
        if not differs:
            act()
            continue
        with pytest.raises(CheckpointError, match="saved module 'model.norm' must be a lin"):
            act()


def test_statistics_are_values_too() -> None:
    base = nn.Sequential(OrderedDict(it=nn.BatchNorm1d(3), other=nn.Linear(3, 3)))
    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["it"])
    theirs = peft.get_peft_model(base, config)
    theirs.base_model.model.it.modules_to_save["default"].running_mean += 1
    with pytest.raises(CheckpointError, match="got BatchNorm1d with another running_mean"):
        lora_mux.attach_peft(theirs)


def test_what_peft_saves_only_is_not_in_force_alone(small: SimpleNamespace) -> None:
    theirs = copy.deepcopy(small.peft)
    theirs.set_adapter("a")
    theirs.base_model.model.score.set_adapter("b")
    with pytest.raises(CheckpointError, match="same adapters in force in all layers"):
        lora_mux.attach_peft(theirs)


class NormedHead(nn.Linear):
    """As Baichuan 2's: the rows of its weight have no length of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


@pytest.mark.parametrize("how", ["load", "attach_peft"])
def test_a_layer_with_a_forward_of_its_own_may_not_differ(how: str, tmp_path: Path) -> None:
    base = nn.Sequential(OrderedDict(body=nn.Linear(8, 8), head=NormedHead(8, 3)))
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        nn.init.normal_(theirs.base_model.model.head.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="saved module 'head' must be .* got NormedHead"):
        if how == "load":
            lora_mux.attach(base).load("a", tmp_path)
        else:
            lora_mux.attach_peft(theirs)


@pytest.mark.parametrize("make", [llama, qwen2], ids=["another layer", "another size"])
@torch.no_grad()
def test_layers_that_were_replaced_after_they_joined(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = make()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    nn.init.normal_(theirs.base_model.model.lm_head.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    mux = lora_mux.attach(base)
    mux.load("a", tmp_path)
    mux.set_adapter("a")
    base.resize_token_embeddings(300)
    with pytest.raises(TargetError, match="'lm_head' must be the layer that was attached"):
        base(IDS)
    fresh = make()
    other = lora_mux.attach(fresh)
    fresh.resize_token_embeddings(300)
    with pytest.raises(lora_mux.LoraMuxError, match=r"detach\(\), change the model|num_labels="):
        other.load("a", tmp_path)
    other.detach()
    assert fresh(IDS).logits.shape[-1] == 300


class Masked(nn.Module):
    """As SAM's prompt encoder: an embedding whose weight is read, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mask, self.body = nn.Embedding(9, 8), nn.Embedding(1, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body(self.tokens(ids) + self.mask.weight)
        return self.attention(h, h, h)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["load", "attach_peft"])
@pytest.mark.parametrize("module", ["mask", "out_proj"])
def test_weights_that_are_read_without_a_call_are_refused(
    how: str, module: str, tmp_path: Path
) -> None:
    base = Masked()
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=[module])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in (p for n, p in theirs.named_parameters() if "modules_to_save" in n):
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lora_mux.LoraMuxError, match="must be a (target|layer that is called)"):
        if how == "load":
            lora_mux.attach(base).load("a", tmp_path)
        else:
            lora_mux.attach_peft(theirs)
