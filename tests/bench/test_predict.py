"""The model of launches: what it must hold whatever its constants, its records, and its page."""

import json
import statistics
from dataclasses import replace
from typing import Any

import pytest

import predict
from paths import ROOT
from workloads import Workload, headline

HEADLINE = [w for w in headline() if w.weighted]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


def launches(name: str) -> dict[str, float]:
    lines = (ROOT / "bench/results/h100-launches.jsonl").read_text("utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found: dict[str, float] = next(r["microseconds"] for r in records if r["what"] == name)
    return found


def test_constants_are_the_records() -> None:
    one, fork = launches("launch"), launches("fork, two side by side, join, one")
    assert one["p20"] <= predict.LAUNCH <= one["p80"]
    assert fork["p20"] <= 2 * predict.LAUNCH + predict.JOIN <= fork["p80"]
    fitted = HEADLINE[0]
    real = predict.measured()[fitted]["pair"]
    assert real is not None
    assert predict.shrink(fitted) + predict.expand(fitted) == pytest.approx(real, 0.01)


@pytest.mark.parametrize("rows", [1, 32, 8192])
def test_the_base_is_near_the_roofline(rows: int) -> None:
    """What an H100's data sheet allows, 3.35 TB/s and 989 TFLOPS, and less than twice that."""
    for w in (w for w in HEADLINE if w.rows == rows):
        bytes_ = 2 * (w.K * w.N + w.rows * (w.K + w.N))
        roofline = max(bytes_ / 3.35e6, 2 * w.rows * w.K * w.N / 989e6)
        assert roofline < predict.base(w) < 2 * roofline


def test_the_base_is_as_measured() -> None:
    off = [predict.base(w) / (predict.measured()[w]["base"] or 0) - 1 for w in HEADLINE]
    assert statistics.median(map(abs, off)) < 0.03 and max(map(abs, off)) < 0.2


def test_a_launch_costs_at_least_the_launch() -> None:
    for w in HEADLINE:
        assert min(predict.shrink(w), predict.expand(w)) > predict.LAUNCH
        one = predict.fused(w)
        assert one is None or one > predict.START + 2 * w.K * w.N / predict.BANDWIDTH
        times = predict.layer(w)
        assert times["separate"] == pytest.approx(predict.base(w) + (times["pair"] or 0))


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_more_never_cost_less(rows: int) -> None:
    """More adapters, and wider layers."""
    w = Workload("8B o", 4096, 4096, rows, 1)
    for variants in (
        [replace(w, adapters=n) for n in range(1, 65)],
        [replace(w, N=n, adapters=8) for n in range(8192, 32768, 4096)],
    ):
        for name in ("pair", "separate", "fused"):
            times = [predict.layer(one)[name] or 0 for one in variants]
            assert times[0] > 0 and times == sorted(times)


def test_longer_chains_never_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [predict.layer(w) for w in HEADLINE]
    for key, chain in predict.CHAINS.items():
        monkeypatch.setitem(predict.CHAINS, key, chain._replace(before=chain.before + 3))
    longer = [predict.layer(w) for w in HEADLINE]
    for one, other in zip(now, longer, strict=True):
        assert all((one[name] or 0) <= (other[name] or 0) for name in one)
    assert now != longer


def test_one_adapter_by_hand() -> None:
    """One row: a load, 4 steps of which two are under way, a load; then 2, and B and h."""
    w = Workload("8B o", 4096, 4096, 1, 1)
    loads = predict.LATENCY * (1 + 1 + 3 / 2 + 1), predict.LATENCY * (2 + 1)
    assert predict.shrink(w) == pytest.approx(predict.LAUNCH + predict.WORK + loads[0])
    assert predict.expand(w) == pytest.approx(predict.LAUNCH + predict.WORK + loads[1])


def test_it_says_that_it_predicts_and_the_page_has_what_it_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    predict.main()
    printed = capsys.readouterr().out
    assert printed.startswith("Predictions, not measurements")
    for part in (predict.predictions(), predict.comparison()):
        assert part in printed and part in PAGE


def test_the_page_keeps_predictions_apart() -> None:
    """In a section of their own, after all that was measured."""
    measured, _, predicted = PAGE.partition("\n## Predictions, not measurements\n")
    assert "\n## " not in predicted
    assert "| predicted |" in predicted and "| predicted |" not in measured
