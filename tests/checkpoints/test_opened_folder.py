"""Folders whose owner changes them between any two system calls of the reader."""

import errno
import json
import os
import pickle
import random
import socket
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_mux
from lora_mux.checkpoints import BaseModel, StoredAdapter, opened_folder
from lora_mux.checkpoints.peft_folder import read_peft_folder
from lora_mux.errors import CheckpointError
from tenants import CONFIG, WEIGHTS, Model, tenant

FILES = (CONFIG, WEIGHTS)
RANKS = {"first": 3, "second": 2}
NUMBERS = ("st_mode", "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
State = tuple[int, int]  # the version of the config, and that of the weights


class System:
    """The os module as the reader sees it: short reads, and something happens before a call."""

    def __init__(self, granularity: int = 1) -> None:
        self._granularity = granularity  # of times, in nanoseconds
        self.calls = 0
        self.acts: dict[int, Callable[[], None]] = {}  # before the call of this number
        self.bytes_of_a_read = 1 << 30
        self.opened: set[int] = set()  # the inodes of all that was

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, **how: Any) -> int:
        descriptor: int = self._watched(os.open)(path, flags, **how)
        self.opened.add(os.fstat(descriptor).st_ino)
        return descriptor

    def readlink(self, path: str, **how: Any) -> str:
        return self._watched(os.readlink)(path, **how)  # type: ignore[no-any-return]

    def fstat(self, descriptor: int) -> Any:
        return self._coarse(self._watched(os.fstat)(descriptor))

    def stat(self, path: str, **how: Any) -> Any:
        return self._coarse(self._watched(os.stat)(path, **how))

    def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read = self._watched(os.preadv)
        return read(descriptor, [buffers[0][: self.bytes_of_a_read]], offset)  # type: ignore[no-any-return]

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **how: Any) -> Any:
            self.calls += 1
            act = self.acts.pop(self.calls, None)
            if act is not None:
                act()
            return call(*arguments, **how)

        return watched

    def _coarse(self, status: os.stat_result) -> Any:
        numbers = {name: getattr(status, name) for name in NUMBERS}
        for name in NUMBERS[-2:]:
            numbers[name] -= numbers[name] % self._granularity
        return SimpleNamespace(**numbers)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    replaced = System()
    monkeypatch.setattr(opened_folder, "os", replaced)
    return replaced


class Owner:
    """A folder, what its hostile owner does to it, and the states that it has been in."""

    def __init__(self, root: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.folder, self._secret = root / "mine", root / "secret"
        self._versions: list[dict[str, bytes]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        for version, folder in enumerate((root / "0", root / "1", self._secret)):
            made = tenant(folder, RANKS, version)
            config = (folder / CONFIG).read_bytes()
            alpha = b'"lora_alpha": %d' % (4 + version)
            (folder / CONFIG).write_bytes(config.replace(b'"lora_alpha": 4', alpha))
            self._versions.append({name: (folder / name).read_bytes() for name in FILES})
            self.weights.append({path: part.A for path, part in made.parts.items()})
        self.secret = {(self._secret / name).stat().st_ino for name in FILES}
        self.states: set[State] = set()

    def restore(self) -> None:
        """The folder as it is at first: version 0."""
        where = self.folder.parent
        for old in (self.folder, where / "away"):
            if old.is_symlink():
                old.unlink()
            elif old.exists():
                self._clear(old)
                old.rmdir()
        self.folder.mkdir()
        for name in FILES:
            (self.folder / name).write_bytes(self._versions[0][name])
        self._now = {CONFIG: 0, WEIGHTS: 0}
        self.states = {(0, 0)}

    def _clear(self, folder: Path) -> None:
        for entry in folder.iterdir():
            entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _became(self, name: str, version: int) -> None:
        self._now[name] = version
        self.states.add((self._now[CONFIG], self._now[WEIGHTS]))

    def act(self) -> None:
        """One hostile act on one file, or two."""
        ways = [
            *(self.link, self.hard_link, self.pipe, self.truncate, self.grow, self.directory),
            *(self.rewrite, self.rewrite, self.replace, self.replace, self.replace_both),
            *(self.unlink, self.forbid, self.touch),
        ]
        name = self.draw.choice(FILES)
        try:
            self.draw.choice(ways)(self.folder / name)
        except OSError:
            pass  # an act before this one has left nothing to act on

    def _put(self, make: Callable[[Path], Any], file: Path) -> None:
        """Put something in the place of a file, at once."""
        new = file.with_suffix(".new")
        make(new)
        os.rename(new, file)

    def _writable(self, file: Path) -> Any:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise OSError("only a file of its own can be written to")
        return file.open("r+b")

    def link(self, file: Path) -> None:
        other = self._secret / file.name
        target = self.draw.choice([other, Path("..", "secret", file.name)])
        self._put(lambda new: new.symlink_to(target), file)

    def hard_link(self, file: Path) -> None:
        os.link(file, file.with_name(f"{file.name}.{self.draw.random()}"))

    def pipe(self, file: Path) -> None:
        self._put(os.mkfifo, file)

    def directory(self, file: Path) -> None:
        file.unlink()
        file.mkdir()

    def truncate(self, file: Path) -> None:
        with self._writable(file) as opened:
            opened.truncate(self.draw.randrange(1 + file.stat().st_size))

    def grow(self, file: Path) -> None:
        with self._writable(file) as opened:
            opened.seek(0, os.SEEK_END)
            opened.write(b" " * self.draw.randrange(1, 100))
        self._became(file.name, self._now[file.name])  # a config may end in spaces

    def rewrite(self, file: Path) -> None:
        """In place, whose size does not change."""
        version = 1 - self._now[file.name]
        with self._writable(file) as opened:
            opened.write(self._versions[version][file.name])
        self._became(file.name, version)

    def replace(self, file: Path) -> None:
        version = 1 - self._now[file.name]
        self._put(lambda new: new.write_bytes(self._versions[version][file.name]), file)
        self._became(file.name, version)

    def replace_both(self, file: Path) -> None:
        """Another version of the folder, at one moment as the reader sees it."""
        version = 1 - self._now[WEIGHTS]
        for name in FILES:
            content = self._versions[version][name]
            self._put(lambda new, content=content: new.write_bytes(content), self.folder / name)
            self._now[name] = version
        self.states.add((version, version))

    def unlink(self, file: Path) -> None:
        file.unlink()

    def forbid(self, file: Path) -> None:
        if not file.is_symlink():
            file.chmod(0)

    def touch(self, file: Path) -> None:
        """A time of last week on new content."""
        self.rewrite(file)
        os.utime(file, ns=(10**18, 10**18), follow_symlinks=False)

    def swap_folders(self) -> None:
        self.folder.rename(self.folder.with_name("away"))
        self.folder.symlink_to("secret")

    def state_of(self, stored: StoredAdapter) -> State:
        """The version of the config and that of the values that were read."""
        loaded = stored.weights(stored.read(False))
        alphas = {round(part.scaling * RANKS[path]) for path, part in loaded.items()}
        versions = {
            version
            for version, weights in enumerate(self.weights)
            if all(torch.equal(part.A, weights[path]) for path, part in loaded.items())
        }
        assert len(alphas) == 1, "two configs"
        assert len(versions) == 1, "no version of the weights"
        return alphas.pop() - 4, versions.pop()


def read_while_it_changes(
    owner: Owner, system: System, outcomes: Counter[str], act: Callable[[], None]
) -> None:
    """Read a folder, whose owner does something before one or two calls, and judge what comes."""
    owner.restore()
    system.bytes_of_a_read = owner.draw.choice([64, 500, 1 << 20])
    system.calls = 0
    last = owner.draw.choice([10, 25, 60])
    system.acts = {owner.draw.randrange(1, last): act for _ in range(owner.draw.choice([1, 1, 2]))}
    start, state, error = time.monotonic(), None, ""
    try:
        state = owner.state_of(read_peft_folder(owner.folder))
    except CheckpointError as caught:
        error = str(caught)
    assert time.monotonic() - start < 1
    assert system.opened.isdisjoint(owner.secret), "another tenant's file was opened"
    if state is None:
        assert str(owner.folder) in error
        outcomes["refused"] += 1
    else:
        assert state in owner.states
        outcomes[f"read {state}"] += 1


def resident_bytes() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    "folders", [1500, pytest.param(20_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_fuzz(folders: int, system: System, tmp_path: Path) -> None:
    """One state that the folder was in, or an error: never a mixture, never another tenant's."""
    owner = Owner(tmp_path, seed=folders)
    outcomes: Counter[str] = Counter()
    for _ in range(200):  # so that memory is as it will be
        read_while_it_changes(owner, system, outcomes, owner.act)
    descriptors, memory = len(os.listdir("/proc/self/fd")), resident_bytes()
    for _ in range(folders):
        read_while_it_changes(owner, system, outcomes, owner.act)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_bytes() - memory < 16 << 20
    assert outcomes["refused"] > folders // 3 and outcomes["read (0, 0)"] > folders // 20
    assert outcomes["read (1, 1)"] and outcomes["read (0, 1)"] and outcomes["read (1, 0)"]
    assert not any("2" in outcome for outcome in outcomes)


@pytest.mark.parametrize("granularity", [4_000_000, 1_000_000_000])
def test_clocks_that_stand_still(
    granularity: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file is rewritten in place while it is read, and no time of it changes."""
    monkeypatch.setattr(opened_folder, "os", system := System(granularity))
    owner = Owner(tmp_path, seed=granularity)
    outcomes: Counter[str] = Counter()
    for _ in range(500):
        name = owner.draw.choice(FILES)
        rewrite = owner.draw.choice([owner.rewrite, owner.touch])
        read_while_it_changes(
            owner, system, outcomes, lambda act=rewrite, name=name: act(owner.folder / name)
        )
    assert outcomes["refused"] > 100 and outcomes["read (0, 0)"] > 25


def test_an_old_file_is_read_once(system: System, tmp_path: Path) -> None:
    folder = tenant(tmp_path, RANKS, 0).folder
    calls = []
    for _ in range(2):
        system.calls = 0
        read_peft_folder(folder)
        calls.append(system.calls)
        if len(calls) == 1:
            time.sleep(opened_folder.COARSE / 1e9 + 0.1)
    assert calls[1] < calls[0]


class TestRegistered:
    """The values are read when they are needed. By then anything may be in the file's place."""

    @pytest.fixture
    def owner(self, tmp_path: Path) -> Owner:
        owner = Owner(tmp_path, 0)
        owner.restore()
        return owner

    @pytest.mark.parametrize(
        "way", "link pipe directory truncate grow rewrite replace touch unlink hard_link".split()
    )
    def test_another_file(self, way: str, owner: Owner) -> None:
        stored = read_peft_folder(owner.folder)
        assert owner.state_of(stored) == (0, 0)
        getattr(owner, way)(owner.folder / WEIGHTS)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=WEIGHTS):
            stored.read(False)
        assert time.monotonic() - start < 1

    def test_another_folder(self, owner: Owner) -> None:
        """A link to another tenant's folder, whose files have the same shapes and sizes."""
        stored = read_peft_folder(owner.folder)
        owner.swap_folders()
        with pytest.raises(CheckpointError, match="must be the file that was loaded"):
            stored.read(False)

    def test_another_working_directory(self, owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(owner.folder.parent)
        stored = read_peft_folder("mine")
        monkeypatch.chdir("/")
        assert owner.state_of(stored) == (0, 0)

    def test_one_shape_is_one_outline(self, owner: Owner) -> None:
        """Whatever the order in which PEFT writes its sets of modules."""
        first = read_peft_folder(owner.folder, BaseModel(["first"]))
        config = (owner.folder / CONFIG).read_bytes()
        mixed = config.replace(b'["first", "second"]', b'["second", "first"]')
        assert mixed != config
        owner.replace(owner.folder / WEIGHTS)
        (owner.folder / CONFIG).write_bytes(mixed)
        second = read_peft_folder(owner.folder, BaseModel(["first"]))
        assert first.outline is second.outline and owner.state_of(second) == (0, 1)
        assert second.outline.rank_rows == RANKS
        (owner.folder / CONFIG).write_bytes(config.replace(b": 4", b": 5", 1))
        assert read_peft_folder(owner.folder, BaseModel(["first"])).outline is not first.outline
        assert read_peft_folder(owner.folder, BaseModel(["second"])).outline is not first.outline

    def test_thousands(self, owner: Owner) -> None:
        """What each adds is its path and the numbers of its file: 0.7 KB."""
        kept = [read_peft_folder(owner.folder) for _ in range(100)]
        before = resident_bytes()
        kept += [read_peft_folder(owner.folder) for _ in range(3000)]
        assert (resident_bytes() - before) / 3000 < 4096
        assert len({id(stored.outline) for stored in kept}) == 1

    def test_metadata_is_not_kept(self, owner: Owner) -> None:
        content = (owner.folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        more = b'{"__metadata__": {"x": "' + b"v" * 8_000_000 + b'"}, ' + content[9:end]
        (owner.folder / WEIGHTS).write_bytes(len(more).to_bytes(8, "little") + more + content[end:])
        stored = read_peft_folder(owner.folder)
        assert owner.state_of(stored) == (0, 0)
        assert len(pickle.dumps(stored)) < 10_000

    def test_configs_are_not_kept(self, owner: Owner) -> None:
        config = json.loads((owner.folder / CONFIG).read_bytes())
        kept = []
        for i in range(24):
            if i == 4:
                before = resident_bytes()
            config["exclude_modules"] = [f"{i}.{j:09}" for j in range(60_000)]
            (owner.folder / CONFIG).write_text(json.dumps(config))
            kept.append(read_peft_folder(owner.folder))
        assert len({id(stored.outline) for stored in kept}) == 24
        assert resident_bytes() - before < 10 << 20

    def test_copies(self, owner: Owner) -> None:
        stored = pickle.loads(pickle.dumps(read_peft_folder(owner.folder)))
        assert owner.state_of(stored) == (0, 0)


def bad_folders(root: Path) -> Iterator[tuple[Any, str]]:
    """Paths that are no folders, and words of the error."""
    (root / "file").write_bytes(b"")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    yield root / "file", "must be an existing folder"
    yield root / "pipe", "must be an existing folder"
    yield root / "file" / "below", "must be an existing folder"
    yield root / "none", "must be an existing folder"
    yield root / "loop", "symbolic links"
    yield root / ("a" * 300), "name too long"
    yield "a/" * 5000, "name too long"
    yield f"{root}\0", "null byte"
    yield f"{root}\ud800", r"\\ud800"
    yield os.fsdecode(b"\xff"), r"must be an existing folder.*\\udcff"


def test_bad_folders(tmp_path: Path) -> None:
    mux = lora_mux.attach(Model())
    for folder, match in bad_folders(tmp_path):
        with pytest.raises(CheckpointError, match=f"(?i){match}") as caught:
            mux.load("a", folder)
        assert len(str(caught.value)) < 700
        str(caught.value).encode()
    with pytest.raises(lora_mux.errors.ArgumentTypeError, match="`folder` must be the path"):
        mux.load("a", os.fsencode(tmp_path))  # type: ignore[arg-type]


def listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    file = tenant(tmp_path, RANKS, 0).folder / name
    makers: list[Callable[[Path], Any]] = [
        os.mkfifo,
        os.mkdir,
        listen,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
    ]
    if os.geteuid() == 0:
        makers.append(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)))
    for make in makers:
        (file.rmdir if file.is_dir() else file.unlink)()
        make(file)
        with pytest.raises(CheckpointError, match=name):
            lora_mux.attach(Model()).load("a", tmp_path)


@pytest.mark.parametrize("call", ["open", "fstat", "stat", "preadv", "readlink"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_errors_of_the_system(
    call: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tenant(tmp_path, RANKS, 0).folder

    def fail(*arguments: Any, **how: Any) -> Any:
        raise OSError(number, os.strerror(number), "a path")

    monkeypatch.setattr(opened_folder, "os", broken := System())
    broken.__dict__[call] = fail
    mux = lora_mux.attach(Model())
    if call == "readlink":  # it says that there is no link
        mux.load("a", folder)
        return
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        mux.load("a", folder)


def test_where_links_cannot_be_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opened_folder, "SAFE", False)
    with pytest.raises(CheckpointError, match=r"give them to add_adapter\(\)"):
        lora_mux.attach(Model()).load("a", tenant(tmp_path, RANKS, 0).folder)
