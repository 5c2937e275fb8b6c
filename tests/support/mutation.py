"""A line of the package to break, and the tests that must notice it."""

import importlib.util
from typing import NamedTuple

from paths import ROOT


class Mutation(NamedTuple):
    """`old` becomes `new` in a file of the package, and one of the tests turns red."""

    file: str  # below lora_mux, where a wheel has the kernels too
    old: str
    new: str
    tests: tuple[str, ...]  # below tests


def all_mutations() -> dict[str, Mutation]:
    """What the files mutations.py of all rooms hold, by name."""
    found: dict[str, Mutation] = {}
    for file in sorted((ROOT / "tests").glob("*/mutations.py")):
        spec = importlib.util.spec_from_file_location(f"mutations_of_{file.parent.name}", file)
        assert spec and spec.loader
        room = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(room)
        assert not found.keys() & room.MUTATIONS.keys()
        found |= room.MUTATIONS
    return found
