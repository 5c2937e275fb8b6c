"""A stranger's folder: found here or on the hub, and read although its owner may change it.

The folder is opened first, and its files relative to it: without following links, and without
waiting for the other end of a pipe. Type and size are those of the open file. It is read and never
mapped, because truncating a mapped file ends the process that reads it. In the end every file must
still be the one under its name, and unchanged. What follows works on the bytes alone.
"""

import importlib
import importlib.util
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import ArgumentTypeError, CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name

# Not on Windows.
SAFE = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW") and hasattr(os, "preadv")
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK if SAFE else 0
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK if SAFE else 0
# The hub's cache links snapshots/<commit>/<file> to the content, which is named by its hash. A file
# in a subfolder is further down.
HUB_LINK = re.compile(r"((?:\.\./){2,9})blobs/([^/]+)")
# Nanoseconds. The clock that stamps files may stand still for 10 ms, on FAT for 2 s. A write in
# that time leaves no trace beside the one before it, so that newer files are read twice.
COARSE = 2_000_000_000
CHUNK = 1 << 18  # bytes that are compared at a time


class FileState(NamedTuple):
    """The numbers by which a file that was changed or replaced is noticed."""

    device: int
    inode: int
    bytes: int
    modified: int  # in nanoseconds; whoever owns the file can set it
    changed: int  # likewise; only the system sets it


class OpenedFile:
    """A regular file, open for reading."""

    def __init__(self, path: str, descriptor: int, directory: int, name: str) -> None:
        """Look at an open file.

        Args:
            path: what error messages call it.
            directory: the descriptor of the directory that it is in, under `name`.

        Raises:
            CheckpointError: it is no regular file.
        """
        self.path = path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                f"{path} must be a regular file, got {stat.filemode(status.st_mode)!r}"
            )
        self.state = _state(status)
        self._descriptor, self._directory, self._name = descriptor, directory, name
        self._is_new = time.time_ns() - self.state.changed < COARSE
        self._read: list[tuple[int, memoryview]] = []  # what was read: from where, and the bytes

    def read(self, start: int, size: int) -> bytes:
        """That many bytes of the file."""
        content = bytearray(size)
        self.read_into(start, memoryview(content))
        return bytes(content)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            CheckpointError: there are fewer, or they cannot be read.
        """
        with _as_checkpoint_error(self.path):
            self._fill(start, target)
        self._read.append((start, target))

    def check_unchanged(self) -> None:
        """Check that what was read is one version of the file that is still under this name.

        Raises:
            CheckpointError: it has changed, or another is in its place.
        """
        with _as_checkpoint_error(self.path):
            for start, target in self._read if self._is_new else []:
                for i in range(0, len(target), CHUNK):
                    part = target[i : i + CHUNK]
                    # Not a memoryview, which compares bytes one by one: 2 ns each.
                    again = bytearray(len(part))
                    self._fill(start + i, memoryview(again))
                    if again != part:
                        raise self._changed()
            status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        if _state(status) != self.state:
            raise self._changed()

    def _fill(self, start: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(self._descriptor, [target[done:]], start + done)
            if not got:
                raise self._changed()
            done += got

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} must stay as it is while it is read, got one that has changed; load it "
            "again, and replace files by renaming new ones"
        )


class OpenedFolder:
    """A folder that is open for reading; see `open_folder`."""

    def __init__(self, path: str, descriptor: int, stack: ExitStack) -> None:
        # As repr has it, but without the quotes: no line breaks, no halves of characters.
        self.path = repr(path)[1:-1]
        self.absolute = os.path.join(os.getcwd(), path)
        self._descriptor = descriptor
        self._stack = stack  # which closes what is opened
        self._files: list[OpenedFile] = []

    def holds(self, name: str) -> bool:
        """Whether something has this name, if only a link."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def open(self, name: str) -> OpenedFile:
        """Open a file of the folder.

        Raises:
            CheckpointError: it is missing, a link, no regular file, or not readable.
        """
        path = f"{self.path}/{name}"
        with _as_checkpoint_error(path):
            directory, there = self._find(name, path)
            try:  # in one statement, so that an interrupt leaves nothing open
                self._stack.callback(os.close, descriptor := os.open(there, FILE, dir_fd=directory))
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.path} must hold {name}, got a folder without it"
                ) from None
            file = OpenedFile(path, descriptor, directory, there)
        self._files.append(file)
        return file

    def check_unchanged(self) -> None:
        """Check that all files were open and unchanged at the same time."""
        for file in self._files:
            file.check_unchanged()

    def _find(self, name: str, path: str) -> tuple[int, str]:
        """The open directory and the name in it that a file is to be opened by."""
        try:
            target = os.readlink(name, dir_fd=self._descriptor)
        except OSError:  # no link; or nothing, as opening it will show
            return self._descriptor, name
        blob = HUB_LINK.fullmatch(target)
        if blob is None or not self._is_snapshot(blob[1]):
            raise CheckpointError(
                f"{path} must be a file of its folder, got a link to {target!r:.100}; copy the "
                "file there"
            )
        flags = FOLDER | os.O_NOFOLLOW
        self._stack.callback(
            os.close, blobs := os.open(f"{blob[1]}blobs", flags, dir_fd=self._descriptor)
        )
        return blobs, blob[2]

    def _is_snapshot(self, up: str) -> bool:
        """Whether the folder is in a commit in the hub's cache, which lies in one named snapshots.

        Args:
            up: the way from the folder to the one that holds snapshots and blobs.
        """
        try:
            above = os.stat(up.removesuffix("../"), dir_fd=self._descriptor)
            named = os.stat(f"{up}snapshots", dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(above, named)


def local_folder(
    folder: str | PathLike[str], revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The local folder of a checkpoint, downloaded first if it is on the hub.

    Args:
        folder: a path, or user/name of a repository. Only its config and its safetensors are
            downloaded, into the hub's cache.
        revision: a branch, a tag or a commit of the repository.
        subfolder: where the checkpoint is in it.

    Raises:
        ArgumentTypeError: folder is not a path.
        CheckpointError: the repository or its revision cannot be had, or subfolder leads out of it.
    """
    if not isinstance(folder, str | PathLike) or isinstance(os.fspath(folder), bytes):
        raise ArgumentTypeError(
            f"`folder` must be the path of a PEFT checkpoint or a repository of the hub, "
            f"got {type(folder).__name__}"
        )
    path, below = Path(folder), PurePosixPath(subfolder or "")
    if below.is_absolute() or ".." in below.parts:
        raise CheckpointError(
            f"`subfolder` must be a path inside the folder, got {subfolder!r:.200}"
        )
    is_repository = isinstance(folder, str) and REPOSITORY.fullmatch(folder)
    # If there is a folder adapters, then adapters/sql is a misspelt path, and no server hears of
    # it.
    if not is_repository or os.path.exists(path.parent):
        if revision is not None:
            raise CheckpointError(f"`revision` must be None for a local folder, got {revision!r}")
        return path / below
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"`folder` must be an existing folder, got {folder!r:.200}; to load it from the hub: "
            "pip install 'lora-mux[hub]'"
        )
    hub: Any = importlib.import_module("huggingface_hub")
    files = [str(below / name) for name in (CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE)]
    try:
        downloaded: str = hub.snapshot_download(folder, revision=revision, allow_patterns=files)
    except Exception as error:  # of the hub's library, and of whatever it sends requests with
        raise CheckpointError(
            f"`folder` must be an existing folder or a repository of the hub, got {folder!r:.200}: "
            f"{str(error)[:300]}"
        ) from error
    return Path(downloaded) / below


@contextmanager
def open_folder(path: str) -> Iterator[OpenedFolder]:
    """A block that reads files of a folder, after which they are checked against change.

    The folder itself may be given by a link: that is the caller's word, not the stranger's.

    Raises:
        CheckpointError: there is no such folder, or a file of it has changed during the block.
    """
    if not SAFE:
        raise CheckpointError(
            "`folder` can be read only where files can be opened without following links (Linux, "
            "macOS); read the tensors yourself, and give them to add_adapter()"
        )
    with ExitStack() as stack:
        try:
            stack.callback(os.close, descriptor := os.open(path, FOLDER))
            folder = OpenedFolder(path, descriptor, stack)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(
                f"`folder` must be an existing folder, got {path!r:.200}"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"`folder` must be readable, got {path!r:.200} ({_reason(error)})"
            ) from None
        yield folder
        folder.check_unchanged()


@contextmanager
def _as_checkpoint_error(path: str) -> Iterator[None]:
    """Errors of the system name the file, as ours do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} must be readable, got {_reason(error)}") from None


def _state(status: os.stat_result) -> FileState:
    return FileState(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
