"""Thousands of broken and hostile checkpoint folders: errors of ours, and nothing changes."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
from paths import SUPPORT
from tenants import CONFIG, WEIGHTS, Model, attached, check, tenant

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**400, -(2**70), 0.5, 1e308),
    *(float("nan"), float("inf"), "", "0", "A" * 5000, "\x00", "../../etc/passwd", "F32", "(a+)+$"),
    *([], [[]], [0], [-1, 2], [2, -1], [2**40, 2**40], [1e9], ["a"], {}, {"a": {}}, {"": 1}),
    *("/dev/zero", "é" * 50, [None] * 100, {"first": 0}, {".*": 2**40}, {"(": 2}, [[[[[[]]]]]]),
]
NESTED = b"[" * 60_000 + b"]" * 60_000


class Fuzz:
    """Damage to a good folder, drawn at random."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        good = tenant(folder, {"first": 3, "second": 2}, 0).folder
        self.config, self.weights = (good / CONFIG).read_bytes(), (good / WEIGHTS).read_bytes()
        length = int.from_bytes(self.weights[:8], "little")
        self.header: dict[str, Any] = json.loads(self.weights[8 : 8 + length])
        self.values = self.weights[8 + length :]
        self.ways: list[Callable[[], tuple[bytes, bytes]]] = [
            self.truncated,
            self.flipped,
            self.flipped_in_the_header,
            self.flipped_in_the_config,
            self.other_header,
            self.other_header,
            self.other_config,
            self.other_config,
            self.garbage,
        ]

    def write(self) -> str:
        """Another broken folder; says which kind."""
        way = self.draw.choice(self.ways)
        config, weights = way()
        (self.folder / CONFIG).write_bytes(config)
        (self.folder / WEIGHTS).write_bytes(weights)
        return way.__name__

    def truncated(self) -> tuple[bytes, bytes]:
        if self.draw.random() < 0.3:
            return self.config[: self.draw.randrange(len(self.config))], self.weights
        return self.config, self.weights[: self.draw.randrange(len(self.weights))]

    def flipped(self, end: int | None = None) -> tuple[bytes, bytes]:
        broken = bytearray(self.weights)
        for _ in range(self.draw.choice([1, 1, 2, 8])):
            broken[self.draw.randrange(end or len(broken))] ^= 1 << self.draw.randrange(8)
        return self.config, bytes(broken)

    def flipped_in_the_header(self) -> tuple[bytes, bytes]:
        return self.flipped(len(self.weights) - len(self.values))

    def flipped_in_the_config(self) -> tuple[bytes, bytes]:
        broken = bytearray(self.config)
        for _ in range(self.draw.choice([1, 1, 2, 8])):
            broken[self.draw.randrange(len(broken))] ^= 1 << self.draw.randrange(8)
        return bytes(broken), self.weights

    def other_header(self) -> tuple[bytes, bytes]:
        header = json.loads(json.dumps(self.header))
        for _ in range(self.draw.choice([1, 1, 2, 4])):
            key = self.draw.choice(list(header))
            field = self.draw.choice(
                ["dtype", "shape", "data_offsets", "new", "key", "gone", "all"]
            )
            value = self.hostile()
            if field == "gone" and len(header) > 1:
                del header[key]
            elif field == "key":
                header[self.draw.choice([str(value), key + ".x", key.upper()])] = header.pop(key)
            elif field == "all" or not isinstance(header[key], dict):
                header[key] = value
            elif field in ("shape", "data_offsets") and self.draw.random() < 0.5:
                numbers = header[key].get(field)
                if isinstance(numbers, list) and numbers:
                    numbers[self.draw.randrange(len(numbers))] = value
            else:
                header[key][field] = value
        text = json.dumps(header).encode()
        if self.draw.random() < 0.02:
            text = b'{"a":' + NESTED + b"}"
        length = self.draw.choice([len(text)] * 8 + [0, 1 << 40, 2**64 - 1, len(text) + 7])
        return self.config, struct.pack("<Q", length) + text + self.values

    def other_config(self) -> tuple[bytes, bytes]:
        if self.draw.random() < 0.05:
            return self.draw.choice([NESTED, b"", b"null", b"3", b"\xff\xfe", b"{}"]), self.weights
        config = json.loads(self.config)
        names = [*config, "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "bias"]
        for _ in range(self.draw.choice([1, 1, 2, 4])):
            config[self.draw.choice([*names, "layers_pattern", "new", "use_dora"])] = self.hostile()
        return json.dumps(config).encode(), self.weights

    def garbage(self) -> tuple[bytes, bytes]:
        noise = self.draw.randbytes(self.draw.randrange(200))
        return (noise, self.weights) if self.draw.random() < 0.3 else (self.config, noise)

    def hostile(self) -> Any:
        return self.draw.choice(HOSTILE)


@pytest.mark.parametrize(
    ("bounded", "inputs"),
    [(True, 1500), (False, 1000), pytest.param(True, 20_000, marks=pytest.mark.slow)],
)
def test_fuzz(tmp_path: Path, bounded: bool, inputs: int) -> None:
    there = tenant(tmp_path / "there", {"first": 2, "second": 2}, 1)
    if bounded:
        model, mux = attached(12)
    else:
        mux = lora_mux.attach(model := Model())
    mux.load("there", there.folder)
    mux.prefetch(["there"])
    mux.set_adapter("there")
    pools = [model.first.mux_pool, model.second.mux_pool]
    fuzz = Fuzz(tmp_path / "fuzzed", seed=7)

    def state() -> list[Any]:
        return [mux.adapters, mux.active_adapters, *(dict(pool.spans) for pool in pools)]

    before, buffers = state(), [b.clone() for pool in pools for b in pool.buffers()]
    outcomes: Counter[tuple[str, str]] = Counter()
    for _ in range(inputs):
        kind = fuzz.write()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                mux.load("fuzzed", fuzz.folder)
        except lora_mux.LoraMuxError as error:
            outcomes[kind, type(error).__name__] += 1
        else:  # the damage was none, or is in the values, which a bounded pool reads now
            try:
                mux.prefetch(["fuzzed"])
                outcomes[kind, "loaded"] += 1
            except lora_mux.LoraMuxError as error:
                outcomes[kind, type(error).__name__] += 1
            mux.remove("fuzzed")
        assert state() == before
    check(model, torch.linspace(-1, 1, 24).reshape(2, 12), [[(there, 1.0)]] * 2)
    if bounded:  # unbounded pools may have grown
        after = [b for pool in pools for b in pool.buffers()]
        assert all(torch.equal(was, now) for was, now in zip(buffers[:2], after[:2], strict=True))
    kinds = {kind for kind, _ in outcomes}
    assert kinds == {way.__name__ for way in fuzz.ways}
    assert any(outcome == "loaded" for _, outcome in outcomes)
    assert sum(n for (_, outcome), n in outcomes.items() if outcome != "loaded") > inputs // 2


def test_killed_while_loading(tmp_path: Path) -> None:
    """Loading writes nothing to disk: whoever comes next finds folders as they were."""
    folders = {}
    for i in range(20):
        folders[f"t{i}"] = tenant(tmp_path / f"t{i}", {"first": 3, "second": 2}, i)
    script = f"""
        import lora_mux, sys
        sys.path.insert(0, {str(SUPPORT)!r})
        from tenants import attached
        print("ready", flush=True)
        while True:
            model, mux = attached(40)
            for i in range(20):
                mux.load(f"t{{i}}", f"{tmp_path}/t{{i}}")
                mux.prefetch([f"t{{i}}"])
    """
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    draw = random.Random(3)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0.02, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert after == before
    model, mux = attached(40)
    mux.load_many({name: who.folder for name, who in folders.items()})
    assert list(mux.adapters) == list(folders)
    x = torch.linspace(-1, 1, 24).reshape(2, 12)
    for name, who in folders.items():
        with mux.route([name, None]):
            check(model, x, [[(who, 1.0)], []])
