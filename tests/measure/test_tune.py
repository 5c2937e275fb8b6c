"""Tables of measured Configs: what is found, what is refused, and what `lora-mux tune` writes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from interpreter import note_launches
from layer import LayerCase
from lora_mux.cli import main
from lora_mux.errors import BackendError
from lora_mux.kernels import launch
from lora_mux.kernels.config import Architecture, choose, choose_fused
from lora_mux.measure import tune
from lora_mux.ops import tuned

CASE = tuned.Case(32, 4096, 4096, 16, 1, 2)
PLAIN = choose(32, 4096, 4096, 2, Architecture("wgmma", 132, 232448))
OTHER = replace(PLAIN, block_n=64)
FUSED = choose_fused(32, 4096, Architecture("wgmma", 132, 232448))
RECORD = {"device": "a GPU", "commit": "0" * 40}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("LORA_MUX_TUNED", str(path))
    _forget()
    yield path
    _forget()


def _forget() -> None:
    for read in (tuned.find, tuned.fused, tuned.fuses, tuned._tables):
        read.cache_clear()


def test_without_a_table_nothing_is_found() -> None:
    assert tuned.find("a GPU", CASE, PLAIN.block_m) is None


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (CASE, True),
        (CASE._replace(rows=17), True),
        (CASE._replace(rows=64), True),
        (CASE._replace(rows=65), False),  # more than twice
        (CASE._replace(rank=8, selections=2), True),
        (CASE._replace(rank=64), False),
        (CASE._replace(in_features=4097), False),
        (CASE._replace(out_features=1024), False),
        (CASE._replace(itemsize=4), False),
    ],
)
def test_an_entry_serves_its_own_sizes(table: Path, case: tuned.Case, found: bool) -> None:
    tuned.write(table, RECORD, [(CASE, OTHER, {})])
    assert tuned.find("a GPU", case, PLAIN.block_m) == (OTHER if found else None)


def test_entries_of_other_kernels_are_passed_over(table: Path) -> None:
    """A table is a person's, and outlives the fields of our configs."""
    tuned.write(
        table, RECORD, [(CASE, PLAIN, {})], [(CASE, FUSED, {"separate": 2.0, "fused": 1.0})]
    )
    content = json.loads(table.read_text())
    content["fused"][0]["config"]["swizzle"] = 2
    del content["entries"][0]["config"]["walk"]
    table.write_text(json.dumps(content))
    assert tuned.find("a GPU", CASE, PLAIN.block_m) is None
    assert not tuned.fuses("a GPU", CASE)
    tuned.write(table, RECORD, [(CASE, OTHER, {})])
    _forget()
    assert tuned.find("a GPU", CASE, PLAIN.block_m) == OTHER


def test_the_nearest_entry_wins(table: Path) -> None:
    tuned.write(table, RECORD, [(CASE._replace(rows=64), PLAIN, {}), (CASE, OTHER, {})])
    assert tuned.find("a GPU", CASE._replace(rows=40), PLAIN.block_m) == OTHER
    assert tuned.find("a GPU", CASE._replace(rows=60), PLAIN.block_m) == PLAIN


def test_another_gpus_or_tiles_entries_are_left_alone(table: Path) -> None:
    tuned.write(table, RECORD, [(CASE, OTHER, {})])
    assert tuned.find("another GPU", CASE, PLAIN.block_m) is None
    assert tuned.find("a GPU", CASE, 64) is None


def test_writing_keeps_what_was_tuned_before(table: Path) -> None:
    other = CASE._replace(in_features=1024)
    tuned.write(table, RECORD, [(CASE, PLAIN, {}), (other, PLAIN, {})])
    tuned.write(table, RECORD, [(CASE, OTHER, {"tuned": 1.0})])
    entries = json.loads(table.read_text())["entries"]
    assert [entry["in_features"] for entry in entries] == [1024, 4096]
    assert tuned.find("a GPU", CASE, PLAIN.block_m) == OTHER
    tuned.write(table, {**RECORD, "device": "a new GPU"}, [(CASE, OTHER, {})])
    assert len(json.loads(table.read_text())["entries"]) == 1


def test_fusing_is_for_what_was_measured_to_be_faster(table: Path) -> None:
    assert not tuned.fuses("a GPU", CASE)
    wide, tall = CASE._replace(out_features=8192), CASE._replace(in_features=8192)
    faster, slower = {"separate": 9.0, "fused": 8.0}, {"separate": 8.0, "fused": 9.0}
    tuned.write(table, RECORD, [(CASE, PLAIN, {})], [(wide, FUSED, faster), (tall, FUSED, slower)])
    _forget()
    assert tuned.fuses("a GPU", wide) and not tuned.fuses("another GPU", wide)
    assert tuned.fused("a GPU", wide, FUSED.block_m) == FUSED
    assert tuned.fused("a GPU", wide, 128) is None
    for case in (CASE, tall, wide._replace(rows=100), wide._replace(rank=100)):
        assert not tuned.fuses("a GPU", case) and tuned.fused("a GPU", case, 32) is None
    tuned.write(table, RECORD, [], [(wide, FUSED, slower)])
    _forget()
    assert not tuned.fuses("a GPU", wide) and tuned.find("a GPU", CASE, PLAIN.block_m) == PLAIN


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        '{"record": {}}',
        '{"record": {"device": "a GPU"}, "entries": [{"rows": 1}]}',
    ],
)
def test_a_broken_table_is_named(table: Path, content: str) -> None:
    table.write_text(content)
    with pytest.raises(BackendError, match=r"tuned\.json must be a table"):
        tuned.find("a GPU", CASE, PLAIN.block_m)


def test_a_config_that_is_none_is_refused(table: Path) -> None:
    tuned.write(table, RECORD, [(CASE, OTHER, {})])
    table.write_text(table.read_text().replace('"block_n": 64', '"block_n": 100'))
    with pytest.raises(BackendError, match="block_n"):
        tuned.find("a GPU", CASE, PLAIN.block_m)


@pytest.mark.interpreter
def test_tune_fuses_where_it_was_faster(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_mux.measure import problem, timing, tune

    monkeypatch.setattr(problem, "microseconds", partial(timing.microseconds, seconds=0.0))
    monkeypatch.setattr(tune, "CHOICES", {})
    monkeypatch.setattr(tune, "FUSED_CHOICES", {"stages": (2,)})
    sizes = ["--in-features", "16", "--out-features", "24", "--rank", "16", "--adapters", "3"]
    assert main(["tune", "--device", "cpu", "--rows", "4", "20", "40", *sizes]) == 0
    assert "in one launch" in capsys.readouterr().out
    content = json.loads(table.read_text())
    assert [entry["rows"] for entry in content["entries"]] == [4, 20, 40]
    assert [entry["rows"] for entry in content["fused"]] == [4, 20]

    names = note_launches(monkeypatch)
    for times, expected in (((2.0, 1.0), "fused"), ((1.0, 2.0), "expand")):
        for entry in content["fused"]:
            entry["microseconds"] = dict(zip(("separate", "fused"), times, strict=True))
        table.write_text(json.dumps(content))
        _forget()
        case = LayerCase((16, 16, 16), (16, 24), torch.bfloat16, backend="triton")
        with torch.no_grad():
            case.check(case.x(4), torch.tensor([[0], [1], [-1], [2]]))
            case.check(case.x(0), torch.empty(0, 1, dtype=torch.int64))
        assert names.pop() == expected and "expand" not in names and "fused" not in names


@pytest.mark.interpreter
def test_tune_writes_a_table_that_layers_then_use(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_mux.measure import problem, timing, tune

    monkeypatch.setattr(problem, "microseconds", partial(timing.microseconds, seconds=0.0))
    monkeypatch.setattr(tune, "CHOICES", {"block_n": (64,)})
    sizes = ["--in-features", "96", "--out-features", "160", "--rank", "16", "--adapters", "3"]
    assert main(["tune", "--device", "cpu", "--rows", "4", "--dtype", "fp32", *sizes]) == 0
    assert "wrote" in capsys.readouterr().out
    content = json.loads(table.read_text())
    assert content["record"].keys() >= {"device", "commit", "dirty", "torch", "triton", "command"}
    (entry,) = content["entries"]
    assert entry["microseconds"].keys() == {"chosen", "tuned"}

    # Whatever it found, make it recognisable, and see the launchers get it.
    entry["config"].update(block_n=16, split_k=4)
    table.write_text(json.dumps(content))
    _forget()
    seen = []
    shrink = launch.shrink

    def watched(*arguments: Any) -> None:
        seen.append(arguments[-1])
        shrink(*arguments)

    monkeypatch.setattr(launch, "shrink", watched)
    case = LayerCase(ranks=(16, 16, 16), backend="triton")
    case.check(case.x(4), torch.tensor([[0], [1], [-1], [2]]))
    assert [(config.block_n, config.split_k) for config in seen] == [(16, 4)]
    invariant = LayerCase(ranks=(16, 16, 16), backend="triton", batch_invariant=True)
    invariant.check(invariant.x(4), torch.tensor([[0], [1], [-1], [2]]))
    assert seen[-1].block_n != 16  # measured ones differ with the rows


def test_what_a_gpu_refuses_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """But for what it runs now: that is no matter of tuning."""

    def call(config: Any, n: int) -> None:
        if config.block_n == OTHER.block_n:
            raise RuntimeError("out of resource: shared memory")

    assert tune._runnable(call, {"best": PLAIN, "128": OTHER}) == {"best": PLAIN}
    assert f"left out {OTHER}: RuntimeError" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="out of resource"):
        tune._runnable(call, {"best": OTHER})


def test_what_cannot_be_is_not_tried() -> None:
    limited = replace(PLAIN, registers=128)
    assert tune._with(limited, "registers", 255) == replace(PLAIN, registers=255)
    assert tune._with(replace(PLAIN, registers=None), "registers", 255) is None  # AMD's
    deep = replace(PLAIN, block_k=256, shrink_stages=1)
    assert tune._with(deep, "shrink_stages", 2) == replace(deep, shrink_stages=2)
    # 16 rows of x and 64 of A, 256 columns of 4 bytes, and that four times: 327,680 bytes.
    assert tune._with(deep, "shrink_stages", 4) is None


def test_without_a_gpu_tune_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    assert "torch sees none" in capsys.readouterr().err
