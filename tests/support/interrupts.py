"""Interrupts at every line of the package, as a signal's KeyboardInterrupt may come."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import lora_mux

PACKAGE = str(Path(lora_mux.__file__).parent)
PATIENCE = 20.0  # seconds; who waits longer hangs


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def interrupted(act: Callable[[], Any], line: int) -> bool:
    """Run `act`, and raise Interrupt before the line that it comes to as number `line`.

    Only lines of the package count. False: it ended before, with fewer lines.
    """
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            if left == 0:
                left = -1  # once
                raise Interrupt
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return left < 0


class Elsewhere:
    """Another thread, in which nobody may be locked out."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, act: Callable[[], Any]) -> Any:
        """What the act returns there; an error if it hangs."""
        return self._thread.submit(act).result(PATIENCE)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an error in a thread, wherever that is."""
    import ctypes

    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )
