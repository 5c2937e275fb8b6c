"""examples/serve_openai with its tiny model: PEFT's answers, and the server, here or elsewhere."""

import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paths import ROOT
from peft_oracle import peft, set_weights, transformers

EXAMPLES = ROOT / "examples"
PATIENCE = 60.0  # seconds; a machine may be busy
MEMORY = "290KiB"  # 32 rank rows; the adapters have 16, 8 and 16


def example(module: str) -> Any:
    """A module of the example, as `python examples/serve_openai` has it."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        return importlib.import_module(f"serve_openai.{module}")


class Tiny:
    """The demo's model and adapters in a folder, hardly trained, and what PEFT answers."""

    def __init__(self, folder: Path) -> None:
        demo = example("demo")
        self.base, self.adapters = folder / "base", folder / "adapters"
        self.names = list(demo.RANKS)
        first, *others = self.names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' and PEFT's own
            demo.make(folder, steps=12)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
            model = transformers.AutoModelForCausalLM.from_pretrained(self.base)
            self._peft = peft.PeftModel.from_pretrained(model, self.adapters / first, first)
            for name in others:
                self._peft.load_adapter(self.adapters / name, name)
        self.answer = functools.cache(self._answer)

    def folders(self, *names: str) -> list[str]:
        """Arguments of the server."""
        return [f"{name}={self.adapters / name}" for name in names]

    def _answer(self, row: str, text: str, tokens: int = 16, chat: bool = True) -> str:
        """PEFT's greedy answer by a mix such as "sql+0.4*french"; "" = the base model."""
        if chat:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        how = {"input_ids": ids, "max_new_tokens": tokens, "do_sample": False}
        terms = [term.rpartition("*") for term in row.split("+") if term]
        weights = {name: float(weight or 1) for weight, _, name in terms}
        with torch.no_grad():
            if weights:
                set_weights(self._peft, weights)
                made = self._peft.generate(**how)
            else:
                with self._peft.disable_adapter():
                    made = self._peft.generate(**how)
        return str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@contextmanager
def started(tiny: Tiny, **settings: Any) -> Iterator[Any]:
    """The model with all its adapters and an engine that runs, in this process."""
    folders = {name: tiny.adapters / name for name in tiny.names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        models = example("models").Models(str(tiny.base), folders, device="cpu", **settings)
    try:
        yield models
    finally:
        models.shutdown()


def application(models: Any, **settings: Any) -> Any:
    """To be `served`."""
    return example("app").build(models, **settings)


class Served:
    """A server that runs: its address, and the process."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self.log = process, log

    @functools.cached_property
    def url(self) -> str:
        """Where it listens, as soon as it does."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.log.read_text("utf-8"))
            if found:
                return found[1]
            assert self.process.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.05)
        raise AssertionError(self.log.read_text("utf-8"))

    def ends(self, by: signal.Signals) -> int:
        """Its exit code, after a signal."""
        self.process.send_signal(by)
        return self.process.wait(PATIENCE)


@contextmanager
def process(log: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`python examples/serve_openai ARGUMENTS` on a free port."""
    command = [sys.executable, str(EXAMPLES / "serve_openai"), *arguments]
    with log.open("wb") as file:
        started = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu"],
            stdout=file,
            stderr=file,
            env={**os.environ, **(env or {})},
        )
    try:
        yield Served(started, log)
    finally:
        started.kill()
        started.wait(PATIENCE)
