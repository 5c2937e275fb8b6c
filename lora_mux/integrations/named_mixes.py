"""Mixes by name: a PEFT folder for "sql+0.4*french", made at its first use and kept.

Names come from strangers, so that what they can cost is bounded: adapters, decimals and magnitudes
of a mix, and the numbers of names and folders. Folders stay until the end, because an engine reads
one again whenever its adapter was evicted, and may fail as a whole if it is gone.
"""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from functools import cached_property
from os import PathLike
from pathlib import Path

from .. import __version__, compose, parse_row
from ..errors import CheckpointError, RoutingError, short

FILES = "adapter_config.json", "adapter_model.safetensors"
MAX_MIXES = 100  # in fp32 such a mix of rank 32 takes 336 MB on all linear layers of an 8B model
MAX_ADAPTERS = 16  # of a mix: of rank 32 they fill 512, the largest rank that vLLM takes
# Two decimals make no endless supply of weights. Larger weights overflow fp16, and NaN in an
# engine's cache may outlive its request.
DECIMALS, MAX_WEIGHT = 2, 10.0

State = list[tuple[int, ...] | None]


class NamedMixes:
    """The mixes of the adapters in a folder. Not for several threads at once."""

    def __init__(
        self,
        adapters: str | PathLike[str],
        cache: str | PathLike[str] | None = None,
        most: int = MAX_MIXES,
    ) -> None:
        """Remember the folders; nothing is made yet.

        Args:
            adapters: a folder whose subfolders are adapters, as PEFT saves them.
            cache: where mixes are made and found again. Servers may share it. None = a folder that
                is made at the first use, and removed at exit.
            most: the number of names that are answered, and of mixes in the cache.

        Raises:
            CheckpointError: `adapters` is no folder.
        """
        self.adapters, self.most = Path(adapters), most
        if not self.adapters.is_dir():
            raise CheckpointError(
                f"`adapters` must be an existing folder, got {short(str(adapters))}"
            )
        self._cache = cache
        self._names: set[str] = set()

    @cached_property
    def cache(self) -> Path:
        """The folder of the mixes, which is there from now on."""
        if self._cache is not None:
            made = Path(self._cache)
            made.mkdir(parents=True, exist_ok=True)
            return made.resolve()
        made = Path(tempfile.mkdtemp(prefix="lora_mux-"))
        weakref.finalize(self, _remove, made, os.getpid())
        return made

    def folder(self, name: str, base_model: str | None = None) -> Path | None:
        """The folder of a mix, made if need be; None if not all of its adapters are there.

        If an adapter has changed since, then it is another folder.

        Args:
            name: what `parse_row` reads.
            base_model: the name of the base, for the config.

        Raises:
            RoutingError: a mix that is not made for strangers, or one too many.
            AdapterError, CheckpointError: as `compose`; or an adapter has changed meanwhile.
        """
        row = self._row(name)
        if row is None:
            return None
        if name not in self._names and len(self._names) >= self.most:
            raise self._full(f"the names of {self.most} mixes so far")
        state = self._state(row)
        what = [__version__, base_model, sorted(row.items()), state]
        place = self.cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        if not place.is_dir():
            self._make(row, state, place, base_model)
        self._names.add(name)
        return place

    def _row(self, name: str) -> dict[str, float] | None:
        """The mix of a name: None if it is not ours, an error if it is not allowed."""
        try:
            row = parse_row(name)
        except RoutingError:
            return None
        if not row or not all(self._holds(adapter) for adapter in row):
            return None
        if len(row) > MAX_ADAPTERS:
            raise RoutingError(f"`model` must name at most {MAX_ADAPTERS} adapters, got {len(row)}")
        for adapter, weight in row.items():
            if round(weight, DECIMALS) != weight or abs(weight) > MAX_WEIGHT:
                raise RoutingError(
                    f"`model` must have weights of at most {DECIMALS} decimals, from "
                    f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight!r} for {short(adapter)}"
                )
        return row

    def _holds(self, adapter: str) -> bool:
        """Whether it is a subfolder with an adapter, and no link to elsewhere."""
        folder = self.adapters / adapter
        inside = os.path.dirname(os.path.realpath(folder)) == os.path.realpath(self.adapters)
        return inside and os.path.isfile(folder / FILES[0])

    def _state(self, row: dict[str, float]) -> State:
        """By what a change of an adapter's files is noticed."""
        return [_file_state(self.adapters / name / file) for name in sorted(row) for file in FILES]

    def _make(
        self, row: dict[str, float], state: State, place: Path, base_model: str | None
    ) -> None:
        """Make the folder of a mix: whole, of one state of its adapters, or not at all."""
        there = sum(not entry.startswith(".") for entry in os.listdir(self.cache))
        if there >= self.most:
            raise self._full(f"{there} mixes in the cache")
        folders = {name: self.adapters / name for name in row}
        with tempfile.TemporaryDirectory(prefix=".making-", dir=self.cache) as spare:
            made = compose(folders, row, Path(spare, "mix"), base_model=base_model)
            if self._state(row) != state:
                raise CheckpointError(
                    f"the adapters {short(sorted(row))} must stay as they are while they are "
                    "composed, got some that have changed; ask again"
                )
            try:
                made.rename(place)
            except OSError:
                if not place.is_dir():  # else another server was first
                    raise

    def _full(self, got: str) -> RoutingError:
        return RoutingError(
            f"`model` must be one of at most {self.most} mixes, got one more than {got}; whoever "
            "runs the server may set LORA_MUX_MIXES, or empty the cache while no server uses it"
        )


def _file_state(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:  # compose() will say what is wrong with it
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remove(folder: Path, owner: int) -> None:
    """Remove a folder of this process, and not one that a fork has inherited."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
