"""Tables of measured Configs, which go before the reasoned choice of `lora_mux.kernels.config`.

A table is a file of JSON, made by `lora-mux tune` for one GPU:

    {"record": {"device": ..., "commit": ..., ...},
     "entries": [{"rows": 32, "in_features": 4096, "out_features": 4096, "rank": 16,
                  "selections": 1, "itemsize": 2, "config": {...}, "microseconds": {...}}, ...]}

Looked for in the package (tables that it ships) and then in the file that the environment variable
LORA_MUX_TUNED names, else ~/.cache/lora-mux/tuned.json; later ones win. An entry serves its own
sizes, and rows and ranks within a factor of two.
"""

import json
import os
from dataclasses import asdict
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .errors import BackendError

if TYPE_CHECKING:
    from .kernels.config import Config

SHIPPED = Path(__file__).parent / "tables"


class Case(NamedTuple):
    """What a Config is chosen for."""

    rows: int
    in_features: int
    out_features: int
    rank: int  # the largest that the pool may hold
    selections: int
    itemsize: int  # of the products: 2, or 4 for fp32


# A case, what is best for it, and the microseconds that were measured.
Entry: TypeAlias = "tuple[Case, Config, Any]"


def user_table() -> Path:
    """Where `lora-mux tune` writes, and where the package looks last."""
    named = os.environ.get("LORA_MUX_TUNED")
    return Path(named) if named else Path.home() / ".cache" / "lora-mux" / "tuned.json"


@lru_cache(maxsize=4096)
def find(device: str, case: Case, block_m: int) -> "Config | None":
    """The measured Config of the nearest entry, or None; tables are read once in a process.

    Raises:
        BackendError: a table that is no such JSON; it names the file.
    """
    best, distance = None, 1.0
    for entry, config in _entries(device):
        same = (entry.in_features, entry.out_features, entry.itemsize) == (
            case.in_features,
            case.out_features,
            case.itemsize,
        )
        if not same or config.block_m != block_m:
            continue
        wide, ours = entry.rank * entry.selections, case.rank * case.selections
        far = max(abs(log2(entry.rows / case.rows)), abs(log2(wide / ours)))
        if far <= distance:
            best, distance = config, far
    return best


@lru_cache(maxsize=8)
def _entries(device: str) -> tuple[tuple[Case, "Config"], ...]:
    found: list[tuple[Case, Config]] = []
    for path in [*sorted(SHIPPED.glob("*.json")), user_table()]:
        if path.is_file():
            found += [(case, config) for case, config, _ in _read(path, device)]
    return tuple(found)


def _read(path: Path, device: str) -> list[Entry]:
    from .kernels.config import Config

    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["record"]["device"] != device:
            return []
        return [
            (
                Case(*(int(entry[name]) for name in Case._fields)),
                Config(**entry["config"]),
                entry["microseconds"],
            )
            for entry in table["entries"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BackendError(
            f"{path} must be a table that `lora-mux tune` wrote, got {type(error).__name__}: "
            f"{error}; delete it, or name another one in LORA_MUX_TUNED"
        ) from error


def write(path: Path, record: dict[str, Any], entries: list[Entry]) -> None:
    """A table file, whole or not at all; other cases of the same device that it held stay."""
    cases = [case for case, *_ in entries]
    old = _read(path, record["device"]) if path.is_file() else []
    made = [
        {**case._asdict(), "config": asdict(config), "microseconds": times}
        for case, config, times in [*(entry for entry in old if entry[0] not in cases), *entries]
    ]
    table = {"record": record, "entries": made}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
