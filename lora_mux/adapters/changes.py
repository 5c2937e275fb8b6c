"""Changes that an interrupt may end at any line: KeyboardInterrupt, SystemExit, MemoryError."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType


class Change:
    """A block that changes state. What it leaves unfinished is mended before anybody else looks.

    A `finally` cannot do that: an interrupt may come in it, or on the way to it. That a change has
    begun is noted before it begins, so that whoever comes next knows, in whatever process.
    """

    def __init__(self, mend: Callable[[], None]) -> None:
        self._mend = mend
        self._unfinished = False

    def recover(self) -> None:
        """Mend what an earlier change has left."""
        if self._unfinished:
            self._mend()
            self._unfinished = False

    def __enter__(self) -> None:
        self._unfinished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._mend()
        self._unfinished = False


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
