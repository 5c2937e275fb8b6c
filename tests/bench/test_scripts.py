"""The benchmark scripts: their workloads, their gate, their records and what is drawn of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import engines
import model
import providers
import residency
import run
import train
import workloads
from lora_mux.cli import main as command_line
from lora_mux.measure import timing
from oracle import Adapter, forward
from paths import ROOT

CPU = torch.device("cpu")


def script(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class TestWorkloads:
    def test_expected_is_the_formula(self) -> None:
        workload = workloads.Workload(
            *("odd", 33, 20, 6, 4, (3, 8)), selections=3, base_share=0.4, dtype="float32"
        )
        p = workloads.problem(workload, CPU)
        linear = nn.Linear(33, 20, bias=False)
        linear.weight = nn.Parameter(p.W)
        adapters = [Adapter(A, B, 1.0) for A, B in zip(p.A, p.B, strict=True)]
        rows = [
            [(adapters[a], float(w)) for a, w in zip(index, weight, strict=True) if a >= 0]
            for index, weight in zip(p.index.tolist(), p.weight, strict=True)
        ]
        torch.testing.assert_close(p.expected, forward(linear, p.x, rows))
        assert any(rows) and not all(rows)

    def test_popularity(self) -> None:
        def index(popularity: workloads.Popularity, J: int = 1) -> torch.Tensor:
            w = workloads.Workload("", 8, 8, 64, 64, selections=J, popularity=popularity)
            return workloads.problem(w, CPU).index

        assert len(index("identical").unique()) == 1
        assert len(index("distinct").unique()) == 64
        assert len(index("distinct", 2).unique()) == 64
        zipf, uniform = index("zipf"), index("uniform")
        assert (zipf == 0).sum() > 10 > (uniform == 0).sum()
        several = index("zipf", 4).sort(1).values
        assert (several[:, 1:] != several[:, :-1]).all()

    def test_tokens_share_the_selection_of_their_sample(self) -> None:
        w = workloads.Workload("", 8, 8, 3, 5, tokens=4)
        index = workloads.problem(w, CPU).index.view(3, 4)
        assert w.rows == 12 and (index == index[:, :1]).all()

    @pytest.mark.parametrize("grid", ["smoke", "headline", "grid", "cpu"])
    def test_grids_can_be_made(self, grid: str) -> None:
        found = list(getattr(workloads, grid)())
        assert len(found) == len(set(found)) > 10
        assert all(w.selections <= w.adapters for w in found)


@pytest.mark.parametrize("name", [*providers.CPU, "merged"])
@pytest.mark.parametrize("J", [1, 3])
def test_providers_agree_with_fp64(name: str, J: int) -> None:
    provider = {**providers.CPU, "merged": providers.merged}[name]
    w = workloads.Workload(
        *("", 64, 48, 6, 4, (8,)),
        selections=J,
        dtype="float32",
        tokens=2,
        weighted=False,
        base_share=0.0 if name == "merged" else 0.3,
        popularity="identical" if name == "merged" else "uniform",
    )
    with torch.inference_mode():
        p = workloads.problem(w, CPU)
        y = provider(p, lambda: nn.functional.linear(p.x, p.W))()
        assert (p.error(y) > 0.1) if name == "base" else (p.error(y) < 1e-6)


@pytest.mark.parametrize("J", [1, 3])
def test_flashinfer_is_given_pairs(J: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its formula for what it is given, from its documentation, since it runs on GPUs only."""

    def prepare(
        x: Any, A: Any, B: Any, token: Any, expert: Any, lora: Any, weight: Any, E: int, **_: Any
    ) -> Any:
        assert A[0].shape[:2] == B[0].shape[:2] == (1, E) and not lora.any()
        y = torch.zeros(len(x), B[0].shape[2])
        for t, e, w in zip(token, expert, weight, strict=True):
            y[t] += w * (B[0][0, e] @ (A[0][0, e] @ x[t]))
        return SimpleNamespace(run=lambda: y)

    played = SimpleNamespace(prepare_bgmv_moe=prepare)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(fused_moe=played))
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", played)
    w = workloads.Workload(
        "", 64, 64, 6, 4, (8,), selections=J, dtype="float32", tokens=2, base_share=0.3
    )
    with torch.inference_mode():
        p = workloads.problem(w, CPU)
        y = engines.flashinfer(p, lambda: nn.functional.linear(p.x, p.W))()
        assert p.error(y) < 1e-6


def test_what_a_provider_can_not_do_is_said() -> None:
    p = workloads.problem(workloads.Workload("", 16, 16, 4, 4, (4, 8), dtype="float32"), CPU)
    for provider in (providers.peft_mixed, providers.merged, providers.grouped_mm):
        with pytest.raises(providers.NotApplicable):
            provider(p, lambda: p.x)


@pytest.mark.interpreter
def test_tiny_writes_records_that_plot_refuses(tmp_path: Path) -> None:
    out = tmp_path / "tiny.jsonl"
    assert run.main(["--tiny", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    gates = {(r["provider"], r["what"]): r["gate"] for r in records}
    assert gates["lora_mux", "layer"] == gates["lora_mux", "adapters"] == "passed"
    assert gates["lora_mux batch-invariant", "layer"] == "passed"
    assert gates["lora_mux fused", "layer"] == "passed"
    assert gates["lora_mux fused", "adapters"] == "not applicable"
    assert gates["vLLM", "layer"] == gates["SGLang csgmv", "layer"] == "not applicable"
    timed = [r["microseconds"] for r in records if "microseconds" in r]
    assert timed and all(0 < t["min"] <= t["p20"] <= t["p50"] <= t["p80"] for t in timed)
    assert all(
        r.keys() >= {"commit", "dirty", "command", "device", "driver", "torch", "triton", "gate"}
        for r in records
    )
    drawn = script("bench/plot.py", str(out), "--out", str(tmp_path))
    assert drawn.returncode == 2 and "no speeds" in drawn.stderr
    assert not list(tmp_path.glob("*.png"))


TINY = workloads.Workload("tiny", 64, 48, 5, 3, (8,), dtype="float32", weighted=False)


@torch.inference_mode()
def test_measure_times_what_is_right() -> None:
    """Ours, wrong by a millionth; a wrong one; one that cannot; the base, which is no answer."""

    def wrong(problem: workloads.Problem, base: providers.Call) -> providers.Call:
        return lambda: base() + 1

    ways = {"right": providers.ours(), "wrong": wrong, "merged": providers.merged}
    ways["base"] = providers.base_alone
    timer = run.Timer(CPU, runs=5, seconds=0.0, least=4)
    found = {r.provider: r for r in run.measure(TINY, "layer", ways, CPU, timer)}
    assert [*found] == [*ways]
    gates = {name: record.gate for name, record in found.items()}
    assert gates == dict(right="passed", wrong="failed", merged="not applicable", base="none")
    timed = {name for name, record in found.items() if record.figures}
    assert timed == {"right", "base"}
    right, wrong_fields = found["right"].fields(), found["wrong"].fields()
    assert right["sets"] == 1 and right["microseconds"]["runs"] == 4 and right["error"] < 1e-6
    assert wrong_fields.keys() == {"provider", "gate", "error"} and wrong_fields["error"] > 0.1
    assert found["merged"].fields()["reason"] == "rows select different adapters"


@torch.inference_mode()
def test_measure_counts() -> None:
    (record,) = run.measure(TINY, "adapters", {"m": providers.masked}, CPU, run.count)
    assert record.figures is not None
    assert record.fields().keys() == {"provider", "gate", "error", "flops", "allocated_bytes"}
    # Without the base layer: 5 rows with the 24 rank rows, of A and of B.
    assert record.fields()["flops"] == 2 * 5 * 24 * (64 + 48)


def test_cells_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run.py --cpu --quick --count`, with one small cell; what plot.py says of it."""
    monkeypatch.setattr(workloads, "cpu", lambda quick: iter([TINY] if quick else []))
    out = tmp_path / "cpu.jsonl"
    assert run.main(["--cpu", "--quick", "--count", "--out", str(out)]) == 0
    assert re.search(r"lora_mux as a module +0\.\d MFLOP +0\.\d\d MB", capsys.readouterr().out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["provider"] for r in records] == [*providers.CPU]
    assert all(r["flops"] > 0 and r["speed"] and r["what"] == "layer" for r in records)
    drawn = script("bench/plot.py", str(out), "--out", str(tmp_path))
    assert drawn.returncode == 0 and "nothing to draw" in drawn.stdout


@pytest.mark.parametrize("option", ["--quick", "--count"])
def test_run_refuses(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--tiny", option])
    assert "go with --cpu" in capsys.readouterr().err


@torch.inference_mode()
def test_work_is_counted() -> None:
    """Of 64 rows and 16 adapters, which are multiplied all with all in fp32: one product each."""
    from work import Work, work

    workload = workloads.Workload("256", 256, 128, 64, 16, dtype="float32", weighted=False)
    problem = workloads.problem(workload, torch.device("cpu"))
    base = lambda: torch.nn.functional.linear(problem.x, problem.W)  # noqa: E731
    done = {name: work(provider(problem, base)) for name, provider in providers.CPU.items()}
    flops, y = 2 * 64 * 256 * 128, 64 * 128 * 4
    assert done["base"] == Work(flops, y)
    by_slot = 2 * 64 * (256 + 128) * 16
    assert done["segments"].flops == done["gather + bmm"].flops == flops + by_slot
    assert done["masked"] == Work(flops + 16 * by_slot, y + 64 * 256 * 4)
    assert done["lora_mux"] == done["lora_mux as a module"]
    assert flops + by_slot <= done["lora_mux"].flops <= done["masked"].flops
    assert work(ours := providers.CPU["lora_mux"](problem, base)) == work(ours)


def test_without_a_gpu_it_says_so() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = script("bench/run.py", "--smoke", **hidden)
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr


class TestPlot:
    def records(self, device: str) -> list[dict[str, Any]]:
        """As a run would write them: ours takes 1.05, another 1.5 times the base."""
        common = {"device": device, "torch": "2", "commit": "0" * 40, "speed": True}
        found: list[dict[str, Any]] = []
        for K, rows, base in ((4096, 32, 30.0), (14336, 8192, 1218.0)):
            w = workloads.Workload("8B", K, 4096, rows, 16 if "CPU" in device else 8)
            shares = {"base": 1.0, "lora_mux": 1.05, "lora_mux fused": 1.02, "vLLM": 1.5}
            if "CPU" in device:
                ours = {"lora_mux": 1.05, "lora_mux as a module": 1.15}
                shares = {"base": 1.0, **ours, "PEFT mixed": 2.0, "masked": 1.5, "segments": 1.04}
            for provider, share in shares.items():
                times = dict.fromkeys(("min", "p20", "p50", "p80"), share * base)
                gate = {"gate": "passed", "error": 1e-3, "sets": 2, "microseconds": times}
                found.append(
                    {**common, "workload": vars(w), "what": "layer", "provider": provider, **gate}
                )
        if "CPU" not in device:
            ceilings = {"launch_us": 2.0, "two_launches_us": 4.0, "copy_TBps": 4.3}
            found.insert(0, {**common, "ceilings": ceilings})
        return found

    @pytest.mark.parametrize("device", ["an H200", "a CPU"])
    def test_draws_what_is_recorded(self, tmp_path: Path, device: str) -> None:
        path = tmp_path / "grid.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records(device)))
        other = ROOT / "bench" / "results" / "model.jsonl"
        done = script("bench/plot.py", str(other), str(path), "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "grid.png").stat().st_size > 10_000
        table = "| decode, 32 rows, 8 adapters of rank 16 | 1.07 | 1.020 | 1.050 | 1.500 (vLLM) |"
        assert (table in done.stdout) == (device == "an H200")
        assert ("| not measured | not measured | not measured |" in done.stdout) == (
            device == "an H200"
        )
        table = """\
| layer | 16 / 1 |
|---|---|
| 4096 x 4096, bfloat16, 32 rows | 1.05 / 1.15 / 1.04 / 2.00 |
| 14336 x 4096, bfloat16, 8192 rows | 1.05 / 1.15 / 1.04 / 2.00 |

lora_mux: within 10 % of the best form by hand in 2 of 2 cells, ahead of PEFT's mixed batch in 2

lora_mux as a module: within 10 % of the best form by hand in 0 of 2 cells, ahead of PEFT's mixed \
batch in 2
"""
        assert (table in done.stdout) == (device == "a CPU")

    def test_a_site_that_is_missing_is_not_counted_as_free(self) -> None:
        import plot

        records = self.records("an H200")
        second = json.loads(json.dumps(records))
        for r in second:
            r.get("workload", {})["N"] = 28672
        records += [r for r in second if r.get("provider") != "lora_mux fused"]
        (line,) = (row for row in plot.headline_table(records).splitlines() if "32 rows" in row)
        assert line.endswith("| 1.07 | not measured | 1.050 | 1.500 (vLLM) |")

    def test_shares_and_roofline(self) -> None:
        import plot

        (panel, other) = plot.panels(self.records("an H200")).values()
        assert panel["lora_mux"] == [("8 / 1", pytest.approx(1.05))]
        # 2 (K N + 32 (K + N) + 8 * 16 (K + N)) bytes at 4.3 TB/s, against 30 us.
        assert panel["roofline"] == [("8 / 1", pytest.approx(36.2e6 / 4.3e6 / 30, rel=1e-2))]
        assert other["vLLM"] == [("8 / 1", pytest.approx(1.5))]


def test_model_compares_switching_with_peft(tmp_path: Path, no_old_graphs: None) -> None:
    out = tmp_path / "model.jsonl"
    sizes = ["--layers", "3", "--adapters", "4"]
    assert model.main([*sizes, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["milliseconds"]["lora_mux"].keys() >= record["milliseconds"]["PEFT"].keys()
    assert record["graphs"]["lora_mux"] == 1 < record["graphs"]["PEFT"]


def test_residency_compares_loading_with_peft(tmp_path: Path) -> None:
    out = tmp_path / "residency.jsonl"
    sizes = ["--layers", "2", "--width", "16", "--adapters", "9", "--resident", "2"]
    files = ["--folders", "2", "--peft", "3", "--targets", "3", "--registered", "20"]
    crowds = ["--crowd", "20", "--big", "4"]
    assert residency.main([*sizes, *files, *crowds, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["milliseconds"]["lora_mux"]["bytes of an adapter"] == 16 * 2 * (2 * 16 * 4 + 1)
    assert record["milliseconds"]["PEFT"]["load_adapter"]["min"] > 0
    assert record["per adapter"]["registering"]["microseconds"] > 0
    crowd = record["milliseconds"]["into a crowd"]
    assert {setting: times["evicted"] for setting, times in crowd.items()} == {
        "1 layer, 20 of rank 1, one of 10": 10,
        "2 layers, 8 of rank 2, one of 4": 2,
    }
    assert all(times["longest route"] > 0 for times in crowd.values())


def test_train_compares_gradients_before_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.jsonl"
    sizes = ["--width", "32", "--rows", "6", "--cells", "1", "4", "--runs", "3", "--seconds", "0"]
    assert train.main([*sizes, "--note", "a test", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["cell"]["adapters"] for r in records] == [4, 8]
    for record in records:
        found = record["providers"]
        assert [*found] == [*train.PROVIDERS] and record["note"] == "a test"
        assert all(of["microseconds"]["runs"] == 3 for of in found.values())
        assert all(0 < of["error"] <= record["tolerance"] for n, of in found.items() if n != "base")
        floor = found["base"]
        M = record["cell"]["adapters"] * 6
        assert floor["flops"] == 2 * 2 * M * 32 * 32  # y, and dx from dy
        assert floor["moved_bytes"] == 2 * 4 * (32 * 32 + 2 * M * 32)
        assert all(of["flops"] > floor["flops"] for n, of in found.items() if n != "base")
    assert len(re.findall("of ours by min", capsys.readouterr().out)) == 2


def test_train_times_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = train.Problem(train.Cell(3, 5, (4, 2)), 16, torch.float32, CPU)

    def unscaled(p: train.Problem) -> train.Step:
        p.scalings = [1.0] * len(p.scalings)
        return train.loop(p)

    def impossible(p: train.Problem) -> train.Step:
        raise NotImplementedError("no such product")

    tried = {"base": train.base, "unscaled": unscaled, "impossible": impossible}
    monkeypatch.setattr(train, "PROVIDERS", tried)
    found = train.measure(problem, CPU, 3, 0.0)
    assert found["base"]["microseconds"]["runs"] == 3
    assert found["unscaled"].keys() == {"error"}
    assert found["unscaled"]["error"] > problem.tolerance
    assert found["impossible"] == {"reason": "NotImplementedError: no such product"}
    train.show(found)
    told = capsys.readouterr().out
    assert "unscaled   WRONG by" in told and "impossible NotImplementedError" in told

    # Of ours it is an error of the script.
    sizes = ["--width", "16", "--rows", "5", "--cells", "5", "--runs", "3", "--seconds", "0"]
    monkeypatch.setattr(
        train, "PROVIDERS", {**tried, "lora_mux": unscaled, "as a model": train.loop}
    )
    assert train.main([*sizes, "--out", str(tmp_path / "train.jsonl")]) == 1
    assert "the fastest other (none)" in capsys.readouterr().out


def test_dispatch_times_getting_into_an_operator(tmp_path: Path) -> None:
    out = tmp_path / "dispatch.jsonl"
    few = ["--calls", "2", "--runs", "20", "--seconds", "1"]
    done = script("bench/dispatch.py", *few, "--out", str(out))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records and all(r.keys() >= {"commit", "dirty", "command", "torch"} for r in records)


def test_speed_cases_run() -> None:
    """Each once: whether ours and PEFT's answers are right, without times."""
    options = ["-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = script("-m", "pytest", "bench", *options)
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout


def test_timers_interleave() -> None:
    order: list[str] = []
    calls = {name: lambda n, name=name: order.append(name) for name in "ab"}
    times = timing.microseconds(calls, 1, CPU, runs=20)
    rounds = {"".join(order[n : n + 2]) for n in range(0, 40, 2)}
    assert len(order) == 40 and rounds == {"ab", "ba"}
    assert times.keys() == {"a", "b"} and times["a"]["runs"] == 20


def test_lora_mux_bench(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--in-features", "32", "--out-features", "16", "--dtype", "fp32", "--device", "cpu"]
    assert command_line(["bench", "--rows", "1", "8", "--selections", "2", *sizes]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "32 -> 16 fp32, 8 adapters of rank 16" in shown[0]
    assert [line.split()[0] for line in shown[-2:]] == ["1", "8"]


def test_quick_bench_has_sizes_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as no option says otherwise."""
    monkeypatch.setattr("lora_mux.measure.bench.QUICK_SECONDS", 0.0)
    options = ["--dtype", "fp32", "--device", "cpu", "--out-features", "16"]
    assert command_line(["bench", "--quick", *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "1024 -> 16 fp32, 8 adapters of rank 16" in shown[0]
    assert [line.split()[0] for line in shown[-2:]] == ["1", "32"]
