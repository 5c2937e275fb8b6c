"""The progress bar: on a terminal, for several steps, where rich is there."""

import io
import sys
from contextlib import redirect_stderr

import pytest

from lora_mux.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(steps: list[int], stderr: io.StringIO) -> str:
    """What is written there while the steps are taken, each of them once and in order."""
    with redirect_stderr(stderr):
        assert list(progress_bar(steps, "adapters")) == steps
    return stderr.getvalue()


def test_on_a_terminal_several_steps_have_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # rich draws nothing on a dumb one
    assert "adapters" in drawn([3, 1, 2], Terminal())
    assert drawn([3], Terminal()) == drawn([3, 1, 2], io.StringIO()) == ""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert drawn([3, 1, 2], Terminal()) == ""
