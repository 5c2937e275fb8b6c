"""Changes that an interrupt may end at any line: KeyboardInterrupt, SystemExit, MemoryError."""

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from ..errors import RoutingBusyError
from ..routes import is_running


class Change:
    """A block that changes state. What it leaves unfinished is mended before anybody else looks.

    A `finally` cannot do that: an interrupt may come in it, or on the way to it. That a change has
    begun is noted before it begins, so that whoever comes next knows, in whatever process.
    """

    def __init__(self, mend: Callable[[], None]) -> None:
        self._mend = mend
        self._unfinished = False
        self._frame: FrameType | None = None  # of the block

    def recover(self) -> None:
        """Mend what an earlier change has left.

        Raises:
            RoutingBusyError: this is called inside of the change, say by a signal handler.
        """
        if not self._unfinished:
            return
        if self._frame is not None and is_running(self._frame):
            raise RoutingBusyError(
                "adapters are being changed right here, below this call, which a signal handler or "
                "a finaliser has made; let that only note what to do, and do it afterwards"
            )
        self._mend()
        self._unfinished, self._frame = False, None

    def __enter__(self) -> None:
        self._unfinished, self._frame = True, sys._getframe(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frame": None}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._mend()
        self._unfinished, self._frame = False, None


@dataclass(eq=False)
class Prepared:
    """An adapter that is in its place, but has no name yet. Without this object it goes again."""

    handle: int  # which nobody knows yet
    thread: threading.Thread = field(default_factory=threading.current_thread)


class Claims(weakref.WeakValueDictionary[int, Prepared]):
    """The adapters that are being prepared, by handle: nobody may free them."""

    def alive(self) -> set[int]:
        """Those whose thread runs: in a forked process, others' do not, and never let go."""
        return {one.handle for one in self.values() if one.thread.is_alive()}

    def __reduce__(self) -> tuple[type["Claims"], tuple[()]]:
        return Claims, ()  # a copy of the model prepares nothing

    def __deepcopy__(self, memo: object) -> "Claims":
        return Claims()


@dataclass(eq=False, frozen=True)
class Promise:
    """Adapters that somebody will ask for. While this object lives, nobody frees them."""

    handles: frozenset[int]


class Promises(weakref.WeakSet[Promise]):
    """The promises that are alive. A copy of the model has promised nothing to anybody."""

    @property
    def handles(self) -> set[int]:
        """The adapters that are promised."""
        return {handle for promise in self for handle in promise.handles}

    def __reduce__(self) -> tuple[type["Promises"], tuple[()]]:
        return Promises, ()

    def __deepcopy__(self, memo: object) -> "Promises":
        return Promises()
