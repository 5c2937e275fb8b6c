"""PEFT as the oracle: adapters that it saved, loaded by us, on whole models."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from oracle import Adapter, assert_close, forward
from peft_oracle import MODELS, configs, peft, save_adapters, set_weights, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")


@pytest.fixture(scope="module", params=MODELS)
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model with all kinds of adapters: plain, through PEFT, and attached."""
    torch.manual_seed(0)
    kind = request.param
    base = MODELS[kind]()
    folder = tmp_path_factory.mktemp(kind)
    theirs = save_adapters(base, configs(kind), folder)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    for name in configs(kind):
        mux.load(name, folder / name)
    names = list(configs(kind))
    ids = torch.randint(2, 250, (len(names) + 1, 5))
    inputs = {"input_ids": ids}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, 250, (len(ids), 3))

    def run(of: Any, rows: slice = slice(None), **kwargs: Any) -> Tensor:
        with torch.no_grad():
            output = of(**{k: v[rows] for k, v in inputs.items()}, **kwargs)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    return SimpleNamespace(
        kind=kind, base=base, peft=theirs, model=model, mux=mux, names=names, ids=ids, run=run
    )


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_each_adapter_alone(whole: SimpleNamespace) -> None:
    base = whole.run(whole.base)
    for name in whole.names:
        whole.mux.set_adapter(name)
        set_weights(whole.peft, {name: 1.0})
        got = whole.run(whole.model)
        close(got, whole.run(whole.peft))
        assert name == "alpha0" or not torch.equal(got, base), name
    whole.mux.set_adapter(None)
    assert torch.equal(whole.run(whole.model), base)


def test_mixed_batch(whole: SimpleNamespace) -> None:
    names = [*whole.names, None]
    with whole.mux.route(names):
        got = whole.run(whole.model)
    close(got, whole.run(whole.peft, adapter_names=[name or "__base__" for name in names]))


def test_mixed_batch_in_bfloat16(whole: SimpleNamespace) -> None:
    """Both are judged by the model in fp32; PEFT keeps fp32 adapters there, and rounds twice."""
    names = [*whole.names, None]
    adapter_names = [name or "__base__" for name in names]
    truth = whole.run(whole.peft, adapter_names=adapter_names)
    theirs = copy.deepcopy(whole.peft).bfloat16()
    ours, mux = copy.deepcopy((whole.model, whole.mux))
    ours.bfloat16()
    with mux.route(names):
        got = whole.run(ours)
    want = whole.run(theirs, adapter_names=adapter_names)
    assert got.dtype == torch.bfloat16
    assert (got - truth).norm() <= 1.2 * (want - truth).norm()


def test_a_weighted_sum_is_a_routing(whole: SimpleNamespace) -> None:
    """What add_weighted_adapter("cat") makes an adapter of, with weights of either sign."""
    summed = {"plain": 0.7, "rank1": -1.5, "patterns": 2.0}
    theirs = copy.deepcopy(whole.peft)
    theirs.add_weighted_adapter([*summed], [*summed.values()], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    whole.mux.set_adapter(summed)
    got = whole.run(whole.model)
    whole.mux.set_adapter(None)
    close(got, whole.run(theirs))


def test_base_rows_of_a_mixed_batch_keep_every_bit(whole: SimpleNamespace) -> None:
    names = [name for name in whole.names if name != "alpha0"]
    rows = [None if i % 3 else names[i % len(names)] for i in range(len(whole.ids))]
    with whole.mux.route(rows):
        got = whole.run(whole.model)
    base = whole.run(whole.base)
    for i, row in enumerate(rows):
        assert torch.equal(got[i], base[i]) == (row is None)


@pytest.mark.parametrize("count", [2, 4, 14])
def test_several_summed(whole: SimpleNamespace, count: int) -> None:
    several = whole.names[:count]
    set_weights(whole.peft, dict.fromkeys(several, 1.0))
    whole.mux.set_adapter(several)
    assert whole.mux.active_adapters == several
    got = whole.run(whole.model)
    whole.mux.set_adapter(None)
    close(got, whole.run(whole.peft))


def test_subsets_and_weights_per_row(whole: SimpleNamespace) -> None:
    a, b, c, d, *_ = whole.names
    rows: list[Any] = [{a: 0.5, b: -1.0}, (c, d), a, None, {"rslora": 2.0, "biased": 0.25}]
    rows += [None] * (len(whole.ids) - len(rows))
    with whole.mux.route(rows):
        got = whole.run(whole.model)
    base = whole.run(whole.base)
    for i, row in enumerate(rows):
        if row is None:
            assert torch.equal(got[i], base[i])
            continue
        weights = row if isinstance(row, dict) else dict.fromkeys([row] if row == a else row, 1.0)
        set_weights(whole.peft, weights)
        close(got[i], whole.run(whole.peft, slice(i, i + 1))[0])
    set_weights(whole.peft, dict.fromkeys(whole.names, 1.0))


def test_disabled_is_a_block_of_which_the_innermost_counts(whole: SimpleNamespace) -> None:
    base = whole.run(whole.base)
    with whole.mux.route([whole.names[1]] * len(whole.ids)):
        routed = whole.run(whole.model)
        with whole.mux.disable_adapter():
            assert torch.equal(whole.run(whole.model), base)
            with whole.mux.route([whole.names[1]] * len(whole.ids)):
                assert torch.equal(whole.run(whole.model), routed)
            assert torch.equal(whole.run(whole.model), base)
        assert torch.equal(whole.run(whole.model), routed)
    assert not torch.equal(routed, base)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_generate(whole: SimpleNamespace, search: str) -> None:
    if whole.kind == "bert":
        return  # an encoder: nothing to generate
    rows = ["plain", "rslora", None, "biased"]
    settings = {"max_new_tokens": 6, "do_sample": False, **SEARCHES[search]}
    with whole.mux.route(rows):
        got = whole.model.generate(whole.ids[:4], **settings)
    names = [row or "__base__" for row in rows]
    want = whole.peft.generate(input_ids=whole.ids[:4], adapter_names=names, **settings)
    assert torch.equal(got, want)


def test_generate_where_peft_fails(whole: SimpleNamespace) -> None:
    """num_beams in a GenerationConfig, and sampling with num_return_sequences."""
    if whole.kind == "bert":
        return  # an encoder: nothing to generate
    rows, ids = ["plain", None, "rslora"], whole.ids[:3]
    config = transformers.GenerationConfig(
        num_beams=3, max_new_tokens=4, pad_token_id=0, eos_token_id=255
    )
    with whole.mux.route(rows):
        by_config = whole.model.generate(ids, generation_config=config)
        by_name = whole.model.generate(
            ids, num_beams=3, max_new_tokens=4, pad_token_id=0, eos_token_id=255
        )
        sampled = whole.model.generate(
            ids, do_sample=True, num_return_sequences=4, max_new_tokens=3, min_new_tokens=3
        )
    assert torch.equal(by_config, by_name)
    assert len(sampled) == 12


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("qwen2", "reference"),
        ("t5", "reference"),
        pytest.param("t5", "triton", marks=pytest.mark.interpreter),
    ],
)
def test_other_backends(kind: str, backend: Any, tmp_path: Path) -> None:
    """What "auto" does not choose on the CPU: a forward pass, and beams, of whole models."""
    base = MODELS[kind]()
    wanted = {name: configs(kind)[name] for name in ("rslora", "plain", "biased")}
    theirs = save_adapters(base, wanted, tmp_path)
    model = copy.deepcopy(base)
    touched = sorted({target for config in wanted.values() for target in config.target_modules})
    mux = lora_mux.attach(model, touched, backend=backend)
    for name in wanted:
        mux.load(name, tmp_path / name)
    ids = torch.randint(2, 250, (3, 3))
    rows: list[Any] = ["rslora", None, {"plain": 0.5, "biased": -1.0}]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :2]} if kind == "t5" else {})
    search = {"num_beams": 2, "max_new_tokens": 2}
    with torch.no_grad(), mux.route(rows):
        got, tokens = model(**inputs).logits, model.generate(ids, **search)
    for i, row in enumerate(rows):
        alone = base
        if row is not None:
            set_weights(theirs, row if isinstance(row, dict) else {row: 1.0})
            alone = theirs
        with torch.no_grad():
            close(got[i], alone(**{k: v[i : i + 1] for k, v in inputs.items()}).logits[0])
        assert torch.equal(tokens[i], alone.generate(input_ids=ids[i : i + 1], **search)[0])


@pytest.mark.parametrize("adapters_in_base_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(96, 160), (1024, 512)], ids=str)
def test_one_layer_against_fp64(
    size: tuple[int, int], dtype: torch.dtype, adapters_in_base_dtype: bool, tmp_path: Path
) -> None:
    """Both we and PEFT are judged against fp64 made from the stored weights."""
    base = nn.Sequential(nn.Linear(*size)).to(dtype)
    shared = {"target_modules": ["0"], "init_lora_weights": False}
    wanted = {
        "r1": peft.LoraConfig(r=1, lora_alpha=1, **shared),
        "r5": peft.LoraConfig(r=5, lora_alpha=8, use_rslora=True, **shared),
        "r64": peft.LoraConfig(r=64, lora_alpha=16, **shared),
    }
    kept = dtype if adapters_in_base_dtype else None
    theirs = save_adapters(base, wanted, tmp_path, kept)
    mux = lora_mux.attach(base)
    adapters = {}
    for name, config in wanted.items():
        mux.load(name, tmp_path / name)
        layer = theirs.base_model.model[0]
        A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        adapters[name] = Adapter(A, B, layer.scaling[name])
        assert config.r == A.shape[0]
    x = torch.randn(6, 3, size[0]).to(dtype)
    subsets = [["r1"], ["r5"], ["r64"], ["r1", "r5"], [], ["r1", "r5", "r64"]]
    with torch.no_grad(), mux.route(subsets):
        y = base(x)
    rows = [[(adapters[n], 1.0) for n in subset] for subset in subsets for _ in range(3)]
    with torch.no_grad():
        truth = forward(base[0], x.reshape(-1, size[0]), rows)
    assert_close(y.reshape(truth.shape), truth)


def test_adapters_that_touch_different_layers(tmp_path: Path) -> None:
    """An adapter that is absent from a layer adds nothing there, and keeps its bits."""
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    wanted = {
        "first": peft.LoraConfig(target_modules=["0"], init_lora_weights=False),
        "last": peft.LoraConfig(target_modules=["2"], init_lora_weights=False),
    }
    theirs = save_adapters(base, wanted, tmp_path)
    mux = lora_mux.attach(base)
    for name in wanted:
        mux.load(name, tmp_path / name)
    x = torch.randn(3, 8)
    seen: list[Tensor] = []
    hook: Callable[..., None] = lambda module, args, output: seen.append(output)  # noqa: E731
    base[0].register_forward_hook(hook)
    with torch.no_grad(), mux.route(["first", "last", ("first", "last")]):
        got = base(x)
    with torch.no_grad():
        close(got[:2], theirs(x[:2], adapter_names=["first", "last"]))
        assert torch.equal(seen[0][1], nn.functional.linear(x, base[0].weight, base[0].bias)[1])
