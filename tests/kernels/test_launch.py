"""The launchers on Triton's real path, without a GPU: see launches.py and fake_driver.py."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_mux.kernels import launch
from lora_mux.kernels.config import Architecture
from paths import SUPPORT

SCRIPT = SUPPORT / "launches.py"
KERNELS = ["plan_kernel", "shrink_kernel", "expand_kernel"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_architecture_computes_right(report: dict[str, Any]) -> None:
    """Problem.check has judged the values; here are what was launched, and how often."""
    assert {name.split()[0] for name in report["values"]} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for launches in report["values"].values():
        assert [one["name"] for one in launches] == KERNELS


def test_grids(report: dict[str, Any]) -> None:
    plan, shrink, expand = report["values"]["sm_90 many rows"]
    assert plan["grid"] == [5, 1, 1]  # 70 rows in tiles of 16
    assert shrink["grid"][0] == 5 and shrink["grid"][2] == 1
    assert expand["grid"] == [5, 3, 1]  # 80 columns in blocks of 32


@pytest.mark.parametrize("case", ["sm_80 aligned", "sm_90 aligned", "sm_100 aligned", "sm_90 fp32"])
def test_alignment_reaches_the_compiler(case: str, report: dict[str, Any]) -> None:
    """Without it loads are of 2 bytes instead of 16."""
    _, shrink, expand = report["values"][case]
    for one, names in (
        (shrink, ("x_ptr", "pool.A_rows", "h_ptr", "R", "stride_ac", "X_UNIT")),
        (expand, ("h_ptr", "pool.B_rows", "y_ptr", "R", "stride_bc", "Y_UNIT")),
    ):
        found = {name: one["specialised"].get(name) for name in names}
        assert found == dict.fromkeys(names, "16")


def test_odd_sizes_keep_the_pools_alignment(report: dict[str, Any]) -> None:
    _, shrink, expand = report["values"]["sm_90 odd"]
    assert shrink["specialised"]["stride_ac"] == expand["specialised"]["stride_bc"] == "16"
    assert shrink["specialised"]["X_UNIT"] == expand["specialised"]["Y_UNIT"] == "1"
    assert shrink["stages"] == 1, "what is read two bytes at a time passes through registers"
    assert report["values"]["sm_90 aligned"][1]["stages"] > 1
    assert report["values"]["sm_90 fp32"][1]["stages"] > 1


def test_the_fused_launch(report: dict[str, Any]) -> None:
    """Three base programs of 32 columns; 2 slots of two blocks each, with K in two parts."""
    plan, fused = report["fused"]
    assert (plan["name"], fused["name"]) == ("plan_kernel", "fused_kernel")
    assert fused["grid"] == [4 * 2 + 3, 1, 1]
    names = "x_ptr W_ptr pool.A_rows pool.B_rows y_ptr h_ptr R stride_ac stride_bc X_UNIT Y_UNIT"
    assert all(fused["specialised"][name] == "16" for name in names.split())


def test_the_weight_gradient(report: dict[str, Any]) -> None:
    """80 columns in blocks of 64, ranks 8 and 40 in groups of 32, and two parts."""
    products, reduce = report["gradient"]
    assert (products["name"], reduce["name"]) == ("weight_gradient_kernel", "reduce_kernel")
    assert products["grid"] == [2, 3, 2] and reduce["grid"] == [2, 3, 1]
    names = "u_ptr v_ptr gain_ptr out_ptr pair_ptr start_ptr item_ptr R UNIT"
    assert all(products["specialised"][name] == "16" for name in names.split())


def test_codegen_compiles_what_is_launched(report: dict[str, Any]) -> None:
    """Its table of argument types is the launchers'."""
    code = "import codegen, json; print(json.dumps(codegen.signatures('bf16')))"
    tables = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
    )
    table = json.loads(tables.stdout)
    for one in [*report["values"]["sm_90 aligned"], report["fused"][-1], *report["gradient"]]:
        given = {k: v for k, v in one["signature"].items() if v != "constexpr"}
        known = table[one["name"].removesuffix("_kernel")]
        assert given == {k: v for k, v in known.items() if k in given}
        assert {k for k in known if k not in given} <= {"stride_ij", "stride_wj"}  # 1: compiled in


def test_rows_routing_and_adapters_do_not_recompile(report: dict[str, Any]) -> None:
    # Two of plan: a tile of the fused kernel has other rows.
    once = dict.fromkeys(("shrink", "expand", "fused", "weight_gradient", "reduce", "parts"), 1)
    assert report["variants"] == {"plan": 2, **once}


@pytest.mark.parametrize(
    ("name", "launches", "budget"),
    [("graph", KERNELS, 8), ("fused graph", ["plan_kernel", "fused_kernel"], 1)],
)
def test_a_captured_graph_replays_right(
    name: str, launches: list[str], budget: int, report: dict[str, Any]
) -> None:
    graph = report[name]
    assert graph["launches"] == launches
    assert len(graph["errors"]) == 8
    assert all(error <= budget for error in graph["errors"].values()), graph["errors"]


def test_launchers_need_no_values(report: dict[str, Any]) -> None:
    """On fake tensors a sync raises; sizes pass 2^31 elements."""
    names = [one["name"] for one in report["fake"]]
    more = ["shrink_kernel", "shrink_kernel", "plan_kernel", "fused_kernel"]
    assert names == [*KERNELS, *more, "parts_kernel", "weight_gradient_kernel"]
    assert report["fake"][2]["grid"] == [1094, 79, 1]  # 4 blocks of 128 columns each
    assert report["fake"][-2]["grid"] == [70_000 * 2 * 64 // 1024, 1, 1]
    assert report["fake"][-3]["grid"] == [4 * 32 + 313, 1, 1]  # parts of K x groups, base programs
    assert report["fake"][-1]["grid"] == [16, 64, 1]  # blocks of columns, and adapters


def test_launches_go_to_the_device_of_their_tensors(report: dict[str, Any]) -> None:
    """Triton launches on the current device, which is the first one here."""
    on_first, on_second = report["devices"]["cuda:0"], report["devices"]["cuda:1"]
    assert on_first == [0] * len(on_second) and on_second == [1] * len(on_first)
    assert len(on_first) == len([*KERNELS, *["shrink_kernel"] * 2, "fused_kernel"])


@pytest.mark.parametrize(
    ("properties", "found"),
    [
        ({"major": 9, "minor": 0, "optin": 232448}, Architecture("wgmma", 10, 232448)),
        ({"major": 8, "minor": 6, "optin": 101376}, Architecture("mma", 10, 101376)),
        ({"major": 10, "minor": 3}, Architecture("tcgen05", 10, 101376)),  # unknown: the least
        ({"major": 7, "minor": 5, "optin": 65536}, Architecture("none", 10, 65536)),
    ],
)
def test_a_device_says_what_it_is(
    properties: dict[str, int], found: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"optin": "shared_memory_per_block_optin"}
    told = SimpleNamespace(
        multi_processor_count=10, **{names.get(k, k): v for k, v in properties.items()}
    )
    capability = properties["major"], properties["minor"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "capability", launch.capability.__wrapped__)
    device = torch.device("cuda", 0)
    assert launch.architecture.__wrapped__(device) == found
    assert launch.capability(device) == capability
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.architecture.__wrapped__(device) == Architecture("mfma", 10, 65536)


def test_the_interpreter_computes_as_on_an_h200() -> None:
    cpu = torch.device("cpu")
    assert launch.architecture(cpu) == Architecture("wgmma", 132, 232448)
    assert launch.capability(cpu) == (9, 0)
