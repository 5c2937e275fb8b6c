"""A real server with many clients at once: each stream is that of its request alone."""

import asyncio
import gc
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

import lora_mux
from peft_oracle import llama
from server import GREEDY, PATIENCE, entry_of, lines, make_app, served

NAMES = [f"a{i}" for i in range(8)]
# Adapters, mixes of them, and the base model.
ENTRIES = [*NAMES, "a0+a1", "a2+a5+a7", "a6+a3", ""]
PATHS = [
    *("async_generator", "sync_generator", "rows_with_the_call", "generate_with_rows"),
    *("block_around_awaits", "block_of_a_dependency", "streamer", "async_streamer", "no_rows"),
]
# Those of whose requests all passes have the adapters that there were when it began.
STEADY = [path for path in PATHS if path not in ("rows_with_the_call", "no_rows")]
SCALING = 0.5
PROMPT = torch.tensor([[5, 17, 99, 201]])


def weights(mux: lora_mux.Mux, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in mux.targets:
        layer = mux.model.get_submodule(path)
        A = torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5
        made[path] = A, torch.randn(layer.out_features, 2, generator=generator)
    return made


def alone(model: Any, mux: lora_mux.Mux, entry: str) -> str:
    """The answer of a request that nothing else runs beside."""
    mux.set_adapter(entry_of(entry))
    ids = model.generate(PROMPT, **GREEDY)
    mux.set_adapter(None)
    mux._router.sticky.is_chosen = False  # as if nobody ever had
    return lines(ids, PROMPT.shape[1])


@pytest.fixture(scope="module")
def stage() -> Iterator[SimpleNamespace]:
    torch.manual_seed(0)
    model = llama()
    mux = lora_mux.attach(model)
    for i, name in enumerate(NAMES):
        mux.add_adapter(name, weights(mux, i), scaling=SCALING)
    want = {entry: alone(model, mux, entry) for entry in ENTRIES}
    assert len(set(want.values())) == len(ENTRIES)  # each answer tells whose it is
    with served(make_app(model, mux, PROMPT)) as url:
        yield SimpleNamespace(model=model, mux=mux, want=want, url=url)


async def request(client: httpx.AsyncClient, path: str, entry: str, lines_read: int | None) -> str:
    """The text of a stream; a client that reads only some lines hangs up then."""
    text, read = "", 0
    async with client.stream("GET", f"/{path}", params={"entry": entry}) as response:
        assert response.status_code == 200, (path, entry, await response.aread())
        if path == "block_of_a_dependency":
            await response.aread()
            return str(response.json())
        async for part in response.aiter_text():
            text, read = text + part, read + 1
            if lines_read is not None and read >= lines_read:
                break
    return text


def save(folder: Path, mux: lora_mux.Mux, seed: int) -> Path:
    """An adapter as PEFT saves it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 2 * SCALING, "r": 2}
    config["target_modules"] = mux.targets
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": factor
        for path, pair in weights(mux, seed).items()
        for name, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def churn(mux: lora_mux.Mux, versions: list[Path]) -> Iterator[None]:
    """Adapters are loaded, replaced and removed all the while."""
    over, failed, rounds = threading.Event(), [], 0

    def run() -> None:
        nonlocal rounds
        try:
            while not over.is_set():
                mux.load(f"new {rounds}", versions[0])
                mux.load("busy", versions[rounds % 2], replace=True)
                mux.remove(f"new {rounds}")
                rounds += 1
                over.wait(0.002)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)
    assert not thread.is_alive() and not failed and rounds > 3, (failed, rounds)


def nothing_is_left(stage: SimpleNamespace) -> None:
    """No block is open, no pass in progress, and the model answers as the base."""
    deadline = time.monotonic() + PATIENCE
    router = stage.mux._router
    while router.scopes.all_open() or router.passes.in_progress:  # streams of who has hung up
        assert time.monotonic() < deadline, [str(s) for s in router.scopes.all_open()]
        gc.collect()  # which stops all threads, for a second where many tests ran before
        time.sleep(1)
    assert stage.mux.active_adapters == []
    ids = stage.model.generate(PROMPT, **GREEDY)
    assert lines(ids, PROMPT.shape[1]) == stage.want[""]
    stage.mux._router.refuse_in_use()


def plans(count: int, seed: int) -> list[tuple[str, str, int | None]]:
    """(path, entry, lines read) of each client; every fourth one hangs up."""
    chance = random.Random(seed)
    made: list[tuple[str, str, int | None]] = []
    for i in range(count):
        path = PATHS[i % len(PATHS)]
        entry = "" if path == "no_rows" else ENTRIES[i % len(ENTRIES)]
        made.append((path, entry, chance.randint(1, 4) if i % 4 == 3 else None))
        if path in STEADY and i % 5 == 0:
            made[-1] = path, "busy", None
    chance.shuffle(made)
    return made


def run_clients(url: str, clients: list[tuple[str, str, int | None]]) -> list[Any]:
    async def main() -> list[Any]:
        limits = httpx.Limits(max_connections=len(clients))
        how: Any = {"base_url": url, "timeout": PATIENCE, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(**how) as client:
            tasks = [request(client, *one) for one in clients]
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)

    return asyncio.run(main())


def test_64_streams_at_once(stage: SimpleNamespace, tmp_path: Path) -> None:
    mux, want = stage.mux, {entry: [text] for entry, text in stage.want.items()}
    versions = [save(tmp_path / f"v{seed}", mux, seed) for seed in (101, 102)]
    want["busy"] = []
    for version in versions:
        mux.load("busy", version, replace="busy" in mux.adapters)
        want["busy"].append(alone(stage.model, mux, "busy"))
    clients = plans(64, seed=1)
    with churn(mux, versions):
        answers = run_clients(stage.url, clients)
    mux.remove("busy")
    for (path, entry, lines_read), answer in zip(clients, answers, strict=True):
        assert not isinstance(answer, Exception), (path, entry, answer)
        if lines_read is None:
            assert answer in want[entry], (path, entry)
        else:
            assert answer and want[entry][0].startswith(answer), (path, entry)
    nothing_is_left(stage)


def test_clients_that_all_hang_up(stage: SimpleNamespace) -> None:
    """Their generators are closed wherever and whenever the server and Python like."""
    streams = [path for path in STEADY if "stream" in path or "generator" in path]
    clients = [(streams[i % len(streams)], ENTRIES[i % 11], 1 + i % 3) for i in range(32)]
    for (path, entry, _), answer in zip(clients, run_clients(stage.url, clients), strict=True):
        assert answer and stage.want[entry].startswith(answer), (path, entry, answer)
    nothing_is_left(stage)
