"""Ends an answer at the first of the texts that its request names in `stop`."""

import asyncio
from collections.abc import Sequence
from typing import Any


def before(stops: Sequence[str], text: str) -> str:
    """What stands before the first of them; all of a text that has none."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class UntilStop(asyncio.Queue[Any]):
    """The parts of an answer, as transformers' streamers put them, up to a stop.

    Only a plain str is looked through: thoughts are of another type. What may be the beginning of a
    stop is held back until the text goes on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self._stops, self._held = stops, ""
        self.stopped = False

    def put_nowait(self, item: Any) -> None:
        if self.stopped:
            return
        if type(item) is str:
            text = before(self._stops, self._held + item)
            self.stopped = len(text) < len(self._held + item)
            begun = 0 if self.stopped else self._begun(text)
            self._held = text[len(text) - begun :]
            text = text[: len(text) - begun]
        else:
            text, self._held = self._held, ""
        if text:
            super().put_nowait(text)
        if self.stopped:
            super().put_nowait(None)
        elif type(item) is not str:
            super().put_nowait(item)

    def _begun(self, text: str) -> int:
        """How many of the last characters are the beginning of a stop."""
        heads = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        return max((len(head) for head in heads if text.endswith(head)), default=0)
