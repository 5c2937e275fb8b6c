"""A new adapter is what PEFT's get_peft_model makes of the same config and seed."""

import math
import random
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lora_mux.configs import initial_factors, new_strengths, written_config
from lora_mux.errors import AdapterError, ArgumentTypeError, LoraMuxError
from peft_oracle import llama, peft

MODEL = llama()
PATHS = [path for path, layer in MODEL.model.named_modules() if type(layer) is torch.nn.Linear]
PATHS = [f"model.{path}" for path in PATHS]

# Fields of a LoraConfig that PEFT takes, without names that match nothing.
SAME: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "paths and names": {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.k_proj"]},
    "a tuple": {"target_modules": ("down_proj",)},
    "a set": {"target_modules": {"o_proj", "gate_proj"}},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 3}},
    "the first counts": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "[qk]_proj": 1.5},
    },
    "rslora": {
        "target_modules": "ALL-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"up_proj": 0, "gate_proj": -4},
    },
}


def peft_model(fields: dict[str, Any], seed: int = 0, base: Any = MODEL, **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 6, "lora_alpha": 9, **fields})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config, **options)


def layers_of(model: Any) -> dict[str, Any]:
    base = model.get_base_model()
    return {path: layer for path, layer in base.named_modules() if hasattr(layer, "lora_A")}


def strengths(**fields: Any) -> dict[str, Any]:
    given = {"r": 6, "alpha": 9, **fields}
    given.setdefault("targets", given.pop("target_modules", None))
    return new_strengths(PATHS, **given)


class TestStrengths:
    @pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
    def test_as_in_peft(self, fields: dict[str, Any]) -> None:
        model = peft_model(fields)
        wanted = {
            path: (layer.r["default"], layer.scaling["default"])
            for path, layer in layers_of(model).items()
        }
        model.unload()
        found = strengths(**fields)
        assert found == wanted and list(found) == list(wanted)

    def test_in_the_order_of_the_paths(self) -> None:
        backwards = PATHS[::-1]
        assert list(new_strengths(backwards, r=1, alpha=1, targets=PATHS)) == backwards

    def test_all_by_default(self) -> None:
        assert strengths() == dict.fromkeys(PATHS, (6, 1.5))

    @pytest.mark.parametrize("alpha", [Fraction(9), np.float32(9), np.int64(9)])
    def test_numbers_of_other_libraries(self, alpha: Any) -> None:
        found = strengths(alpha=alpha)
        assert found == dict.fromkeys(PATHS, (6, 1.5))
        assert type(found[PATHS[0]].scaling) is float

    def test_random_fields(self) -> None:
        """Names, patterns and ranks, drawn; PEFT says what they mean."""
        draw = random.Random(0)
        names = ["q_proj", "mlp.up_proj", "0.mlp.gate_proj", PATHS[9], "v_proj", r"1\..*k_proj"]
        for _ in range(10):
            fields = {
                "target_modules": [n for n in draw.sample(names, 4) if "*" not in n] + ["k_proj"],
                "rank_pattern": {"k_proj": draw.randint(1, 9), r"1\..*k_proj": draw.randint(1, 9)},
                "alpha_pattern": {draw.choice(["k_proj", "^model.*k_proj", "(q|k)_proj"]): 5},
                "use_rslora": draw.random() < 0.5,
            }
            self.test_as_in_peft(fields)


REFUSED: dict[str, tuple[dict[str, Any], type[LoraMuxError], str]] = {
    "r of 0": ({"r": 0}, AdapterError, "`r` must be from 1 to"),
    "huge r": ({"r": 1 << 40}, AdapterError, "`r` must be from 1 to"),
    "r as a float": ({"r": 8.0}, ArgumentTypeError, "`r` must be an int, got 8.0"),
    "r as a flag": ({"r": True}, ArgumentTypeError, "`r` must be an int, got True"),
    "alpha": ({"alpha": math.nan}, AdapterError, "`alpha` must be finite, and .* got nan"),
    "huge alpha": ({"alpha": 10**400}, AdapterError, "`alpha` must be finite"),
    "text alpha": ({"alpha": "8"}, ArgumentTypeError, "`alpha` must be a number, got '8'"),
    "bad targets": ({"targets": 3}, ArgumentTypeError, "`targets` must be None, a pattern, or"),
    "bytes": ({"targets": b"q_proj"}, ArgumentTypeError, "`targets` must be None, a pattern, or"),
    "a mapping": ({"targets": {"q_proj": 8}}, ArgumentTypeError, "`targets` must be None"),
    "bad name": ({"targets": ["q_proj", 3]}, ArgumentTypeError, "`targets` must hold names, got 3"),
    "a name of none": ({"targets": ["q_proj", "query"]}, AdapterError, "'query', which is the end"),
    "half a name": ({"targets": ["proj"]}, AdapterError, "'proj', which is the end of none"),
    "no names": ({"targets": []}, AdapterError, r"`targets` must match a layer .* got \[\]"),
    "a name as a pattern": ({"targets": "q_proj"}, AdapterError, "give last names as a list"),
    "half a pattern": ({"targets": r"model\.layers"}, AdapterError, "a pattern its whole path"),
    "broken": ({"targets": "(q_proj"}, AdapterError, "`targets` must be a pattern whose groups"),
    "beyond": ({"targets": r"(?<=a)b"}, AdapterError, "`targets` must be text, classes"),
    "no ranks": ({"rank_pattern": [8]}, ArgumentTypeError, "`rank_pattern` must be a mapping"),
    "a rank": ({"rank_pattern": {"q_proj": 0}}, AdapterError, r"rank_pattern\['q_proj'\]` must"),
    "an alpha": ({"alpha_pattern": {"q_proj": "a"}}, ArgumentTypeError, r"alpha_pattern\['q_"),
    "a key": ({"rank_pattern": {3: 8}}, ArgumentTypeError, "a key of `rank_pattern` must be a str"),
    "a broken key": ({"alpha_pattern": {"(": 8}}, AdapterError, "a key of `alpha_pattern` must be"),
    "a pattern of none": (
        {"rank_pattern": {"q_proj": 4, "query": 8}},
        *(AdapterError, "`rank_pattern` must have patterns .* 'query', which matches none"),
    ),
    "of no target": (
        {"targets": ["q_proj"], "alpha_pattern": {"k_proj": 8}},
        *(AdapterError, "`alpha_pattern` must have patterns .* 'k_proj', which matches none"),
    ),
}


class TestRefusals:
    @pytest.mark.parametrize(("fields", "error", "message"), REFUSED.values(), ids=REFUSED)
    def test_by_name(self, fields: dict[str, Any], error: type[LoraMuxError], message: str) -> None:
        with pytest.raises(error, match=message):
            strengths(**fields)

    @pytest.mark.parametrize("argument", ["targets", "rank_pattern", "alpha_pattern"])
    def test_patterns_that_take_too_long(
        self, argument: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lora_mux.configs.patterns.MAX_STEPS", 150)
        monkeypatch.setattr("lora_mux.configs.patterns.MAX_STEPS_PER_PATH", 0)
        hostile = "(?:(?:(?:(?:.l*)*a*)*y*)*e*)*"
        value = hostile if argument == "targets" else {hostile: 4}
        with pytest.raises(AdapterError, match="work of at most .* steps; .* instead of patterns"):
            strengths(**{argument: value})

    def test_no_layers(self) -> None:
        with pytest.raises(AdapterError, match="`targets` must match a layer"):
            new_strengths([], r=8, alpha=8)

    def test_a_pattern_behind_others_is_no_mistake(self) -> None:
        """As in configs that are used for several models."""
        found = strengths(targets=["q_proj"], rank_pattern={"q_proj": 4, r".*0\..*q_proj": 8})
        assert {strength.rank for strength in found.values()} == {4}


class TestInitialFactors:
    @pytest.mark.parametrize("fields", [SAME["all"], SAME["the first counts"]])
    def test_the_bits_that_peft_draws(self, fields: dict[str, Any]) -> None:
        model = peft_model(fields, seed=7)
        generator = torch.Generator().manual_seed(7)
        for path, layer in layers_of(model).items():
            r = strengths(**fields)[path].rank
            A, B = initial_factors(layer.in_features, layer.out_features, r, generator)
            assert torch.equal(A, layer.lora_A["default"].weight), path
            assert torch.equal(B, layer.lora_B["default"].weight), path
            assert A.dtype == B.dtype == torch.float32
        model.unload()

    def test_over_a_base_in_half_precision(self) -> None:
        model = peft_model(SAME["names"], seed=3, base=llama().bfloat16())
        generator = torch.Generator().manual_seed(3)
        for layer in layers_of(model).values():
            A, _ = initial_factors(layer.in_features, layer.out_features, 6, generator)
            assert torch.equal(A.bfloat16().float(), layer.lora_A["default"].weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_are_the_same_draw(self, dtype: torch.dtype) -> None:
        A, B = initial_factors(32, 8, 4, torch.Generator().manual_seed(1), dtype)
        whole, _ = initial_factors(32, 8, 4, torch.Generator().manual_seed(1))
        assert A.dtype == B.dtype == dtype
        assert torch.equal(A, whole.to(dtype)) and not B.any()

    def test_neither_takes_from_nor_leaves_a_trace_in_other_draws(self) -> None:
        """Not in the global generator, nor by the default dtype."""
        state = torch.get_rng_state()
        A, _ = initial_factors(32, 8, 4, torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), state)
        torch.set_default_dtype(torch.float64)
        try:
            again, _ = initial_factors(32, 8, 4, torch.Generator().manual_seed(1))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(A, again)

    def test_uniform_within_the_bound(self) -> None:
        A, B = initial_factors(400, 5, 100, torch.Generator().manual_seed(0))
        assert A.abs().max() <= 1 / math.sqrt(400) and B.shape == (5, 100)
        # 40,000 draws: the mean of squares of a uniform one is a third of the bound's, to 2 %.
        assert A.square().mean().item() == pytest.approx(1 / 1200, rel=0.02)


def test_fields_that_cannot_be_read_mean_nothing() -> None:
    assert not written_config._means({"r": 0}, {})
