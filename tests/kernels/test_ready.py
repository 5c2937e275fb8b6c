"""Launches that are made again without triton: see relaunches.py."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from lora_mux.ops.eager import again
from paths import SUPPORT

APART = {"begins at an odd address", "columns apart", "fused, at an odd address"}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "relaunches.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_same_variants_are_launched_as_by_triton(report: dict[str, Any]) -> None:
    """After all other cases were: whatever triton looks at, another variant is another case."""
    for name, case in report["again"].items():
        assert case["again"] == case["first"], name


def test_answers_are_right(report: dict[str, Any]) -> None:
    errors = {name: case["error"] for name, case in report["again"].items() if "error" in case}
    assert len(errors) == 5 and max(errors.values()) < 4, errors


def test_only_pointers_that_are_not_aligned_and_copies_need_triton(report: dict[str, Any]) -> None:
    needing = {name for name, case in report["again"].items() if case["by triton"]}
    assert needing == APART


def test_variants_differ_where_triton_looks(report: dict[str, Any]) -> None:
    """The cases above would show nothing if all had the same variants."""
    launches = report["again"]

    def shrink(name: str) -> Any:
        return launches[name]["again"][1]["specialised"]

    assert shrink("plain")["x_ptr"] == "16" and "x_ptr" not in shrink("begins at an odd address")
    assert shrink("rows apart by 1")["X_UNIT"] == "1" and shrink("plain")["X_UNIT"] == "16"
    # A J of 16 is divisible by 16, one of 1 is compiled in, and one of 2 is neither.
    assert shrink("plain")["J"] == "1" and shrink("sixteen places")["J"] == "16"
    assert "J" not in shrink("two places")


def test_whoever_looks_on_sees_launches_by_triton(report: dict[str, Any]) -> None:
    assert report["watched"] == {
        **{"nobody": 0, "a hook before": 3, "a hook after": 3, "debugging": 3},
        "nobody any more": 0,
    }


def test_steps_of_training_are_launched_again(report: dict[str, Any]) -> None:
    """The same variants as by triton; but for a shrink of dy alone, none is triton's any more."""
    found = report["training"]
    assert {name: case["by triton"] for name, case in found.items()} == {
        **dict.fromkeys(found, 0),
        "x needs none": 1,
    }
    for name, case in found.items():
        assert case["again"] == case["first"], name
        assert case["error"] < 4, (name, case["error"])
    names = [one["name"].removesuffix("_kernel") for one in found["parts"]["again"]]
    layer = ["shrink", "expand"] * 2
    assert names == ["plan", *layer, "weight_gradient", "parts", "weight_gradient"]
    names = [one["name"].removesuffix("_kernel") for one in found["invariant"]["again"]]
    assert names.count("reduce") == 2, "each in parts, whatever the batch"


def test_training_meets_the_operators_where_something_looks_on(report: dict[str, Any]) -> None:
    """With the same bits; a layer under a hook of triton's keeps to triton's launches."""
    found = report["watched_training"]
    assert (found["nobody"], found["debugging"], found["same"]) == (0, 7, True)
    assert found["operators"] == [
        f"lora_mux::{name}" for name in ("add_lora_", "linear", "plan", "weight_gradient")
    ]


def test_a_layer_that_trains_nothing_beside_one_that_does(report: dict[str, Any]) -> None:
    assert report["beside_training"] < 0.01


def test_modes_and_autograd_still_meet_the_operators(report: dict[str, Any]) -> None:
    found = report["dispatched"]
    assert found["operators"] == ["lora_mux::add_lora_", "lora_mux::plan"]
    assert found["error"] < 4 and found["gradient"] < 0.02 and found["subclass"]


def test_each_device_gets_its_launches(report: dict[str, Any]) -> None:
    assert report["devices"] == [1, 1, 0, 0]


def test_nothing_is_kept_where_variants_depend_on_more(report: dict[str, Any]) -> None:
    assert report["kept on ROCm"] == 0


def test_cases_that_are_kept_are_not_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server meets another number of rows at each step."""
    kept: dict[object, Any] = {}
    monkeypatch.setattr(again, "_AGAIN", kept)
    monkeypatch.setattr(again, "MOST_CASES", 3)
    for rows in range(10):
        again.keep(rows, f"again {rows}", 0, (32, 64))
        assert kept[rows] == f"again {rows}" and len(kept) <= 3
    again.keep("at an odd address", "again", 0, (32, 66))
    assert "at an odd address" not in kept
