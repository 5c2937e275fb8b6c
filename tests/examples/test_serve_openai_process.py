"""`python examples/serve_openai` as a process: a key, adapters that come and go, its end."""

import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tiny_server import MEMORY, PATIENCE, Tiny, example, process

openai = pytest.importorskip("openai", reason="pip install 'lora-mux[serve]'")
pytest.importorskip("transformers", "5.23", reason="pip install 'lora-mux[serve]'")

KEY = "a secret"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny = Tiny(folder)
    (tiny.adapters / "outside").symlink_to(tiny.base)
    (tiny.adapters / "loop").symlink_to("loop")
    arguments = ["--loadable", str(tiny.adapters), "--memory", MEMORY, "--cache-tokens", "4096"]
    with process(
        folder / "log",
        *(str(tiny.base), *tiny.folders("sql", "french"), *arguments),
        env={"LORA_MUX_API_KEY": KEY},
    ) as server:
        yield SimpleNamespace(url=server.url, tiny=tiny, server=server)


def post(stage: SimpleNamespace, path: str, key: str | None = KEY, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{stage.url}/v1/{path}", json=body, headers=headers, timeout=PATIENCE)


def load(stage: SimpleNamespace, name: str, path: str, **how: Any) -> httpx.Response:
    return post(stage, "load_lora_adapter", lora_name=name, lora_path=path, **how)


def unload(stage: SimpleNamespace, name: str) -> httpx.Response:
    return post(stage, "unload_lora_adapter", lora_name=name)


def complete(stage: SimpleNamespace, row: str, text: str = "hello", tokens: int = 16) -> Any:
    body = {"model": f"base:{row}", "prompt": text, "max_tokens": tokens, "temperature": 0}
    return post(stage, "completions", **body)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@contextmanager
def begun(stage: SimpleNamespace, row: str, tokens: int = 400) -> Iterator[Callable[[], str]]:
    """A stream that has begun; what it yields reads it to its end."""
    url = f"{stage.url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        stream = client.completions.create(
            model=f"base:{row}", prompt="hello", max_tokens=tokens, temperature=0, stream=True
        )
        first = next(stream).choices[0].text
        yield lambda: first + "".join(chunk.choices[0].text for chunk in stream)


def test_whoever_has_no_key_sees_nothing_but_the_page(stage: SimpleNamespace) -> None:
    for key in (None, "another", KEY + "x"):
        for path in ("completions", "load_lora_adapter", "unload_lora_adapter", "nothing"):
            response = post(stage, path, key)
            assert response.status_code == 401 and "key" in response.json()["error"]["message"]
    assert httpx.get(f"{stage.url}/v1/models").status_code == 401
    assert httpx.get(f"{stage.url}/health").status_code == 200
    assert httpx.get(stage.url).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("evil", "../base", "inside of the one"),
        ("evil", "outside", "inside of the one"),  # a link to it
        ("evil", "/", "inside of the one"),
        ("evil", "sql/adapter_config.json", "inside of the one"),
        ("evil", "nothing", "inside of the one"),
        ("evil", "loop", "inside of the one"),  # a link to itself
        ("evil", "\0", "inside of the one"),
        ("evil", ".", "adapter_config.json"),
        ("a b", "legal", "must have names of letters"),
        ("2*legal", "legal", "must have names of letters"),
        ("__base__", "legal", "__base__"),
        ("sql", "legal", "sql"),  # taken
    ],
)
def test_what_is_not_loaded(stage: SimpleNamespace, name: str, path: str, said: str) -> None:
    response = load(stage, name, path)
    assert response.status_code == 400 and said in response.json()["error"]["message"]
    assert text_of(complete(stage, "sql")) == stage.tiny.answer("sql", "hello", 16, False)


def test_an_adapter_comes_and_goes(stage: SimpleNamespace) -> None:
    assert complete(stage, "legal").status_code == 404
    assert load(stage, "legal", "legal").status_code == 200
    mix = complete(stage, "0.7*legal+french")
    assert text_of(mix) == stage.tiny.answer("0.7*legal+french", "hello", 16, False)
    assert unload(stage, "legal").status_code == 200
    assert complete(stage, "legal").status_code == 404
    assert unload(stage, "legal").status_code == 404


def test_an_adapter_is_removed_while_a_request_has_it(stage: SimpleNamespace) -> None:
    """New requests get 404; the one in flight ends with it, and beside others."""
    with begun(stage, "french") as rest:
        assert unload(stage, "french").status_code == 200
        assert complete(stage, "french").status_code == 404
        assert text_of(complete(stage, "sql")) == stage.tiny.answer("sql", "hello", 16, False)
        assert rest() == stage.tiny.answer("french", "hello", 400, False)
    assert load(stage, "french", "french").status_code == 200
    assert text_of(complete(stage, "french")) == stage.tiny.answer("french", "hello", 16, False)


def test_an_adapter_is_replaced_while_requests_have_it(stage: SimpleNamespace) -> None:
    with begun(stage, "french") as rest:
        assert load(stage, "french", "sql", load_inplace=True).status_code == 200
        assert text_of(complete(stage, "french")) == stage.tiny.answer("sql", "hello", 16, False)
        assert rest() == stage.tiny.answer("french", "hello", 400, False)
    assert load(stage, "french", "french", load_inplace=True).status_code == 200


def test_adapters_that_do_not_fit_together_wait_for_one_another(stage: SimpleNamespace) -> None:
    """A mix that can never fit is refused alone; of the others nobody waits for ever."""
    assert load(stage, "legal", "legal").status_code == 200
    rows = ["sql", "legal", "french+legal", "0.5*french", "legal", "sql+french"] * 3
    with ThreadPoolExecutor(len(rows) + 1) as threads:
        never = threads.submit(complete, stage, "sql+french+legal")
        got = list(threads.map(lambda row: complete(stage, row, row), rows))
    assert [*map(text_of, got)] == [stage.tiny.answer(row, row, 16, False) for row in rows]
    assert never.result().status_code == 400, never.result().text
    assert unload(stage, "legal").status_code == 200


@pytest.fixture(scope="module")
def broken(stage: SimpleNamespace) -> str:
    """An adapter whose header is right, and of whose values one is no number."""
    shutil.copytree(stage.tiny.adapters / "legal", stage.tiny.adapters / "broken")
    file = stage.tiny.adapters / "broken" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    return "broken"


def names(stage: SimpleNamespace) -> list[str]:
    headers = {"authorization": f"Bearer {KEY}"}
    found = httpx.get(f"{stage.url}/v1/models", headers=headers, timeout=PATIENCE).json()["data"]
    return [model["id"] for model in found]


def test_values_that_are_no_numbers_are_not_loaded(stage: SimpleNamespace, broken: str) -> None:
    """With --memory, which reads values when they are needed: the load fails, not the requests."""
    before = names(stage)
    for name, how in (
        ("new", {}),
        ("new", {"load_inplace": True}),
        ("sql", {"load_inplace": True}),
    ):
        response = load(stage, name, broken, **how)
        assert response.status_code == 400, response.text
        assert "must be finite" in response.json()["error"]["message"]
        assert names(stage) == before
        assert text_of(complete(stage, "sql")) == stage.tiny.answer("sql", "hello", 16, False)
    assert complete(stage, "new").status_code == 404


def test_many_requests_while_adapters_come_and_go(stage: SimpleNamespace) -> None:
    """Each answer is right, or says that its adapter is not there."""

    async def main() -> list[tuple[str, httpx.Response]]:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=f"{stage.url}/v1/", headers=headers, timeout=PATIENCE
        ) as asker:

            async def one(row: str, i: int) -> tuple[str, httpx.Response]:
                await asyncio.sleep(i * 0.02)
                body = {"model": f"base:{row}", "prompt": "hello", "max_tokens": 16}
                return row, await asker.post("completions", json={**body, "temperature": 0})

            async def change(i: int) -> None:
                await asyncio.sleep(i * 0.05)
                body = {"lora_name": "legal", "lora_path": "legal"}
                await asker.post("load_lora_adapter", json=body)
                await asyncio.sleep(0.03)
                await asker.post("unload_lora_adapter", json={"lora_name": "legal"})

            rows = ["sql", "legal", "french", "legal", "0.4*sql+french"] * 5
            changes = [asyncio.create_task(change(i)) for i in range(6)]
            got = await asyncio.gather(*(one(row, i) for i, row in enumerate(rows)))
            await asyncio.gather(*changes)
            return got

    for row, response in asyncio.run(main()):
        if response.status_code == 404:
            assert row == "legal"
        else:
            assert text_of(response) == stage.tiny.answer(row, "hello", 16, False), row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sql"], "an adapter must be NAME=FOLDER, got 'sql'"),
        (["adapters/my sql"], "an adapter must be NAME=FOLDER, got 'adapters/my sql'"),
        (["my sql=x"], "an adapter must be NAME=FOLDER, got 'my sql=x': `row` must have names"),
        (["sql="], "an adapter must be NAME=FOLDER, got 'sql='"),
        (["=x"], "an adapter must be NAME=FOLDER, got '=x'"),
        (["sql=x", "french=y", "sql=z"], "NAME must be given once, got 'sql' twice"),
        (["--cache-tokens", "0"], "--cache-tokens: must be a whole number from 1"),
        (["--most-requests", "-1"], "--most-requests: must be a whole number from 1"),
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535"),
        (["--loadable", "."], "a key in the environment as LORA_MUX_API_KEY"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_openai", "model", *arguments])
    with pytest.raises(SystemExit) as caught:
        example("__main__").main()
    assert caught.value.code == 2 and said in capsys.readouterr().err


def check_end(server: Any, stage: SimpleNamespace, by: signal.Signals, code: int) -> None:
    """What was begun is answered to the end, and nothing listens any more."""
    stage = SimpleNamespace(url=server.url, tiny=stage.tiny)
    with begun(stage, "sql") as rest, ThreadPoolExecutor(1) as threads:
        ended = threads.submit(server.ends, by)
        assert rest() == stage.tiny.answer("sql", "hello", 400, False)
    assert ended.result() == code, server.log.read_text("utf-8")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_an_interrupt_ends_it_when_its_answers_have_ended(stage: SimpleNamespace) -> None:
    check_end(stage.server, stage, signal.SIGINT, 0)


@pytest.mark.slow  # it starts another server
def test_a_sigterm_does_so_too(stage: SimpleNamespace, tmp_path: Path) -> None:
    arguments = [str(stage.tiny.base), *stage.tiny.folders("sql")]
    with process(tmp_path / "log", *arguments, env={"LORA_MUX_API_KEY": ""}) as server:
        check_end(server, stage, signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow  # it starts another server
def test_a_second_interrupt_ends_it_at_once(stage: SimpleNamespace, tmp_path: Path) -> None:
    arguments = [str(stage.tiny.base), *stage.tiny.folders("sql"), "--cache-tokens", "4096"]
    with process(tmp_path / "log", *arguments, env={"LORA_MUX_API_KEY": ""}) as server:
        here = SimpleNamespace(url=server.url, tiny=stage.tiny)
        with begun(here, "sql", 900):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            server.ends(signal.SIGINT)  # it waited for the engine's thread for ever
