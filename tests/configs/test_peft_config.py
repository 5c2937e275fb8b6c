"""What a config means, by PEFT's own rules, and that reading a stranger's costs little."""

import gc
import json
import random
import re
import tracemalloc
import warnings
from typing import Any

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import lora_mux
from lora_mux.checkpoints.peft_folder import OTHER_SUFFIXES, PICKLE_FILE
from lora_mux.configs import patterns
from lora_mux.configs.peft_config import (
    MAX_CONFIG_BYTES,
    MAX_DEPTH,
    REFUSED,
    SHIFTED_BASE,
    PeftConfig,
    parse_config,
    parse_fields,
)
from lora_mux.errors import CheckpointError
from paths import ROOT
from peft_oracle import peft

PATHS = [
    f"{root}.{layers}.{i}.{part}"
    for root in ("model", "model.visual", "transformer")
    for layers, i in (("layers", 0), ("layers", 11), ("h", 3), ("blocks", 1))
    for part in ("attn.q_proj", "attn.v_proj", "mlp.experts.3.up_proj", "mlp.fc1")
] + ["lm_head", "h.0.attn.q_proj", "layers.1.attn.q_proj", "q_proj", "model.embed"]


def config(**fields: Any) -> PeftConfig:
    return parse_config({"peft_type": "LORA", **fields}, "stranger/adapter_config.json")


class TestMeaning:
    """PEFT is the oracle."""

    FIELDS: dict[str, list[Any]] = {
        "target_modules": [
            *(["q_proj"], ["attn.q_proj", "fc1"], ["q_proj", "v_proj", "up_proj", "lm_head"]),
            *(["model.layers.11.attn.q_proj", "v_proj"], r".*\.(q_proj|fc1)", "model.*proj"),
        ],
        "exclude_modules": [None, None, ["fc1"], ["model.layers.0.attn.q_proj"], r".*visual.*"],
        "layers_to_transform": [None, 1, 3, [], [0], [0, 11], [3, 1]],
        "layers_pattern": [
            *(None, None, [], "layers", "h", ["h", "layers"], "(?:visual|model).layers"),
            *(["blocks", r"mlp\.experts"], "experts", r"[a-z]*s"),
        ],
    }

    def test_targets(self) -> None:
        draw = random.Random(3)
        answers = 0
        for _ in range(400):
            fields = {name: draw.choice(values) for name, values in self.FIELDS.items()}
            if isinstance(fields["target_modules"], str):  # which PEFT wants alone
                fields["layers_to_transform"] = None
            if not fields["layers_to_transform"]:
                fields["layers_pattern"] = None
            theirs = peft.LoraConfig(**fields)
            want = {path for path in PATHS if _bool(check_target_module_exists(theirs, path))}
            assert config(**fields).targeted(PATHS) == want, fields
            answers += len(want)
        assert 400 < answers < 400 * len(PATHS) / 2

    def test_strengths(self) -> None:
        keys = ["q_proj", r".*\.experts\..*", "^model.layers.11.*", "layers.0.mlp.fc1", "h", "fc1$"]
        draw = random.Random(4)
        for _ in range(100):
            pattern = {key: draw.randrange(1, 99) for key in draw.sample(keys, 3)}
            found = config(r=100, rank_pattern=pattern, alpha_pattern=pattern).strengths(PATHS)
            for path in PATHS:
                rank = pattern.get(get_pattern_key(list(pattern), path), 100)
                alpha = pattern.get(get_pattern_key(list(pattern), path), 8)
                assert found[path] == (rank, alpha / rank)

    def test_a_pattern_of_all_linear_layers_is_everything(self) -> None:
        for fields in ({"target_modules": "all-linear"}, {"target_modules": "ALL-linear"}, {}):
            assert config(**fields).targeted(PATHS) == set(PATHS)


def _bool(found: Any) -> bool:
    return bool(found) and type(found).__name__ != "_ExcludedModule"


class TestEquality:
    """Adapters of one shape share what they can: equal configs are one key."""

    def test_order_of_names_does_not_matter(self) -> None:
        one = config(target_modules=["q", "v"], exclude_modules=["k"], layers_to_transform=[1, 2])
        other = config(target_modules=["v", "q"], exclude_modules=["k"], layers_to_transform=[2, 1])
        assert one == other and len({one, other}) == 1

    def test_order_of_patterns_does(self) -> None:
        one = config(rank_pattern={"q": 1, ".*": 2})
        other = config(rank_pattern={".*": 2, "q": 1})
        assert one != other and len({one, other, config(rank_pattern={"q": 1, ".*": 2})}) == 2

    def test_the_file_does_not_matter(self) -> None:
        assert parse_config({"peft_type": "LORA"}, "a") == parse_config({"peft_type": "LORA"}, "b")


class TestBounds:
    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "layers_pattern"])
    def test_patterns_beyond_the_syntax_name_the_way_out(self, field: str) -> None:
        for pattern in ("(", r"(a)\1", "(?<=a)b", r"(?x:(.+) +)\#"):
            value = [pattern] if field == "layers_pattern" else {pattern: 4}
            with pytest.raises(lora_mux.errors.CheckpointError, match=field) as caught:
                config(**{field: value})
            assert "stranger/adapter_config.json" in str(caught.value)
            assert "list the modules' names instead" in str(caught.value)

    def test_patterns_that_take_too_many_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patterns, "MAX_STEPS", 30_000)
        nested = "(?:(?:(?:a*b?)*c?)*d?)*"
        slow = config(target_modules=nested, rank_pattern={nested: 1})
        paths = ["aab" * 330 + str(i) for i in range(100)]
        for act in (slow.strengths, slow.targeted):
            with pytest.raises(lora_mux.errors.CheckpointError, match="stranger.*steps; list the"):
                act(paths)

    def test_paths_that_are_too_long(self) -> None:
        for path in ("a" * 1001, "." * 1001, "a\nb"):
            for act in (config().strengths, config(target_modules=["a"]).targeted):
                with pytest.raises(lora_mux.errors.CheckpointError, match="1000 characters"):
                    act([path])

    def test_large_honest_configs_take_few_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mixture of 128 experts in 48 layers, as Unsloth and as lists of names say it."""
        paths = [
            f"model.layers.{i}.mlp.experts.{j}.{name}_proj"
            for i in range(48)
            for j in range(128)
            for name in ("gate", "up", "down")
        ]
        unsloth = (
            r"(?:.*?(?:language|text).*?(?:mlp|ffn).*?(?:gate_proj|up_proj|down_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}(?!.*shared)\..*?(?:mlp|ffn).*?(?:gate|up|down)_proj)"
        )
        limit = patterns.MAX_STEPS + patterns.MAX_STEPS_PER_PATH * len(paths)
        taken = _count_steps(monkeypatch)
        assert config(target_modules=unsloth).targeted(paths) == set(paths)
        assert taken() < limit / 2
        assert config(target_modules=paths).targeted(paths) == set(paths)
        assert taken() < limit / 10
        some = config(rank_pattern={path: 4 for path in paths}, r=8)
        assert set(some.strengths(paths).values()) == {(4, 2.0)}
        assert taken() < limit / 4

    def test_a_million_names_and_layers(self) -> None:
        """Looked up, not gone through, for each path."""
        many = PeftConfig(
            target_modules=frozenset(map(str, range(10**6))),
            layers_to_transform=frozenset(range(10**6)),
        )
        paths = [f"model.layers.{i}.{i}" for i in range(1000)]
        assert many.targeted(paths) == set(paths)


def _count_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[patterns.Steps] = []

    class Counted(patterns.Steps):
        def __init__(self, paths: int = 0) -> None:
            super().__init__(paths)
            made.append(self)

    monkeypatch.setattr("lora_mux.configs.peft_config.Steps", Counted)

    def taken() -> int:
        return max(steps.limit - steps.left for steps in (made.pop() for _ in range(len(made))))

    return taken


HOSTILE_JSON = {
    "an int of a million digits": ('{"r": ' + "9" * 10**6 + "}", "an int of 1000000 digits"),
    "nested": ('{"a": ' * 30 + "1" + "}" * 30, f"at most {MAX_DEPTH} deep"),
    "nested beyond Python": ('{"a": ' + "[" * 500_000 + "]" * 500_000 + "}", "JSON"),
    "a name twice": ('{"r": 1, "\\n": 1, "\\n": 2}', r"the name '\\n' twice"),
    "many names twice": ('{"a":1,' * 1 + '"b":1,' * 150_000 + '"b":1}', "the name 'b' twice"),
    "too long": ('{"a": "' + "b" * MAX_CONFIG_BYTES + '"}', f"at most {MAX_CONFIG_BYTES}"),
    "no JSON": ("{", "JSON"),
    "a list": ("[]", "object"),
    "nothing": ("", "JSON"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json(name: str) -> None:
    text, match = HOSTILE_JSON[name]
    for given in (text, text.encode()):
        with pytest.raises(lora_mux.errors.CheckpointError, match=f"^stranger.*{match}"):
            parse_fields(given, "stranger")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('"r": 1e400', "`r` must be an int"),
        ('"r": 2147483648', "`r` must be an int from 1 to 2147483647"),
        ('"lora_alpha": -Infinity', "`lora_alpha` must be a finite"),
        ('"alpha_pattern": {"\\ud800": NaN}', r"`alpha_pattern\['\\ud800'\]` must be a finite"),
        ('"target_modules": ["a", 1]', "`target_modules` must be a string"),
        ('"target_modules": "(\\ud800\\u202e\\n"', r"got '\(\\ud800\\u202e\\n'"),
        ('"layers_to_transform": [1.5]', "`layers_to_transform` must be an int"),
        ('"peft_type": "\\u001b[2J' + "A" * 10**5 + '"', r"got '\\x1b\[2JAAA"),
    ],
)
def test_hostile_values(text: str, match: str) -> None:
    first = "" if "peft_type" in text else '"peft_type": "LORA", '
    with pytest.raises(lora_mux.errors.CheckpointError, match=match) as caught:
        parse_config(parse_fields(f"{{{first}{text}}}", "stranger"), "stranger")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_unknown_fields_give_one_short_warning() -> None:
    fields = {f"\n{i}": None for i in range(60_000)} | {"peft_type": "LORA"}
    with pytest.warns(UserWarning) as shown:
        parse_config(parse_fields(json.dumps(fields), "stranger"), "stranger")
    assert len(shown) == 1 and shown[0].filename == __file__
    text = str(shown[0].message)
    assert re.search(r"60000 unknown fields .*: '\\n0', '\\n1', '\\n2', \.\.\.$", text)
    assert text.isprintable() and len(text) < 606


def test_repeated_hostile_configs_leave_no_memory() -> None:
    """Python keeps the texts of shown warnings, and `re` and we keep nothing of a stranger."""

    def load(i: int) -> None:
        known = {"peft_type": "LORA", "target_modules": f"(q|{i}).*", "rank_pattern": {f"{i}$": i}}
        found = parse_config({**known, f"new_{i}_" + "x" * 1000: None}, f"folder/{i}" + "y" * 500)
        found.strengths(["model.q"]), found.targeted(["model.q"])
        with pytest.raises(lora_mux.errors.CheckpointError):
            parse_config({**known, f"new_{i}_" + "x" * 1000: 1}, f"folder/{i}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *shown, **how: None  # pytest would record them
        for i in range(1, 100):
            load(i)
        tracemalloc.start()
        for i in range(100, 500):
            load(i)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert grown < 50_000  # 400 texts of 605 characters would be 240 kB


def test_the_docs_name_all_that_is_refused() -> None:
    page = (ROOT / "docs" / "from_peft.md").read_text("utf-8")
    table = page.split("## What is refused")[1].split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()]
    assert all(len(row) == 3 and row[2].strip() for row in rows)  # each has a way out
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    fields = {*REFUSED, "bias", "peft_type"}
    assert named == fields | {*SHIFTED_BASE, PICKLE_FILE} | {key[1:] for key in OTHER_SUFFIXES}
    for name in fields:
        with pytest.raises(CheckpointError, match=f"`{name}` must be"):
            parse_config({"peft_type": "LORA"} | {name: "all"}, "config")
    for init in SHIFTED_BASE:
        with pytest.raises(CheckpointError, match="relative to a changed base"):
            parse_config({"peft_type": "LORA", "init_lora_weights": init}, "config")


def test_saved_modules_are_compared_with_few_names() -> None:
    fields = {"peft_type": "LORA", "modules_to_save": [f"layer{i}" for i in range(1000)]}
    config = parse_config(fields, "config")
    assert config.saves("model.layer7.dense") and config.saves("my_layer7")
    assert not config.saves("model.layer7_of_all") and not config.saves("layer")
    with pytest.raises(CheckpointError, match="`modules_to_save` must be a list of at most 1000"):
        parse_config({**fields, "modules_to_save": ["a"] * 1001}, "config")
