"""Ten minutes of continuous batching under everything that users do meanwhile (--slow).

Requests arrive at random, and are cancelled at random; adapters are removed, loaded again with
other values, replaced, pinned and prefetched by other threads; the memory holds two of five. Every
finished answer is that of the request alone, by PEFT; nobody waits for ever; memory stays flat.
"""

import copy
import gc
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous import batching

import lora_mux
from lora_mux.errors import AdapterError, PoolCapacityError, UnknownAdapterError
from peft_oracle import configs, llama, save_adapters, set_weights, transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning"),
]

SECONDS, NEW, MOST = 600.0, 5, 40
NAMES = ("plain", "rslora", "biased", "patterns", "rank1")
PROMPTS = [[5, 17, 99, 4], list(range(40, 70))]
MEMORY_GROWTH = 24 << 20  # bytes, after the first minute

Key = tuple[int, tuple[tuple[str, int, float], ...]]  # prompt; name, version and weight of each


class Soak:
    def __init__(self, base: Any, folders: list[Path]) -> None:
        self.random = random.Random(7)
        self.mux = lora_mux.attach(copy.deepcopy(base), memory="96KiB")
        self.folders = folders
        self.lock = threading.Lock()  # of the next one: names change with what they mean
        self.versions: dict[str, int] = {}
        self.asked: dict[str, Key] = {}
        self.cancelled: set[str] = set()
        self.answers: dict[str, list[int]] = {}
        self.refused = 0
        self.failures: list[str] = []
        self.over = threading.Event()
        for name in NAMES:
            self.load(name)

    def load(self, name: str) -> None:
        version = self.random.randrange(len(self.folders))
        self.mux.load(name, self.folders[version] / name, replace=name in self.versions)
        self.versions[name] = version

    def row(self) -> dict[str, float]:
        names = self.random.sample(NAMES, self.random.choice([0, 1, 1, 2]))
        return {name: 1.0 - 1.5 * i for i, name in enumerate(sorted(names))}

    def add(self, manager: Any) -> None:
        row, prompt = self.row(), self.random.randrange(len(PROMPTS))
        with self.lock:
            try:
                name = manager.add_request(
                    PROMPTS[prompt], adapter_names=row or "__base__", streaming=False
                )
            except (UnknownAdapterError, PoolCapacityError):
                self.refused += 1
                return
            used = tuple((n, self.versions[n], w) for n, w in sorted(row.items()))
            self.asked[name] = prompt, used
        if self.random.random() < 0.15:
            self.cancelled.add(name)
            manager.cancel_request(name)

    def change(self) -> None:
        """What one of the other threads does, over and over."""
        mux = self.mux
        while not self.over.wait(self.random.random() * 0.05):
            name, what = self.random.choice(NAMES), self.random.random()
            try:
                if what < 0.4:
                    with self.lock:
                        if name in self.versions and what < 0.2:
                            mux.remove(name)
                            del self.versions[name]
                        else:
                            self.load(name)
                elif what < 0.6:
                    mux.prefetch([name])
                elif what < 0.8:
                    mux.pin(name)
                    time.sleep(0.02)
                    mux.unpin(name)
                else:
                    with mux.route([name]), torch.no_grad():
                        mux.model(torch.tensor([[5]]))
            except (UnknownAdapterError, PoolCapacityError, AdapterError):
                pass
            except BaseException as error:
                self.failures.append(repr(error))
                raise

    def collect(self, manager: Any) -> None:
        while (result := manager.get_result(timeout=0.001)) is not None:
            if result.error is not None:
                self.failures.append(result.error)
            self.answers[result.request_id] = result.generated_tokens

    @property
    def waiting(self) -> set[str]:
        return self.asked.keys() - self.answers.keys() - self.cancelled


def in_use() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's size in /proc")
def test_soak(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    folders, theirs = [tmp_path / "0", tmp_path / "1"], []
    for version, folder in enumerate(folders):
        torch.manual_seed(version)
        wanted = {name: configs("llama")[name] for name in NAMES}
        peft = save_adapters(base, wanted, folder)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name and version:
                    parameter.neg_()
        peft.save_pretrained(folder)
        theirs.append(peft)
    soak = Soak(base, folders)
    generation = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
    )
    threads = [threading.Thread(target=soak.change) for _ in range(2)]
    sizes = []
    with soak.mux.model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching()
    ) as manager:
        for thread in threads:
            thread.start()
        try:
            start = time.monotonic()
            while (now := time.monotonic() - start) < SECONDS and not soak.failures:
                if len(soak.waiting) < MOST:
                    soak.add(manager)
                else:
                    time.sleep(0.002)
                soak.collect(manager)
                if now > (len(sizes) + 1) * SECONDS / 10:
                    sizes.append(in_use())
        finally:
            soak.over.set()
            for thread in threads:
                thread.join()
        end = time.monotonic() + 60
        while soak.waiting and time.monotonic() < end and not soak.failures:
            soak.collect(manager)
        assert not soak.failures, soak.failures[0]
        assert not soak.waiting and len(soak.answers) > SECONDS
        while len(manager.mux_requests) and time.monotonic() < end:
            time.sleep(0.05)
        assert not len(manager.mux_requests)
    assert sizes[-1] - sizes[0] < MEMORY_GROWTH, sizes
    soak.mux.memory()
    assert soak.mux._slots.tenants == {*soak.mux.adapters.values()}
    assert not soak.mux._adapters.has_promises and not soak.mux.memory().replaced
    check(soak, base, theirs)
    print(f"{len(soak.answers)} answers, {soak.refused} refused, {len(soak.cancelled)} cancelled")


def check(soak: Soak, base: Any, theirs: list[Any]) -> None:
    """Every answer is that of the request alone. Adapters of both versions add up in one model."""
    for name, answer in soak.answers.items():
        if name not in soak.cancelled:
            assert answer == alone(soak.asked[name], base, theirs), soak.asked[name]


_KNOWN: dict[Key, list[int]] = {}


def alone(key: Key, base: Any, theirs: list[Any]) -> list[int]:
    if key not in _KNOWN:
        prompt, used = key
        model, ids = base, torch.tensor([PROMPTS[prompt]])
        versions = {version for _, version, _ in used}
        if len(versions) == 1:
            model = theirs[versions.pop()]
            set_weights(model, {name: weight for name, _, weight in used})
        elif versions:  # the second is the first with another sign
            model = theirs[0]
            signed = {name: weight * (1 - 2 * version) for name, version, weight in used}
            set_weights(model, signed)
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        _KNOWN[key] = out[0, len(PROMPTS[prompt]) :].tolist()
    return _KNOWN[key]
