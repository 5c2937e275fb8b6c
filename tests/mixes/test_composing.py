"""Composed folders: PEFT's answer is the weighted sum that PEFT and we compute without one."""

import copy
import itertools
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_mux
from lora_mux.errors import (
    AdapterError,
    ArgumentTypeError,
    CheckpointError,
    RoutingError,
    UnknownAdapterError,
)
from peft_oracle import MODELS, configs, peft, save_adapters, set_weights

WEIGHTS = "adapter_model.safetensors"
X = torch.arange(12).reshape(2, 6) * 17 % 200 + 2
ROWS = [
    {"plain": 1.0},
    {"plain": 0.5, "rank64": -2.0},
    {"rslora": 1.0, "patterns": 0.3, "rank1": 1.5},
    {"one-layer": 0.7, "biased": 1.0, "negative": -0.25},
    {"alpha0": 1.0, "regex": 1.0},
]


def answer(model: Any, name: str, **more: Any) -> torch.Tensor:
    given = {"decoder_input_ids": X} if name == "t5" else {}
    with torch.no_grad():
        return model(X, **given, **more)[0]


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, PEFT's with all adapters, and ours, in fp64 so that only the sums differ."""
    torch.manual_seed(0)
    base, folder = MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    wanted = {name: config for name, config in configs(request.param).items() if name != "dropout"}
    theirs = save_adapters(base, wanted, folder)
    model = copy.deepcopy(base.double())
    mux = lora_mux.attach(model)
    folders = {name: folder / name for name in wanted}
    mux.load_many(folders)
    return SimpleNamespace(
        name=request.param, base=base, peft=theirs.double(), model=model, mux=mux, folders=folders
    )


def opened_by_peft(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers the old way
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # GPT-2
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: lora_mux.format_row(row))
def test_the_sum(stage: Any, row: dict[str, float], tmp_path: Path) -> None:
    folder = lora_mux.compose(stage.folders, row, tmp_path / "mix")
    composed = opened_by_peft(stage.base, folder)
    set_weights(stage.peft, row)
    theirs = answer(stage.peft, stage.name)
    with stage.mux.route([row] * 2):
        ours = answer(stage.model, stage.name)
    found = answer(composed, stage.name)
    assert (theirs - answer(stage.base, stage.name)).abs().max() > 1e-4 or "alpha0" in row
    # B is rounded once to fp32, in 24 bits.
    torch.testing.assert_close(found, theirs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found, ours, rtol=2e-6, atol=2e-6)
    again = lora_mux.attach(copy.deepcopy(stage.base))
    again.load("mix", folder)
    again.set_adapter("mix")
    torch.testing.assert_close(answer(again.model, stage.name), ours, rtol=2e-6, atol=2e-6)


def test_the_config_is_one_that_engines_read(stage: Any, tmp_path: Path) -> None:
    """One rank, one alpha, no pattern, no bias; the sum of the ranks."""
    row = {"patterns": 1.0, "rslora": 0.5, "one-layer": 1.0}
    folder = lora_mux.compose(stage.folders, row, tmp_path / "mix", base_model="me/base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9 + 5 + 8
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert not config.get("use_rslora") and not config.get("lora_bias")
    assert config["base_model_name_or_path"] == "me/base"
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {22}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_as_peft_concatenates(tmp_path: Path) -> None:
    """PEFT's own concatenation, where it has one: adapters of one kind on the same layers."""
    base = MODELS["llama"]()
    wanted = {name: configs("llama")[name] for name in ("plain", "alpha0")}
    theirs = save_adapters(base, wanted, tmp_path)
    theirs.add_weighted_adapter([*wanted], [0.5, 2.0], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    folders = {name: tmp_path / name for name in wanted}
    mix = lora_mux.compose(folders, "0.5*plain+2*alpha0", tmp_path / "mix")
    found = opened_by_peft(base.double(), mix)
    torch.testing.assert_close(
        answer(found, "llama"), answer(theirs.double(), "llama"), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors are never rounded to less than fp32."""
    base = MODELS["llama"]().to(dtype)
    save_adapters(base, {"plain": configs("llama")["plain"]}, tmp_path, dtype)
    folder = lora_mux.compose({"plain": tmp_path / "plain"}, "0.3*plain", tmp_path / "mix")
    found = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    source = safetensors.torch.load_file(tmp_path / "plain" / "adapter_model.safetensors")
    wide = torch.promote_types(dtype, torch.float32)
    for key, tensor in source.items():
        wanted = tensor.to(wide) * (0.3 if "lora_B" in key else 1)  # alpha / r = 1
        assert found[key].dtype == wide and torch.equal(found[key], wanted)


def test_texts_names_and_weights_of_zero(stage: Any, tmp_path: Path) -> None:
    def files(row: Any) -> tuple[bytes, bytes]:
        folder = lora_mux.compose(stage.folders, row, tmp_path / "mix")
        return tuple(
            (folder / name).read_bytes() for name in sorted(p.name for p in folder.iterdir())
        )  # type: ignore[return-value]

    same = [{"plain": 1.0, "rank1": 0.5}, "plain+0.5*rank1", "plain+0.5*rank1+0*rslora"]
    assert len({files(row) for row in same}) == 1
    assert files("plain") == files(["plain"]) != files(("plain", "rank1"))


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ("plain+nobody", UnknownAdapterError, "`folders` must have every adapter .* 'nobody'"),
        ("0*nobody", UnknownAdapterError, "'nobody'"),
        ("plain+", RoutingError, "position 6"),
        ({"plain": float("nan")}, RoutingError, "finite"),
        ("__base__", AdapterError, "must select an adapter"),
        (None, AdapterError, "must select an adapter"),
        ("0*plain", AdapterError, "weight other than 0"),
        (7, ArgumentTypeError, "`row` must be None, a name"),
    ],
)
def test_rows_that_are_refused(
    stage: Any, row: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        lora_mux.compose(stage.folders, row, tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("folder", ["a\0b", "half \ud800", "n" * 300, "file/below"])
def test_folders_that_cannot_be_written(stage: Any, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="`folder` must be one that can be written"):
        lora_mux.compose(stage.folders, "plain", f"{tmp_path}/{folder}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_that_are_no_paths(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="`folder` must be a path, got NoneType"):
        lora_mux.compose(stage.folders, "plain", None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"`folders\['plain'\]` must be a path, got int"):
        lora_mux.compose({"plain": 3}, "plain", tmp_path / "mix")  # type: ignore[dict-item]


def test_adapters_of_another_base(tmp_path: Path) -> None:
    names = {"plain": MODELS["llama"](), "narrow": MODELS["llama"]()}
    names["narrow"].model.layers[0].self_attn.q_proj = nn.Linear(32, 64, bias=False)
    for name, base in names.items():
        save_adapters(base, {name: configs("llama")["plain"]}, tmp_path)
    folders = {name: tmp_path / name for name in names}
    with pytest.raises(AdapterError, match="of one base model, got 'plain' with 64 -> 64 features"):
        lora_mux.compose(folders, "plain+narrow", tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_a_source_is_not_overwritten(stage: Any) -> None:
    folder = stage.folders["plain"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for row in ("plain+rank1", "rank1+0*plain"):
        with pytest.raises(CheckpointError, match="none of those that the row names, got that of "):
            lora_mux.compose(stage.folders, row, folder / ".." / "plain")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_a_name(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="`folder` must be a path, got ''; write '.' for"):
        lora_mux.compose(stage.folders, "plain", "")
    assert not list(tmp_path.iterdir())
    assert lora_mux.compose(stage.folders, "plain", ".") == Path(".")


def test_a_head_with_a_copy_of_the_base(tmp_path: Path) -> None:
    """PEFT saves one along, and without it the adapter can be composed."""
    base = MODELS["llama"]()
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "q_proj"])
    theirs = save_adapters(base, {"a": config}, tmp_path)
    assert "base_layer" in str([*safetensors.torch.load_file(tmp_path / "a" / WEIGHTS)])
    with pytest.raises(CheckpointError, match="no copy of .* save_embedding_layers=False.*lm_head"):
        lora_mux.compose({"a": tmp_path / "a"}, "0.5*a", tmp_path / "mix")
    assert not (tmp_path / "mix").exists()
    theirs.save_pretrained(tmp_path, selected_adapters=["a"], save_embedding_layers=False)
    mix = lora_mux.compose({"a": tmp_path / "a"}, "0.5*a", tmp_path / "mix")
    set_weights(theirs, {"a": 0.5})
    found = opened_by_peft(base.double(), mix)
    torch.testing.assert_close(
        answer(found, "llama"), answer(theirs.double(), "llama"), rtol=2e-6, atol=2e-6
    )


MORE = {
    "use_dora": {"use_dora": True, "target_modules": ["q_proj"]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "use_bdlora": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("what", MORE)
def test_more_than_lora_on_linear_layers(what: str, tmp_path: Path) -> None:
    """No such sum of it is known; the error says what was found, and where."""
    config = peft.LoraConfig(r=4, init_lora_weights=False, **MORE[what])
    save_adapters(MODELS["llama"](), {"a": config}, tmp_path)
    if what == "use_bdlora":
        file = tmp_path / "a" / "adapter_config.json"
        fields = json.loads(file.read_text())
        blocks = {"target_modules_bd_a": [], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
        file.write_text(json.dumps(fields | {"use_bdlora": blocks}))
    if what == "an embedding":  # without the copies of the base that PEFT saves along
        file = tmp_path / "a" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        own = {key: value for key, value in tensors.items() if ".lora_" in key}
        safetensors.torch.save_file(own, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        lora_mux.compose({"a": tmp_path / "a"}, "a", tmp_path / "mix")
    assert {"saved": "lm_head"}.get(what, what) in str(caught.value)
    assert not (tmp_path / "mix").exists()


def test_an_old_mix_is_replaced_as_a_whole(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure on the way leaves the old one."""
    folder = lora_mux.compose(stage.folders, "plain", tmp_path / "mix")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = os.replace, itertools.count()

    def failing(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="nothing in it has changed"):
        lora_mux.compose(stage.folders, "rank64", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_folders_that_are_no_mapping(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="`folders` must map names to folders, got list"):
        lora_mux.compose([*stage.folders], "plain", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_file_lacks_is_said(stage: Any, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(stage.folders["plain"], lacking)
    config = json.loads((lacking / "adapter_config.json").read_text("utf-8"))
    config["trainable_token_indices"] = [1, 2]
    (lacking / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.warns(UserWarning, match="lacks the tokens that its config trains"):
        lora_mux.compose({"plain": lacking}, "plain", tmp_path / "new")
