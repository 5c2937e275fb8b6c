"""Sharded models on two processes; tests/support/sharded.py computes, this judges."""

import ast
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lora_mux.core.pool import LoraWeights
from lora_mux.layers.sharding import Shard
from paths import SUPPORT
from peft_oracle import llama


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(SUPPORT / "sharded.py"), str(folder)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition("= ") for line in done.stdout.splitlines() if "= " in line]
    return {case: ast.literal_eval(value) for case, _, value in lines}


WAYS = [
    *("transformers", "parallelize_module", "with memory"),
    *("fully_shard", "attach, then fully_shard"),
]


@pytest.mark.parametrize("way", WAYS)
def test_same_answers_as_one_process(way: str, results: dict[str, Any]) -> None:
    assert results.get(f"{way}: failed") is None, results[f"{way}: failed"]
    # Sums of 32 or 64 products are split in two: some roundings of fp32, beside an effect of 0.8.
    assert results["effect"] > 0.1
    assert results[f"{way}: error"] <= 2e-6
    assert results[f"{way}: error with gradients"] <= 2e-6
    assert results[f"{way}: same tokens"] is True
    assert results[f"{way}: same keys"] is True


@pytest.mark.parametrize("way", [*WAYS, "reference", "triton"])
def test_gradients_of_parameters_and_weights(way: str, results: dict[str, Any]) -> None:
    assert results[f"{way}: gradient error"] <= 1e-5


def test_tensor_parallelism_holds_parts_and_adds_no_communication(results: dict[str, Any]) -> None:
    before, after = results["communication"]
    assert before == after > 0
    assert results["columns held"] == [32, 64]


def test_detached(results: dict[str, Any]) -> None:
    assert results["detached: error"] <= 2e-6


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shapes of a part", "A [r, 64] and B [64, r], got [2, 64] and [32, 2]"),
        ("uneven", "split evenly"),
        ("DoRA", "needs the whole weight of its base layer, got one that is split"),
        ("patched", "patched on the instance, by something other than transformers"),
    ],
)
def test_refusals(what: str, says: str, results: dict[str, Any]) -> None:
    assert says in results[f"refused: {what}"]


@pytest.mark.parametrize("way", ["columns", "rows"])
def test_shards_add_up_to_the_whole(way: Any) -> None:
    """Each process's factors, with their bias, against the whole in fp64."""
    weights = LoraWeights(torch.randn(3, 12), torch.randn(8, 3), 1.0, torch.randn(8))
    x = torch.randn(5, 12)

    def delta(part: LoraWeights, x: torch.Tensor) -> torch.Tensor:
        assert part.bias is not None
        return x @ part.A.T @ part.B.T + part.bias

    shards = [Shard(way, place, 4, 12, 8) for place in range(4)]
    cuts = [shard.cut(weights, "adapter") for shard in shards]
    for shard, cut in zip(shards, cuts, strict=True):
        assert shard.sizes == (cut.A.shape[1], cut.B.shape[0])
    if way == "columns":
        got = torch.cat([delta(cut, x) for cut in cuts], 1)
    else:
        pieces = x.chunk(4, 1)
        got = sum(delta(cut, piece) for cut, piece in zip(cuts, pieces, strict=True))
    torch.testing.assert_close(got, delta(weights, x))
