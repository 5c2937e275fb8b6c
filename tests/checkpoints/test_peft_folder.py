"""The PEFT reader: what it takes, and that it refuses everything else by name."""

import copy
import dataclasses
import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_mux
from lora_mux.checkpoints.peft_folder import read_peft_folder
from lora_mux.configs import peft_config
from lora_mux.core import LoraWeights
from peft_oracle import peft, save_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATHS = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")


def tensors(rank: int = 4) -> dict[str, Tensor]:
    made = {}
    for path in PATHS:
        made[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, 8)
        made[f"base_model.model.{path}.lora_B.weight"] = torch.randn(8, rank)
    return made


def write(
    folder: Path, fields: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
    (folder / CONFIG).write_text(json.dumps({**config, **(fields or {})}))
    save_file(tensors() if weights is None else weights, folder / WEIGHTS)
    return folder


def weights_in(folder: Path) -> dict[str, LoraWeights]:
    stored = read_peft_folder(folder)
    return stored.weights(stored.read(False))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["v"](layer["q"](x))
        return x


def snapshot(mux: lora_mux.Mux) -> list[Any]:
    """Everything that a refused load must leave as it was."""
    pools = [mux._model.get_submodule(path).mux_pool for path in mux.targets]  # type: ignore[union-attr]
    return [
        dict(mux.adapters),
        [t.clone() for p in pools for t in p.buffers()],
        [dict(p.spans) for p in pools],
    ]


def refuse(folder: Path, match: str) -> None:
    """Loading fails with an error of ours that says `match`, and changes nothing."""
    mux = lora_mux.attach(Model())
    mux.add_adapter("there", {PATHS[0]: (torch.ones(2, 8), torch.ones(8, 2))}, alpha=1)
    before = snapshot(mux)
    with pytest.raises(lora_mux.LoraMuxError, match=match):
        mux.load("new", folder)
    names, buffers, spans = snapshot(mux)
    assert names == before[0] and spans == before[2]
    assert all(torch.equal(a, b) for a, b in zip(buffers, before[1], strict=True))
    mux.load("new", write(folder.parent / "good"))


def test_loads_and_equals_the_same_tensors_added_by_hand(tmp_path: Path) -> None:
    model = Model()
    mux = lora_mux.attach(model)
    made = tensors()
    mux.load("file", write(tmp_path / "a", weights=made))
    pairs = {
        path: tuple(made[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        for path in PATHS
    }
    mux.add_adapter("hand", pairs, alpha=8)  # type: ignore[arg-type]
    with mux.route(["file", "hand"]):
        y = model(torch.ones(2, 8))
    assert torch.equal(y[0], y[1]) and not torch.equal(y[0], model(torch.ones(8)))


def test_keys_without_peft_prefix(tmp_path: Path) -> None:
    bare = {key.removeprefix("base_model.model."): t for key, t in tensors().items()}
    assert set(weights_in(write(tmp_path, weights=bare))) == set(PATHS)


def test_defaults_are_peft_s(tmp_path: Path) -> None:
    (write(tmp_path, weights=tensors(8)) / CONFIG).write_text('{"peft_type": "LORA"}')
    assert {part.scaling for part in weights_in(tmp_path).values()} == {1.0}


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 0}, 0.0),
        ({"lora_alpha": -6}, -1.5),
        ({"lora_alpha": 2.5}, 0.625),
        ({"alpha_pattern": {"q": 2}}, 0.5),
        ({"alpha_pattern": {r"layers\.0\.q": 2, "q": 4}}, 0.5),
        ({"alpha_pattern": {"q": 4, r"layers\.0\.q": 2}}, 1.0),
        ({"alpha_pattern": {"^layers.0.q": 2}}, 0.5),  # ^ is the whole path's beginning
        ({"alpha_pattern": {"ayers.0.q": 2}}, 2.0),  # a pattern begins at a dot
        ({"alpha_pattern": {"q.": 2}}, 2.0),  # and ends at the end
        ({"r": 2, "rank_pattern": {".*": 4}}, 2.0),
    ],
    ids=str,
)
def test_scaling(fields: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    read = weights_in(write(tmp_path, fields))
    assert read["layers.0.q"].scaling == scaling


def test_scaling_is_peft_s(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 7,
        "rank_pattern": {r"layers\.1\..*": 5, "v": 2},
        "alpha_pattern": {"^layers.0.q": 9, "1.v": 1},
        "target_modules": ["q", "v"],
        "init_lora_weights": False,
    }
    for rslora in (False, True):
        folder = tmp_path / str(rslora)
        config = peft.LoraConfig(**fields, use_rslora=rslora)
        theirs = save_adapters(Model(), {"a": config}, folder)
        ours = weights_in(folder / "a")
        for path in PATHS:
            layer = theirs.base_model.model.get_submodule(path)
            assert math.isclose(ours[path].scaling, layer.scaling["a"])
            assert ours[path].A.shape[0] == layer.r["a"]


def test_every_field_of_lora_config_has_a_verdict() -> None:
    """A field that this PEFT knows and our table does not would be ignored or refused blindly."""
    known = peft_config.HONOURED | peft_config.IGNORED | peft_config.REFUSED.keys()
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - known == set()


REFUSED_FIELDS: dict[str, Any] = {
    "peft_type": "ADALORA",
    "r": 0,
    "lora_alpha": "8",
    "use_rslora": "yes",
    "lora_bias": 1.5,
    "rank_pattern": {"q": 0},
    "alpha_pattern": {"q": None},
    "target_modules": 3,
    "layers_to_transform": "0",
    "init_lora_weights": "pissa_niter_4",
    "bias": "some",
    "modules_to_save": "score",
    "trainable_token_indices": ["a token"],
    "use_dora": True,
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": "two"},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
    "target_parameters": ["experts.w"],
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "use_tomorrow_s_variant": True,
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_refused_fields_are_named(name: str, tmp_path: Path) -> None:
    refuse(write(tmp_path / "bad", {name: REFUSED_FIELDS[name]}), name)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga", "new_idea"])
def test_inits_on_a_shifted_base_are_refused(init: str, tmp_path: Path) -> None:
    refuse(write(tmp_path / "bad", {"init_lora_weights": init}), "init_lora_weights")


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.3},
        {"fan_in_fan_out": True},
        {"velora_config": {"a": 1}},
        {"megatron_core": "megatron.core"},
        {"modules_to_save": None, "layer_replication": None, "loftq_config": {}},
        {"base_model_name_or_path": "somebody/model", "revision": "x", "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_fields_that_do_not_matter(fields: dict[str, Any], tmp_path: Path) -> None:
    read_peft_folder(write(tmp_path, fields))


def test_an_unknown_field_that_says_nothing_only_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="use_tomorrow"):
        read_peft_folder(write(tmp_path, {"use_tomorrow": False}))


OF_TRAINERS = {
    "lora_dtype": "float32",
    "lorap_lr_ratio": 16.0,
    "unsloth_fixed": True,
    "merge_weights": True,
    "transformers_version": "5.0",
    "rank_dropout": 0.1,
}


def test_fields_of_trainers_are_named_and_ignored(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ignored 6 unknown fields .*lora_dtype.*, \\.\\.\\."):
        read_peft_folder(write(tmp_path, OF_TRAINERS))
    for name, value in (("enable_lora", [True]), ("dora_version", 2), ("a_dataset", {"r": 1})):
        with pytest.raises(lora_mux.errors.CheckpointError, match=f"`'{name}'` must be a field"):
            read_peft_folder(write(tmp_path, {name: value}))


KEY = "base_model.model.layers.0.q"


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors().items() if key not in keys}


BAD_WEIGHTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "A without B": (without(f"{KEY}.lora_B.weight"), "lora_B.weight is missing"),
    "B without A": (without(f"{KEY}.lora_A.weight"), "lora_A.weight is missing"),
    "no module": ({}, "at least one"),
    "unknown key": ({**tensors(), "layers.0.q.weight": torch.ones(8, 8)}, "layers.0.q.weight"),
    "adapter name in key": (
        {**tensors(), f"{KEY}.lora_A.default.weight": torch.ones(4, 8)},
        "lora_A.default",
    ),
    "half an embedding": (
        {**tensors(), "emb.lora_embedding_A": torch.ones(4, 8)},
        "'emb' must have both",
    ),
    "unasked magnitude": (
        {**tensors(), f"{KEY}.lora_magnitude_vector": torch.ones(8)},
        "not have lora_magnitude_vector, because its config says use_dora=False",
    ),
    "a magnitude of a matrix": (
        {**tensors(), f"{KEY}.lora_magnitude_vector": torch.ones(1, 8, 1)},
        "as long as lora_B, got shape \\[1, 8, 1\\]",
    ),
    "base bias": ({**tensors(), f"{KEY}.base_layer.bias": torch.ones(8)}, "copy of .*bias"),
    "unasked bias": ({**tensors(), f"{KEY}.lora_B.bias": torch.ones(8)}, "lora_bias"),
    "rank of A": ({**tensors(), f"{KEY}.lora_A.weight": torch.ones(5, 8)}, "rank 4"),
    "rank of B": ({**tensors(), f"{KEY}.lora_B.weight": torch.ones(8, 3)}, "rank 4"),
    "in_features": ({**tensors(), f"{KEY}.lora_A.weight": torch.ones(4, 9)}, "layers.0.q"),
    "out_features": ({**tensors(), f"{KEY}.lora_B.weight": torch.ones(9, 4)}, "layers.0.q"),
    "half a convolution": (
        {**tensors(), f"{KEY}.lora_A.weight": torch.ones(4, 8, 1, 1)},
        "must be as lora_A, with a kernel of 1",
    ),
    "a kernel in B": (
        {
            f"{KEY}.lora_A.weight": torch.ones(4, 8, 3, 3),
            f"{KEY}.lora_B.weight": torch.ones(8, 4, 3, 3),
        },
        "must be as lora_A, with a kernel of 1",
    ),
    "a convolution's factors for a linear layer": (
        {
            f"{KEY}.lora_A.weight": torch.ones(4, 8, 1, 1),
            f"{KEY}.lora_B.weight": torch.ones(8, 4, 1, 1),
        },
        r"must have shape \[r, in_features\]",
    ),
    "one dimension": ({**tensors(), f"{KEY}.lora_A.weight": torch.ones(4)}, "2-dimensional"),
    "NaN": ({**tensors(), f"{KEY}.lora_A.weight": torch.full((4, 8), math.nan)}, "lora_A.*finite"),
    "infinity": ({**tensors(), f"{KEY}.lora_B.weight": torch.full((8, 4), math.inf)}, "finite"),
    "integers": ({**tensors(), f"{KEY}.lora_A.weight": torch.ones(4, 8).int()}, "floating"),
    "another module": (
        {k.replace("layers.0.q", "layers.9.q"): t for k, t in tensors().items()},
        "layers.9.q",
    ),
    "said twice": (
        {**tensors(), "layers.0.q.lora_A.weight": torch.ones(4, 8)},
        "only one for its tensor",
    ),
}


# What a file lacks is said before its modules are looked for in the model.
@pytest.mark.filterwarnings("ignore:.*lacks modules:UserWarning")
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_named(name: str, tmp_path: Path) -> None:
    weights, match = BAD_WEIGHTS[name]
    refuse(write(tmp_path / "bad", weights=weights), match)


def test_missing_bias_is_refused(tmp_path: Path) -> None:
    refuse(write(tmp_path / "bad", {"lora_bias": True}), "lora_B.bias")


def test_fp16_overflow_is_refused(tmp_path: Path) -> None:
    big = {**tensors(), f"{KEY}.lora_A.weight": torch.full((4, 8), 1e6)}
    mux = lora_mux.attach(Model().half())
    with pytest.raises(lora_mux.LoraMuxError, match="finite in the pool's torch.float16"):
        mux.load("big", write(tmp_path, weights=big))
    assert not mux.adapters


def replace_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def huge_claim(folder: Path) -> None:
    claim = {
        "a.lora_A.weight": {"dtype": "F32", "shape": [1 << 40, 8], "data_offsets": [0, 1 << 45]}
    }
    header = json.dumps(claim).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError("a pickle was read")


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "only a pickle": (only_pickle, "pickle"),
    "a pickle by another name": (replace_file(WEIGHTS, pickle.dumps({"a": 1})), "safetensors"),
    "truncated": (truncate, "safetensors"),
    "empty weights": (replace_file(WEIGHTS, b""), "safetensors"),
    "a header of terabytes": (huge_claim, "safetensors"),
    "a length of terabytes": (replace_file(WEIGHTS, struct.pack("<Q", 1 << 60)), "safetensors"),
    "config is no JSON": (replace_file(CONFIG, b"{"), "JSON"),
    "config is not text": (replace_file(CONFIG, b"\xff\xfe\x00"), "JSON"),
    "config is a list": (replace_file(CONFIG, b"[]"), "object"),
    "config without peft_type": (replace_file(CONFIG, b'{"r": 4}'), "peft_type"),
    "config of megabytes": (replace_file(CONFIG, b" " * (2 << 20)), "bytes"),
    "config nested deeply": (replace_file(CONFIG, b"[" * 200_000), "JSON"),
    "a rank without end": (
        replace_file(CONFIG, b'{"peft_type": "LORA", "r": 1e400}'),
        "`r`",
    ),
    "an alpha that is NaN": (
        replace_file(CONFIG, b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}'),
        "lora_alpha",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "bad")
    damage, match = BROKEN[name]
    damage(folder)
    refuse(folder, match)


def hub_cache(repository: Path) -> Path:
    """A snapshot in the hub's cache, whose weights are a link to a blob."""
    snapshot = write(repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    (snapshot / WEIGHTS).rename(repository / "blobs" / "0123")
    (snapshot / WEIGHTS).symlink_to("../../blobs/0123")
    return snapshot


class TestLinks:
    """A link must not lead to another tenant's file."""

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_out_of_the_folder(self, name: str, tmp_path: Path) -> None:
        write(tmp_path / "other")
        folder = write(tmp_path / "bad")
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "other" / name)
        refuse(folder, f"{name} must be a file of its folder, got a link to")

    def test_to_the_folder(self, tmp_path: Path) -> None:
        """The path is the caller's own word."""
        (tmp_path / "link").symlink_to(write(tmp_path / "a"))
        assert set(weights_in(tmp_path / "link")) == set(PATHS)

    def test_inside_the_folder(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "bad")
        (folder / WEIGHTS).rename(folder / "weights")
        (folder / WEIGHTS).symlink_to("weights")
        refuse(folder, "got a link to 'weights'; copy the file there")

    def test_of_the_hub_s_cache(self, tmp_path: Path) -> None:
        snapshot = hub_cache(tmp_path / "models--user--name")
        assert set(weights_in(snapshot)) == set(PATHS)
        (tmp_path / "link").symlink_to(snapshot)
        assert set(weights_in(tmp_path / "link")) == set(PATHS)

    @pytest.mark.parametrize(
        "target",
        [
            "../def/adapter_model.safetensors",
            "../../blobs/../other/adapter_model.safetensors",
            "../../blobs/",
            "../../other/adapter_model.safetensors",
            "../../blobs/0123\n",
        ],
    )
    def test_out_of_the_hub_s_cache(self, target: str, tmp_path: Path) -> None:
        snapshot = hub_cache(tmp_path / "models--user--name")
        write(snapshot.parent / "def")
        write(snapshot.parent.parent / "other")
        (snapshot / WEIGHTS).unlink()
        (snapshot / WEIGHTS).symlink_to(target)
        refuse(snapshot, WEIGHTS)

    def test_to_blobs_where_there_is_no_cache(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "any" / "adapter")
        (tmp_path / "blobs").mkdir()
        (folder / WEIGHTS).rename(tmp_path / "blobs" / "0123")
        (folder / WEIGHTS).symlink_to("../../blobs/0123")
        refuse(folder, "got a link to '../../blobs/0123'")

    @pytest.mark.parametrize("name", ["blobs", "snapshots", "a blob"])
    def test_a_cache_of_links(self, name: str, tmp_path: Path) -> None:
        """Blobs of another tenant's, or a folder elsewhere that has some."""
        snapshot = hub_cache(tmp_path / "mine")
        other = hub_cache(tmp_path / "other").parent.parent
        if name == "a blob":
            blob = tmp_path / "mine" / "blobs" / "0123"
            blob.unlink()
            blob.symlink_to(other / "blobs" / "0123")
        else:
            (tmp_path / "mine" / name).rename(tmp_path / "mine" / "was")
            (tmp_path / "mine" / name).symlink_to(other / name)
            snapshot = {"blobs": snapshot, "snapshots": tmp_path / "mine" / "was" / "abc"}[name]
        refuse(snapshot, WEIGHTS)

    def test_to_itself(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "bad")
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
        refuse(folder, WEIGHTS)


class TestReading:
    def test_what_is_checked_is_what_is_used(self, tmp_path: Path) -> None:
        """Values are read, not mapped: who writes to the file later changes nothing."""
        folder = write(tmp_path)
        stored = read_peft_folder(folder)
        block = stored.read(False)
        before = {path: part.A.clone() for path, part in stored.weights(block).items()}
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate(100)
        assert all(torch.equal(stored.weights(block)[path].A, A) for path, A in before.items())

    def test_a_header_that_is_too_long(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "bad")
        good = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(good[:8], "little")
        header = good[8 : 8 + length] + b" " * (1 << 23)
        content = struct.pack("<Q", len(header)) + header + good[8 + length :]
        (folder / WEIGHTS).write_bytes(content)
        refuse(folder, "a header of")

    @pytest.mark.parametrize("start", [1, 2, 3])
    def test_values_at_odd_places(self, start: int, tmp_path: Path) -> None:
        """A header's length need not make its values aligned."""
        folder = write(tmp_path, weights=(made := tensors()))
        good = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(good[:8], "little")
        header = good[8 : 8 + length] + b" " * start
        content = struct.pack("<Q", len(header)) + header + good[8 + length :]
        (folder / WEIGHTS).write_bytes(content)
        got = weights_in(folder)["layers.0.q"].A
        assert torch.equal(got, made["base_model.model.layers.0.q.lora_A.weight"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
    def test_other_dtypes(self, dtype: torch.dtype, tmp_path: Path) -> None:
        made = {key: t.to(dtype) for key, t in tensors().items()}
        got = weights_in(write(tmp_path, weights=made))["layers.1.v"].B
        assert got.dtype == dtype
        assert torch.equal(got.float(), made["base_model.model.layers.1.v.lora_B.weight"].float())


@pytest.mark.parametrize(
    "pattern", ["(", r"(a)\1", "(?<!a)q", r"(?x:(.+) +)\#", "a" * 70_000 + "+"]
)
def test_patterns_beyond_what_is_matched(pattern: str, tmp_path: Path) -> None:
    refuse(
        write(tmp_path / "bad", {"rank_pattern": {pattern: 4}}), "rank_pattern.*list the modules"
    )


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.|.)*x", "(.+ ?)+#", ".*" * 30 + "x", "a" * 2000])
def test_patterns_that_run_for_ever_in_re_are_matched(pattern: str, tmp_path: Path) -> None:
    assert set(weights_in(write(tmp_path, {"rank_pattern": {pattern: 5}}))) == set(PATHS)


@pytest.mark.parametrize("field", ["rank_pattern", "target_modules"])
def test_patterns_that_take_too_long(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before anything changes, those that only a warning needs as well."""
    monkeypatch.setattr("lora_mux.configs.patterns.MAX_STEPS", 150)
    monkeypatch.setattr("lora_mux.configs.patterns.MAX_STEPS_PER_PATH", 0)
    hostile = "(?:(?:(?:(?:.l*)*a*)*y*)*e*)*"
    value = hostile if field == "target_modules" else {hostile: 4}
    refuse(write(tmp_path / "bad", {field: value}), "work of at most .* steps; list the modules")


@pytest.mark.parametrize("folder", ["nowhere", 3, None])
def test_no_folder(folder: Any) -> None:
    with pytest.raises(lora_mux.LoraMuxError, match="folder"):
        lora_mux.attach(Model()).load("new", folder)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"target_modules": ["q"]}, "holds modules that its config does not target: layers.0.v"),
        ({"layers_to_transform": [1]}, "does not target: layers.0.q"),
        ({"exclude_modules": ["v"]}, "does not target: layers.0.v"),
    ],
    ids=str,
)
def test_config_that_means_other_modules_warns(
    fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=match):
        lora_mux.attach(Model()).load("new", write(tmp_path, fields))


def test_file_that_lacks_modules_warns(tmp_path: Path) -> None:
    few = without(f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight")
    with pytest.warns(UserWarning, match="lacks modules that its config targets: layers.0.q"):
        lora_mux.attach(Model()).load("new", write(tmp_path, weights=few))


def test_reading_changes_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = load_file(folder / WEIGHTS)
    lora_mux.attach(Model()).load("new", folder)
    after = load_file(folder / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_outline_is_one_in_copies_too(tmp_path: Path) -> None:
    """It equals itself alone, so that a copy would be another shape of adapter."""
    outline = read_peft_folder(write(tmp_path)).outline
    assert copy.deepcopy({"a": [outline]}) == {"a": [outline]}
