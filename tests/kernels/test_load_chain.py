"""The chain counter, on machine code of a few lines and on kernels whose chains are known."""

import json
import os
import subprocess
import sys

import pytest

from load_chain import Chain, chain, ways_through
from paths import SUPPORT


def encoded(*lines: str) -> str:
    """SASS as cuobjdump prints it, 16 bytes a line; `< 0 1 > 2`: waits for 0 and 1, sets 2."""
    found = []
    for i, line in enumerate(lines):
        text, _, scoreboards = line.partition(" <")
        waits, _, sets = scoreboards.partition(">")
        word = int(sets.strip() or "7") << 46 | sum(1 << 52 + int(w) for w in waits.split())
        guard, operation = ("", text) if text[0] != "@" else text.split(" ", 1)
        found.append(f"        /*{16 * i:04x}*/  {guard:>6} {operation} ;   /* 0x{0:016x} */")
        found.append(f"{'':60} /* 0x{word:016x} */")
    return "\n".join(found)


def found(*lines: str, loops: int = 1, polls: bool = False) -> tuple[int, float, int]:
    """(before, a turn, after)"""
    one = chain(ways_through(encoded(*lines)), loops, polls)
    return one.before, one.turn, one.after


END = ("STG.E [R6], R9", "EXIT")
LOAD = "LDG.E R2, [R4.64] <"
NEXT = "LDG.E R4, [R2.64] <"
PRODUCT = "HMMA.16816.F32.BF16 R8, R2, R4, R8 <"


def test_a_chain_of_two() -> None:
    """The second address is what the first has loaded."""
    assert found(f"{LOAD} > 0", f"{NEXT} 0 > 1", f"{PRODUCT} 1", *END) == (1, 0, 0)


def test_two_loads_at_once() -> None:
    assert found(f"{LOAD} > 0", f"{NEXT} > 1", f"{PRODUCT} 0 1", *END) == (0, 0, 0)


def test_a_scoreboard_that_two_loads_share() -> None:
    """It is clear once both are there: who wants the first waits for the second."""
    lines = (f"{LOAD} > 0", f"{LOAD} > 1", f"{NEXT} 1 > 0", f"{PRODUCT} 0", *END)
    assert found(*lines) == (1, 0, 0)


def test_what_is_wanted_after_the_products() -> None:
    """One load that was there long ago, two in a row, and an atomic that returns something."""
    lines = (f"{LOAD} > 0", f"{LOAD} > 1", f"{PRODUCT} 0", "FADD R2, R2, R2 < 1", f"{LOAD} > 2")
    more = (f"{NEXT} 2 > 2", "ATOMG.E.ADD PT, R3, [R4], R5 < 2 > 3", "CCTL.IVALL < 3")
    assert found(*lines, *more, *END) == (0, 0, 3)


def test_stores_and_scoreboards_of_others_cost_nothing() -> None:
    """A store releases its registers, a shuffle and a load from shared memory take no time here."""
    lines = ("SHFL.IDX PT, R2, R2, R3, 0x1f < > 0", "LDS.64 R4, [R19] < 0 > 1", f"{PRODUCT} 1")
    assert found(*lines, "STG.E [R6], R9 < > 2", "FADD R9, R9, R9 < 2", "EXIT") == (0, 0, 0)


@pytest.mark.parametrize("under_way", [1, 2, 3, 4, 5, 6])
def test_groups_of_copies_under_way(under_way: int) -> None:
    """cp.async in a loop: a turn takes 1 / (the groups that are in flight)."""
    copy = ("LDGSTS.E.BYPASS.128 [R7], [R40.64]", "LDGDEPBAR < > 0")
    loop = 32 * under_way
    assert found(
        *copy * under_way,
        f"DEPBAR.LE SB0, 0x{under_way - 1:x}",
        PRODUCT,
        *copy,
        f"@!P5 BRA 0x{loop:x}",
        "DEPBAR.LE SB0, 0x0",
        *END,
    ) == (0, 1 / under_way, 1)


def test_a_loop_that_loads_in_each_turn() -> None:
    lines = (f"{LOAD} > 0", f"{NEXT} 0 > 1", f"{PRODUCT} 1", "@P0 BRA 0x0")
    assert found(*lines, *END) == (1, 2, 0)


def test_a_loop_that_is_left_in_its_middle() -> None:
    """As `while left > 0` may be compiled: an exit, then a branch back that is always taken."""
    lines = (f"{LOAD} > 0", f"{PRODUCT} 0", "STG.E [R6], R9", "@!P0 EXIT", "BRA 0x0")
    assert found(*lines) == (0, 1, 0)


def test_the_longer_side_of_a_branch() -> None:
    """Whether it is taken is not known, so neither side is left out."""
    for guarded in ("@P0 BRA 0x40", "@!P0 BRA.U UP1, 0x40", "BRA !UP1, 0x40"):
        lines = (f"{LOAD} > 0", guarded, f"{NEXT} 0 > 0", "FADD R2, R2, R2 < 0")
        assert found(*lines, f"{LOAD} 0 > 0", f"{PRODUCT} 0", *END) == (2, 0, 0)


def test_lanes_do_not_part() -> None:
    """BRA.DIV leads to shuffles one lane at a time; its way back is no loop around the product."""
    loop = (f"{LOAD} > 0", "BRA.DIV UR6, 0x60", f"{PRODUCT} 0", "@P0 BRA 0x0")
    slow = (f"{LOAD} > 0", "FADD R2, R2, R2 < 0", "BRA 0x20")
    assert found(*loop, *END, *slow) == (0, 1, 0)


def test_further_windows_are_left_out() -> None:
    """The same again behind a branch, which a tile with a longer union takes."""
    first = (f"{LOAD} > 0", f"{PRODUCT} 0", "@P0 BRA 0x0", "@P1 BRA 0x90")
    further = (f"{LOAD} > 0", "FADD R2, R2, R2 < 0", "@P2 BRA 0x80", PRODUCT, "@P3 BRA 0x40")
    assert found(*first, *further, *END) == (0, 1, 0)
    assert found(*first, *further, *END, loops=2) == (0, 1, 1)


FUSED = (
    *("@P0 BRA 0x70",),
    # shrink: tables, products, and an atomic that returns nothing
    *(f"{LOAD} > 0", f"{NEXT} 0 > 1", f"{PRODUCT} 1", "@P1 BRA 0x20"),
    *("REDG.E.ADD.STRONG.GPU [R2], R5", "EXIT"),
    # base: products, a poll by one thread, then h
    *(f"{LOAD} > 0", f"{PRODUCT} 0", "@P1 BRA 0x70", "@P2 BRA 0xe0"),
    *("LDG.E.STRONG.GPU R14, [R14.64] < > 0", "CCTL.IVALL < 0", "@!P1 BRA 0xb0"),
    *("LDG.E.128.STRONG.GPU R8, [R22.64] < > 0", f"{PRODUCT} 0", "@P1 BRA 0xe0", *END),
)


def test_a_kernel_of_two_roles() -> None:
    assert found(*FUSED) == (1, 1, 0)  # shrink
    assert found(*FUSED, loops=2, polls=True) == (0, 1, 2)  # a poll, then h
    assert found(*FUSED, loops=2) == (0, 1, 1)  # nothing to wait for


def test_no_such_way() -> None:
    with pytest.raises(ValueError, match="loops=3, polls=True"):
        found(*FUSED, loops=3, polls=True)


def test_it_says_where_the_warp_waits() -> None:
    lines = (f"{LOAD} > 0", f"{NEXT} 0 > 1", f"{PRODUCT} 1", "@P0 BRA 0x0")
    waits = ("0010 LDG.E R4, [R2.64]", "0020 HMMA.16816.F32.BF16 R8, R2, R4, R8")
    assert chain(ways_through(encoded(*lines, *END)), 1, False) == Chain(1, 2.0, 0, 0, waits)


def test_kernels_whose_source_states_the_chain() -> None:
    """Pointers followed 1 and 4 deep, compiled for three generations of NVIDIA's encoding."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "pointer_chase.py"), "sm_80", "sm_90", "sm_100"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["architecture"], one["depth"]) for one in lines} == {
        (name, depth) for name in ("sm_80", "sm_90", "sm_100") for depth in (1, 4)
    }
    for one in lines:
        assert (one["before"], one["turn"], one["after"]) == (one["depth"], 1, 1)
