"""What we write is what PEFT writes: its bytes, its answers, and nothing by halves."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import lora_mux
from lora_mux.checkpoints import peft_writer, read_peft_folder, write_peft_folder
from lora_mux.core import LoraWeights
from lora_mux.errors import AdapterError, ArgumentTypeError, CheckpointError
from peft_oracle import configs, gpt2, llama, peft, save_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def factors_of(model: Any) -> dict[str, LoraWeights]:
    """The factors in PEFT's layers."""
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"]
            bias = None if B.bias is None else B.bias.detach()
            scaling = layer.scaling["default"]
            found[path] = LoraWeights(A.detach(), B.weight.detach(), scaling, bias)
    return found


def read(folder: Path) -> dict[str, LoraWeights]:
    stored = read_peft_folder(folder)
    assert not stored.outline.remarks
    return stored.weights(stored.read(False))


def assert_equal(ours: dict[str, LoraWeights], theirs: dict[str, LoraWeights]) -> None:
    """Equal in every bit, and in their dtypes."""
    assert ours.keys() == theirs.keys()
    for path, part in ours.items():
        other = theirs[path]
        assert part.scaling == other.scaling, path
        assert part.tensors().keys() == other.tensors().keys(), path
        for name, tensor in part.tensors().items():
            assert tensor.dtype == other.tensors()[name].dtype
            assert torch.equal(tensor, other.tensors()[name]), (path, name)


def loaded(base: nn.Module, folder: Path, **options: Any) -> Any:
    """PEFT's model with a checkpoint. Whatever PEFT warns of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers the old way
        warnings.filterwarnings("ignore", ".*lora_bias=True. was passed but the targeted layer")
        return peft.PeftModel.from_pretrained(base, folder, **options).eval()


def random_factors(
    layers: dict[str, tuple[int, float]], base: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, LoraWeights]:
    """Path -> (rank, scaling) as random factors."""
    made = {}
    for path, (r, scaling) in layers.items():
        layer: Any = base.get_submodule(path)
        A, B = torch.randn(r, layer.in_features), torch.randn(layer.out_features, r)
        made[path] = LoraWeights(A.to(dtype), B.to(dtype), scaling)
    return made


def small(path: str = "layers.0.q", r: int = 2) -> dict[str, LoraWeights]:
    return {path: LoraWeights(torch.randn(r, 4), torch.randn(3, r), 2.0)}


def paths_of(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules()]


KINDS = {
    name: configs("llama")[name]
    for name in (
        *("plain", "rank1", "rank64", "rslora", "biased", "patterns"),
        *("rs-patterns", "regex", "one-layer", "all-linear", "dropout", "negative"),
    )
} | {"alpha0": configs("llama")["alpha0"]}


class TestAgainstPeft:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bytes_and_answers(self, kind: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        base = llama()
        theirs = save_adapters(base, {"default": KINDS[kind]}, tmp_path / "theirs")
        factors = factors_of(theirs)
        ours = write_peft_folder(
            tmp_path / "ours", factors, base_model="a/llama", modules=paths_of(base)
        )
        assert (ours / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
        assert_equal(read(ours), factors)
        ids = torch.arange(12)[None]
        again = loaded(base, ours)
        assert torch.equal(again(ids).logits, theirs(ids).logits)
        assert_equal(factors_of(again), factors)  # nothing else was adapted
        config = again.peft_config["default"]
        assert config.inference_mode and config.base_model_name_or_path == "a/llama"

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_any_dtype(self, dtype: torch.dtype, tmp_path: Path) -> None:
        base = llama().to(dtype)
        theirs = save_adapters(base, {"default": KINDS["plain"]}, tmp_path / "theirs", dtype)
        factors = factors_of(theirs)
        assert {part.A.dtype for part in factors.values()} == {dtype}
        ours = write_peft_folder(tmp_path / "ours", factors, base_model=None)
        assert (ours / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
        assert_equal(read(ours), factors)

    def test_conv1d(self, tmp_path: Path) -> None:
        """PEFT finds out by itself what fan_in_fan_out must be, and warns of what it found."""
        torch.manual_seed(0)
        base = gpt2()
        theirs = save_adapters(base, {"default": configs("gpt2")["patterns"]}, tmp_path / "theirs")
        ours = write_peft_folder(tmp_path / "ours", factors_of(theirs), base_model=None)
        assert (ours / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
        ids = torch.arange(12)[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = peft.PeftModel.from_pretrained(base, ours).eval()
        assert torch.equal(again(ids).logits, theirs(ids).logits)

    def test_training_goes_on(self, tmp_path: Path) -> None:
        """Ours -> PEFT, which trains a step -> its folder -> ours -> our folder."""
        torch.manual_seed(0)
        base = llama()
        path = "model.layers.1.mlp.up_proj"
        factors = random_factors({path: (4, 2.0)}, base)
        write_peft_folder(tmp_path, factors, base_model=None, dropout=0.25, task_type="CAUSAL_LM")
        model = loaded(base, tmp_path, is_trainable=True)
        assert isinstance(model, peft.PeftModelForCausalLM)
        layer = model.get_base_model().get_submodule(path)
        assert layer.lora_dropout["default"].p == 0.25
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = torch.arange(12)[None]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        trained = factors_of(model)
        assert not torch.equal(trained[path].A, factors[path].A)
        model.save_pretrained(tmp_path)
        saved = (tmp_path / WEIGHTS).read_bytes()
        assert_equal(read(tmp_path), trained)
        write_peft_folder(tmp_path, read(tmp_path), base_model=None)
        assert (tmp_path / WEIGHTS).read_bytes() == saved

    def test_some_biases(self, tmp_path: Path) -> None:
        """PEFT has biases in all layers or in none: those that lack them have zeros."""
        base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        factors = random_factors({"0": (2, 1.0), "1": (2, 1.0)}, base, torch.bfloat16)
        first = factors["0"]
        bias = torch.randn(5)
        factors["0"] = LoraWeights(first.A, first.B, 1.0, bias)
        write_peft_folder(tmp_path, factors, base_model=None)
        wanted = {**factors, "1": LoraWeights(factors["1"].A, factors["1"].B, 1.0)}
        wanted["1"] = LoraWeights(
            factors["1"].A, factors["1"].B, 1.0, torch.zeros(4, dtype=torch.bfloat16)
        )
        assert_equal(read(tmp_path), wanted)
        model = loaded(base, tmp_path, autocast_adapter_dtype=False)
        assert torch.equal(model.get_base_model()[0].lora_B["default"].bias, bias)

    def test_strided_and_shared_tensors(self, tmp_path: Path) -> None:
        """B of what is trained lies rank-major, and layers may share an A."""
        A, rows = torch.randn(4, 8)[:, ::2], torch.randn(4, 3, requires_grad=True)
        factors = {path: LoraWeights(A, rows.T, 1.0) for path in ("a", "b")}
        write_peft_folder(tmp_path, factors, base_model=None)
        plain: dict[str, Tensor] = {}
        for path in factors:
            plain[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
            plain[f"base_model.model.{path}.lora_B.weight"] = rows.detach().T.contiguous()
        assert (tmp_path / WEIGHTS).read_bytes() == save(plain, {"format": "pt"})

    def test_keys_and_dtypes_in_the_library_s_order(self, tmp_path: Path) -> None:
        factors, plain = {}, {}
        others = [torch.float8_e4m3fn, torch.float8_e5m2]
        for i, dtype in enumerate([*others, *FLOATS[::-1]]):
            path = f'{"zyxwvu"[i]}é"{"x" * i}\\'
            A, B = torch.ones(2, 3).to(dtype), torch.ones(3, 2)
            factors[path] = LoraWeights(A, B, 1.0)
            plain[f"base_model.model.{path}.lora_A.weight"] = A
            plain[f"base_model.model.{path}.lora_B.weight"] = B
        write_peft_folder(tmp_path, factors, base_model=None)
        assert (tmp_path / WEIGHTS).read_bytes() == save(plain, {"format": "pt"})
        assert read(tmp_path).keys() == factors.keys()


class Odd(nn.Module):
    """Paths that are ends of others, prefixes of others, or programs as patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        for name in ("1", "11", "a+b", "a[1]", "q|k", "$", "("):
            self.add_module(name, nn.Linear(4, 4))
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(12))
        self.axb, self.a_b = nn.Linear(4, 4), nn.ModuleDict({"1": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.modules():
            if type(layer) is nn.Linear or hasattr(layer, "lora_A"):
                x = layer(x)
        return x


ODD = {
    "ends of others": {"q": (2, 1.0), "layers.1.q": (3, 1.0), "layers.11.q": (3, 2.0)},
    "the end counts last": {"layers.1.q": (3, 2.0), "q": (2, 1.0), "layers.0.q": (4, 1.0)},
    "one that is an end": {"q": (2, 1.0)},
    "numbers": {"1": (2, 1.0), "11": (3, 0.5), "a_b.1": (1, 4.0)},
    "one number": {"1": (2, 1.0)},
    "one of a list": {"layers.1.q": (2, 1.0)},
    "programs": {"a+b": (1, 3.0), "a[1]": (2, 1.0), "q|k": (3, 1.0), "$": (4, 2.0), "q": (1, 1.0)},
    "no program": {"(": (1, 3.0), "q": (2, 1.0)},
    "a dot is any character": {"axb": (2, 1.0), "a_b.1": (3, 1.0)},
}


class TestTargets:
    @pytest.mark.parametrize("layers", ODD.values(), ids=ODD)
    def test_odd_paths(self, layers: dict[str, tuple[int, float]], tmp_path: Path) -> None:
        base = Odd()
        factors = random_factors(layers, base)
        write_peft_folder(tmp_path, factors, base_model=None, modules=paths_of(base))
        assert_equal(read(tmp_path), factors)
        assert_equal(factors_of(loaded(base, tmp_path)), factors)

    def test_a_layer_in_a_sequential(self, tmp_path: Path) -> None:
        base = nn.Sequential(nn.Linear(4, 3))
        factors = random_factors({"0": (2, 0.3)}, base)
        write_peft_folder(tmp_path, factors, base_model=None, modules=paths_of(base))
        assert_equal(read(tmp_path), factors)
        x = torch.randn(2, 4)
        y = base(x) + x @ factors["0"].A.T @ factors["0"].B.T * 0.3
        torch.testing.assert_close(loaded(base, tmp_path)(x), y)

    def test_last_names_where_they_mean_no_other(self, tmp_path: Path) -> None:
        base = llama()
        paths = [p for p in paths_of(base) if p.endswith(("q_proj", "k_proj"))]
        factors = random_factors(dict.fromkeys(paths[:3], (2, 1.0)), base)
        assert self.targets(tmp_path, factors, paths_of(base)) == ["q_proj", paths[1]]
        assert self.targets(tmp_path, factors, None) == paths[:3]
        assert paths[1].endswith("layers.0.self_attn.k_proj")

    def test_a_pattern_where_names_mean_too_much(self, tmp_path: Path) -> None:
        base = Odd()
        factors = random_factors({"q": (2, 1.0), "a+b": (2, 1.0)}, base)
        assert self.targets(tmp_path, factors, paths_of(base)) == r"q|a\+b"

    def targets(
        self, folder: Path, factors: dict[str, LoraWeights], modules: list[str] | None
    ) -> Any:
        write_peft_folder(folder, factors, base_model=None, modules=modules)
        return json.loads((folder / CONFIG).read_text())["target_modules"]


class TestStrengths:
    def fields(self, folder: Path, *strengths: tuple[int, float]) -> dict[str, Any]:
        factors = {
            f"layers.{i}.q": LoraWeights(torch.ones(r, 2), torch.ones(2, r), scaling)
            for i, (r, scaling) in enumerate(strengths)
        }
        write_peft_folder(folder, factors, base_model=None)
        for path, part in read(folder).items():
            assert part.scaling == factors[path].scaling
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        return found

    def test_the_most_common_are_the_config_s(self, tmp_path: Path) -> None:
        found = self.fields(tmp_path, (16, 2.0), (8, 4.0), (8, 4.0), (8, 1.0), (8, 4.0))
        assert (found["r"], found["lora_alpha"]) == (8, 32)
        assert found["rank_pattern"] == {"layers.0.q": 16}
        assert found["alpha_pattern"] == {"layers.3.q": 8}
        assert type(found["lora_alpha"]) is int and not found["use_rslora"]

    def test_rslora_where_it_gives_whole_numbers(self, tmp_path: Path) -> None:
        found = self.fields(tmp_path, (8, 16 / math.sqrt(8)), (6, 5 / math.sqrt(6)))
        assert found["use_rslora"] and found["lora_alpha"] == 16
        assert found["alpha_pattern"] == {"layers.1.q": 5}
        assert not self.fields(tmp_path, (16, 8 / math.sqrt(16)))["use_rslora"]

    def test_every_scaling_that_was_made_of_an_alpha_comes_back(self, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        alphas = [*range(1, 65), *torch.rand(64, dtype=torch.float64, generator=draw).tolist()]
        alphas += [0.1, 1e-9, 1 / 3, -7.3, 0.0, 1e20]
        ranks = (1, 3, 5, 6, 7, 11, 12, 13, 24, 48, 96)
        for divisor in (float, math.sqrt):
            for r in ranks:
                self.fields(tmp_path, *((r, alpha / divisor(r)) for alpha in alphas))

    def test_others_come_back_within_a_unit(self, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(1)
        scalings = torch.rand(40, dtype=torch.float64, generator=draw).tolist()
        A, B = torch.ones(9, 2), torch.ones(2, 9)
        factors = {f"{i}.q": LoraWeights(A, B, scaling) for i, scaling in enumerate(scalings)}
        write_peft_folder(tmp_path, factors, base_model=None)
        back = read(tmp_path)
        far = [
            abs(back[path].scaling - part.scaling) / math.ulp(part.scaling)
            for path, part in factors.items()
        ]
        assert max(far) == 1  # if all came back, then the docstring would promise too little


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A folder with a checkpoint and a file of somebody else's; checked for leftovers."""
    folder = tmp_path / "adapter"
    write_peft_folder(folder, small(), base_model="old")
    (folder / "README.md").write_text("mine")
    yield folder
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]
    assert (folder / "README.md").read_text() == "mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


class Failure(BaseException):
    """As of Ctrl-C."""


def fail_at(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int, error: BaseException
) -> list[int]:
    """Let one call of a function fail, counted from 0; others work. Returns the count of calls."""
    real, calls = getattr(where, name), [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 1:
            raise error
        return real(*args)

    monkeypatch.setattr(where, name, broken)
    return calls


ERRORS = [OSError(28, "No space left on device"), Failure()]
STEPS = {
    "the weights": (peft_writer, "write_tensors", 0),
    "their end": (os, "fsync", 0),
    "the config": (os, "fsync", 1),
    "the old config leaves": (os, "replace", 0),
    "the old weights leave": (os, "replace", 1),
    "the new weights come": (os, "replace", 2),
    "the new config comes": (os, "replace", 3),
}


class TestFolder:
    def test_another_checkpoint_is_replaced(self, old: Path) -> None:
        new = small("layers.1.v", 3)
        assert write_peft_folder(str(old), new, base_model="new") == old
        assert_equal(read(old), new)

    @pytest.mark.parametrize("error", ERRORS, ids=["disk", "interrupt"])
    @pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
    def test_a_failure_leaves_the_old_checkpoint(
        self, step: Any, error: BaseException, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(old)
        calls = fail_at(monkeypatch, *step, error)
        with pytest.raises((CheckpointError, Failure)) as caught:
            write_peft_folder(old, small(r=3), base_model="new")
        monkeypatch.undo()
        assert calls[0] > step[2]
        assert contents(old) == before
        assert isinstance(error, Failure) or "No space left" in str(caught.value)

    @pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
    def test_a_failure_leaves_no_new_folder(
        self, step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where, name, call = step
        fail_at(monkeypatch, where, name, call % 2, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match="`folder` must be one that can be written"):
            write_peft_folder(tmp_path / "a" / "b", small(), base_model=None)
        assert not os.listdir(tmp_path)

    def test_nobody_sees_weights_with_a_config_that_is_not_theirs(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever moment the machine fails at: a whole checkpoint, or one without a config."""
        new = {"layers.0.q": LoraWeights(torch.ones(2, 4), torch.ones(3, 2), 8.0)}
        before, seen = contents(old), []
        real = os.replace

        def watched(source: Any, target: Any) -> None:
            real(source, target)
            seen.append(contents(old) if (old / CONFIG).exists() else None)

        monkeypatch.setattr(os, "replace", watched)
        write_peft_folder(old, new, base_model="old")
        after = contents(old)
        assert seen == [None, None, None, after] and after != before

    def test_an_old_config_stays_beside_new_weights(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As while an adapter is trained: one rename, so that there is a checkpoint at any time."""
        calls = fail_at(monkeypatch, os, "replace", 9, Failure())
        config, new = (old / CONFIG).stat(), small()
        write_peft_folder(old, new, base_model="old")
        assert calls == [1] and (old / CONFIG).stat().st_ino == config.st_ino
        assert_equal(read(old), new)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_half_a_checkpoint_stays_half(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / name).write_text("half")
        fail_at(monkeypatch, os, "replace", 2, Failure())
        with pytest.raises(Failure):
            write_peft_folder(tmp_path, small(), base_model=None)
        assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "half"

    def test_a_link_is_replaced_and_not_what_it_leads_to(self, tmp_path: Path) -> None:
        """In the hub's cache, files are links to contents that others share."""
        shared, folder = tmp_path / "blob", tmp_path / "snapshot"
        shared.write_text("shared")
        folder.mkdir()
        (folder / WEIGHTS).symlink_to(shared)
        write_peft_folder(folder, small(), base_model=None)
        assert shared.read_text() == "shared" and read(folder)

    def test_others_may_read_it(self, tmp_path: Path) -> None:
        """Temporary files belong to their owner alone; these have the permissions of others."""
        write_peft_folder(tmp_path, small(), base_model=None)
        (tmp_path / "plain").write_text("")
        plain = (tmp_path / "plain").stat().st_mode
        assert {(tmp_path / name).stat().st_mode for name in (CONFIG, WEIGHTS)} == {plain}


def bad(**parts: Any) -> dict[str, LoraWeights]:
    return {
        "q": LoraWeights(**{"A": torch.ones(2, 4), "B": torch.ones(3, 2), "scaling": 1.0} | parts)
    }


NAN = torch.full((3, 2), math.nan)
REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no path": (lambda p: write(7, small()), ArgumentTypeError, "`folder` must be a path, got int"),
    "no mapping": (lambda p: write(p, [1]), ArgumentTypeError, "`factors` must be a mapping"),
    "no layer": (lambda p: write(p, {}), CheckpointError, "one layer at least"),
    "no weights": (lambda p: write(p, {"q": 1}), ArgumentTypeError, r"\['q'\]` must be LoraW"),
    "no key": (lambda p: write(p, {3: small()["layers.0.q"]}), ArgumentTypeError, "paths as keys"),
    "a bare layer": (lambda p: write(p, small("")), CheckpointError, "put it into a module"),
    "a long path": (lambda p: write(p, small("q" * 999)), CheckpointError, "at most 216 bytes"),
    "a line break": (lambda p: write(p, small("a\nb")), CheckpointError, "printable"),
    "a gain": (lambda p: write(p, bad(gain=torch.ones(3))), CheckpointError, "gain` must be None"),
    "shapes": (lambda p: write(p, bad(B=torch.ones(3, 4))), AdapterError, "B` must have shape"),
    "a bias": (lambda p: write(p, bad(bias=torch.ones(4))), AdapterError, r"bias` must .* \[3\]"),
    "no rank": (
        lambda p: write(p, bad(A=torch.ones(0, 4), B=torch.ones(3, 0))),
        *(AdapterError, "rank of at least 1"),
    ),
    "NaN": (lambda p: write(p, bad(B=NAN)), CheckpointError, r"\['q'\].B` must be finite"),
    "meta": (
        lambda p: write(p, bad(A=torch.ones(2, 4).to("meta"))),
        CheckpointError,
        "meta device",
    ),
    "ints": (lambda p: write(p, bad(A=torch.ones(2, 4).int())), ArgumentTypeError, "floating"),
    "infinite": (
        lambda p: write(p, bad(scaling=math.inf)),
        CheckpointError,
        "scaling` must be fin",
    ),
    "huge": (lambda p: write(p, bad(scaling=9e29)), CheckpointError, "less than 1e.30 / r"),
    "dropout": (lambda p: write(p, small(), dropout=1.5), CheckpointError, "from 0 to 1, got 1.5"),
    "task": (lambda p: write(p, small(), task_type="LM"), CheckpointError, "CAUSAL_LM"),
    "base": (lambda p: write(p, small(), base_model=3), ArgumentTypeError, "`base_model` must"),
    "long": (
        lambda p: write(p, {f"{i}{'x' * 200}": small()["layers.0.q"] for i in range(5200)}),
        *(CheckpointError, "give `modules`"),
    ),
}


def write(folder: Any, factors: Any, base_model: Any = None, **options: Any) -> Path:
    return write_peft_folder(folder, factors, base_model=base_model, **options)


class TestRefusals:
    @pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
    def test_before_anything_changes(
        self, call: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=message) as caught:
            call(tmp_path / "new")
        assert isinstance(caught.value, lora_mux.LoraMuxError)
        assert not os.listdir(tmp_path)

    def test_a_dtype_that_nobody_reads(self, tmp_path: Path) -> None:
        A = torch.ones(2, 4).to(torch.float8_e4m3fnuz)
        with pytest.raises(
            CheckpointError, match=r"must have a dtype .* got torch.float8_e4m3fnuz"
        ):
            write(tmp_path, bad(A=A))

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="got a file"):
            write(tmp_path / "file", small())
        with pytest.raises(CheckpointError, match="`folder` must be one that can be written"):
            write(tmp_path / "file" / "below", small())
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_in_a_file_s_place(self, tmp_path: Path) -> None:
        (tmp_path / WEIGHTS).mkdir()
        with pytest.raises(CheckpointError, match=f"{WEIGHTS} is a folder"):
            write(tmp_path, small())
        assert os.listdir(tmp_path) == [WEIGHTS]
