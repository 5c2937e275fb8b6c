"""Tables of measured Configs, which take precedence over the choice of `lora_mux.kernels.config`.

A table is a file of JSON, made by `lora-mux tune` for one GPU:

    {"record": {"device": ..., "commit": ..., ...},
     "entries": [{"rows": 32, "in_features": 4096, "out_features": 4096, "rank": 16,
                  "selections": 1, "itemsize": 2, "config": {...}, "microseconds": {...}}, ...],
     "fused": [{..., "config": {...}, "microseconds": {"separate": ..., "fused": ...}}, ...]}

The package's own tables are read first, then the file that the environment variable LORA_MUX_TUNED
names, or ~/.cache/lora-mux/tuned.json. Later entries win. An entry serves layers of its own sizes,
with rows and ranks within a factor of two. The entries of "fused" also decide which layers become
one launch; a layer without an entry does not. An entry whose config has other fields than ours was
measured with other kernels, and is passed over.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import BackendError

if TYPE_CHECKING:
    from ..kernels.config import Config, FusedConfig, TileSizes

C = TypeVar("C")

SHIPPED = Path(__file__).parent / "tables"


class Case(NamedTuple):
    """What a Config is chosen for."""

    rows: int
    in_features: int
    out_features: int
    rank: int  # the largest that the pool may hold
    selections: int
    itemsize: int  # of the products: 2, or 4 for fp32


def user_table() -> Path:
    """Where `lora-mux tune` writes, and where the package looks last."""
    named = os.environ.get("LORA_MUX_TUNED")
    return Path(named) if named else Path.home() / ".cache" / "lora-mux" / "tuned.json"


class Tables(NamedTuple):
    """What the tables hold for one device."""

    entries: "tuple[tuple[Case, Config], ...]"  # of shrink and expand
    fused: "tuple[tuple[Case, FusedConfig | None], ...]"  # None = slower than separate launches


@lru_cache(maxsize=4096)
def find(device: str, case: Case, block_m: int) -> "Config | None":
    """The measured Config of the nearest entry, or None; tables are read once in a process.

    Raises:
        BackendError: a file that is not such a table; the error names it.
    """
    tables = _tables(device)
    return _nearest([e for e in tables.entries if e[1].block_m == block_m], case)


@lru_cache(maxsize=4096)
def fused(device: str, case: Case, block_m: int) -> "FusedConfig | None":
    """The measured FusedConfig of the nearest entry where fusing was faster, or None."""
    faster = [e for e in _tables(device).fused if e[1] is not None and e[1].block_m == block_m]
    return _nearest(faster, case)


@lru_cache(maxsize=4096)
def fuses(device: str, case: Case) -> bool:
    """Whether the nearest entry says that one launch is faster; False without an entry."""
    return _nearest(_tables(device).fused, case) is not None


def _nearest(entries: "Iterable[tuple[Case, C]]", case: Case) -> "C | None":
    """The value for the same layer whose rows and ranks are nearest, within a factor of two."""
    best, distance = None, 1.0
    for entry, value in entries:
        same = (entry.in_features, entry.out_features, entry.itemsize) == (
            case.in_features,
            case.out_features,
            case.itemsize,
        )
        wide, ours = entry.rank * entry.selections, case.rank * case.selections
        far = max(abs(log2(entry.rows / case.rows)), abs(log2(wide / ours)))
        if same and far <= distance:
            best, distance = value, far
    return best


@lru_cache(maxsize=8)
def _tables(device: str) -> Tables:
    found = Tables((), ())
    for path in [*sorted(SHIPPED.glob("*.json")), user_table()]:
        if path.is_file():
            read = _read(path, device)
            found = Tables(found.entries + read.entries, found.fused + read.fused)
    return found


def _read(path: Path, device: str) -> Tables:
    from ..kernels.config import Config, FusedConfig

    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["record"]["device"] != device:
            return Tables((), ())
        return Tables(
            tuple(
                (_case(entry), Config(**entry["config"]))
                for entry in _of_these_kernels(table["entries"], Config)
            ),
            tuple(
                (_case(entry), FusedConfig(**entry["config"]) if _faster(entry) else None)
                for entry in _of_these_kernels(table.get("fused", ()), FusedConfig)
            ),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BackendError(
            f"{path} must be a table that `lora-mux tune` wrote, got {type(error).__name__}: "
            f"{error}; delete it, or name another one in LORA_MUX_TUNED"
        ) from error


def _of_these_kernels(
    entries: "Iterable[dict[str, Any]]", kind: "type[TileSizes]"
) -> list[dict[str, Any]]:
    known = {field.name for field in fields(kind)}
    return [entry for entry in entries if entry["config"].keys() == known]


def _case(entry: dict[str, Any]) -> Case:
    return Case(*(int(entry[name]) for name in Case._fields))


def _faster(entry: dict[str, Any]) -> bool:
    times = entry["microseconds"]
    return float(times["fused"]) < float(times["separate"])


def write(
    path: Path,
    record: dict[str, Any],
    entries: "Sequence[tuple[Case, Config, Any]]",
    fused: "Sequence[tuple[Case, FusedConfig, Any]]" = (),
) -> None:
    """Write a table file, whole or not at all; other cases of the same device stay in it."""
    held = _held(path, record["device"])
    table: dict[str, Any] = {"record": record}
    for key, made in (("entries", entries), ("fused", fused)):
        cases = [case for case, *_ in made]
        table[key] = [entry for entry in held.get(key, ()) if _case(entry) not in cases]
        table[key] += [
            {**case._asdict(), "config": asdict(config), "microseconds": times}
            for case, config, times in made
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _held(path: Path, device: str) -> dict[str, Any]:
    """What a table file holds; nothing if it is missing or is for another device."""
    if not path.is_file():
        return {}
    _read(path, device)  # refuses what is no table
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held if held["record"]["device"] == device else {}
