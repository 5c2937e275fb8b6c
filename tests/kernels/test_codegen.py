"""The machine code of every shipped config, compiled without a GPU: see codegen.py."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from paths import SUPPORT
from predict import CHAINS

CODEGEN = SUPPORT / "codegen.py"
# Bytes of shared memory that a program may have; the compiler does not always complain.
SHARED = {
    **{"sm_70": 98304, "sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376},
    **{"sm_90": 232448, "sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "gfx942": 65536},
}
SWEPT = {"sm_80", "sm_90", "sm_100", "gfx942"}  # the others have the tiles of one of these
NO_TENSOR_CORES = {"sm_70", "sm_75"}  # none that Triton uses
HALVES = (
    ("sm_80", "sm_90", "sm_86", "sm_103", "sm_70"),
    ("sm_100", "gfx942", "sm_89", "sm_120", "sm_75"),
)


def reports(*arguments: str, python: str = sys.executable) -> list[dict[str, Any]]:
    """What codegen.py prints: half of the architectures in a process of its own each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [python, str(CODEGEN), *arguments, *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for names in HALVES
    ]
    lines = []
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error
        lines += out.splitlines()
    return [json.loads(line) for line in lines]


def check_chains(found: dict[str, Any]) -> None:
    """No more loads follow one another than bench/predict.py says."""
    kernels = {found["kernel"]}
    if found["kernel"] == "fused":
        kernels.add("fused's shrink")
    assert found["chains"].keys() == kernels
    for kernel, one in found["chains"].items():
        most = CHAINS[kernel, found["config"]["block_m"], found["window"]]
        longer = [f for f in most._fields if one[f] > getattr(most, f)]
        assert not longer, f"{kernel}: {one} where {most}"


def check(found: dict[str, Any]) -> None:
    """No spills, within shared memory, on tensor cores, by wide loads, without atomics."""
    kernel, architecture, config = found["kernel"], found["architecture"], found["config"]
    assert found["spills"] == 0
    assert found["shared"] <= SHARED[architecture]
    assert not found["compare_and_swap"] and not found["float_atomics"]
    if kernel in ("plan", "reduce", "parts"):
        return
    amd = architecture == "gfx942"
    if architecture in NO_TENSOR_CORES:
        assert not found["mma"]  # else they could have larger tiles
        return
    if found["dtype"] == "fp32":
        # Full precision: TF32 would cost 3e-4 of relative error, and is what these would be.
        assert amd or not found["mma"] + found["wgmma"] + found["tcgen05"]
        return
    if amd:
        assert found["mma"]
        assert kernel == "expand" or found["loads_of_16_bytes"]
        return
    assert found["mma"] + found["wgmma"] + found["tcgen05"]
    # Decode counts what it waits for; a backward has many programs to hide it behind.
    # So does it of our own layout of B: an engine's is waited for once more in a wide window.
    forward = kernel != "weight_gradient" and found["unit"] == 16 and not found["ranks"]
    if forward and architecture == "sm_90" and found["dtype"] == "bf16":
        check_chains(found)
    # triton #9433: ptxas before 13.3 miscompiles wgmma whose left operand is in registers.
    assert not found["wgmma_from_registers"]
    if kernel == "fused":
        # A tile of less than 64 columns fills no wgmma.
        assert found["wgmma"] or architecture != "sm_90" or config["block_n"] < 64
        to_shared = [load for load in found["loads"] if load.startswith("LDGSTS")]
        assert any(".128" in load for load in to_shared)
        return
    if architecture == "sm_90" and (kernel == "weight_gradient" or config["block_m"] == 64):
        assert found["wgmma"] and not found["mma"]
    if found["unit"] < 8:
        return  # rows that are read by the element
    to_shared = [load for load in found["loads"] if load.startswith("LDGSTS")]
    if kernel == "shrink":
        assert to_shared and all(".128" in load for load in to_shared)
    elif kernel == "weight_gradient":  # also pairs and gains, of 4 bytes each
        assert any(".128" in load for load in to_shared)
    elif config["block_n"] * config["expand_group"] >= 64:  # else B has less than 16 bytes a thread
        assert any(".128" in load for load in found["loads"])


def check_all(found: list[dict[str, Any]], of_all_tiles: set[str]) -> None:
    seen = {(f["kernel"], f["architecture"]) for f in found}
    assert {a for _, a in seen} == set(SHARED)
    kernels = ("plan", "shrink", "expand", "fused", "weight_gradient", "reduce", "parts")
    assert {(k, a) for k in kernels for a in SWEPT} <= seen
    tiles = {(f["architecture"], f["dtype"], f["config"].get("block_m")) for f in found}
    assert {(a, "bf16", m) for a in of_all_tiles for m in (16, 64)} <= tiles
    failed = []
    for one in found:
        try:
            check(one)
        except AssertionError as error:
            failed.append((error, one))
    assert not failed, f"{len(failed)} of {len(found)}: {failed[:3]}"


def test_both_ends_of_every_tile_size_on_sm_90_and_the_widest_elsewhere() -> None:
    check_all(reports(), {"sm_90"})


@pytest.mark.slow
def test_every_shipped_config() -> None:
    check_all(reports("--all"), SWEPT)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_the_oldest_and_the_newest_triton(version: str, tmp_path: Path) -> None:
    """Alone in an environment: the kernel files import nothing but triton."""
    venv.create(tmp_path, with_pip=True)
    python = str(tmp_path / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"triton=={version}"], check=True)
    check_all(reports(python=python), {"sm_90"})


SHORT = {"before": 1, "turn": 0.25, "after": 1, "polls": 0, "waits": []}
# As it was while each table was asked for what the one before had said.
LONGER = ({"before": 5}, {"turn": 1.0}, {"after": 4})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("spills", 8), ("shared", 1 << 20), ("wgmma", 0), ("wgmma_from_registers", 1)),
        *(("loads", ["LDGSTS.E.64"]), ("float_atomics", ["RED.E.ADD.F32"])),
        ("chains", {}),
        *(("chains", {"shrink": SHORT | longer}) for longer in LONGER),
    ],
)
def test_the_check_can_fail(field: str, value: Any) -> None:
    good = {
        **{"kernel": "shrink", "dtype": "bf16", "architecture": "sm_90", "spills": 0},
        **{"config": {"block_m": 64}, "shared": 4096, "mma": 0, "wgmma": 4, "tcgen05": 0},
        **{"wgmma_from_registers": 0, "loads": ["LDGSTS.E.BYPASS.128"]},
        **{"compare_and_swap": [], "float_atomics": [], "unit": 16, "window": 16, "ranks": 0},
        "chains": {"shrink": SHORT},
    }
    check(good)
    with pytest.raises(AssertionError):
        check(good | {field: value})
