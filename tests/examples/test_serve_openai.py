"""The OpenAI-compatible server of examples/, against PEFT: many clients, and bad requests."""

import asyncio
import functools
import importlib
import itertools
import json
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

import lora_mux
from peft_oracle import transformers
from server import served
from tiny_server import MEMORY, PATIENCE, Tiny, application, example, started

openai = pytest.importorskip("openai", reason="pip install 'lora-mux[serve]'")
pytest.importorskip("transformers", "5.23", reason="pip install 'lora-mux[serve]'")

ROWS = ["", "sql", "french", "sql+0.4*french", "-0.5*legal", "0.3*sql+french+1.25*legal"]
CACHE = 1024  # tokens


def name_of(row: str) -> str:
    return f"base:{row}" if row else "base"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def stage(tiny: Tiny) -> Iterator[SimpleNamespace]:
    """A server in this process, where one can look into its engine."""
    with started(tiny, cache_tokens=CACHE) as models, served(application(models)) as url:
        yield SimpleNamespace(url=url, models=models, mux=models.mux, tiny=tiny)


def client(stage: SimpleNamespace) -> Any:
    return openai.OpenAI(base_url=f"{stage.url}/v1", api_key="-", max_retries=0, timeout=PATIENCE)


def post(stage: SimpleNamespace, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{stage.url}/v1/{path}", json=body, timeout=PATIENCE)


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(stage: SimpleNamespace, row: str, text: str = "hello", **how: Any) -> httpx.Response:
    body = {
        "model": name_of(row),
        "messages": message(text),
        "max_tokens": 16,
        "temperature": 0,
        **how,
    }
    return post(stage, "chat/completions", **body)


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def is_idle(stage: SimpleNamespace) -> bool:
    """Whether the engine has nothing to do, and keeps nothing of anybody."""
    scheduler, router = stage.models.engine.scheduler, stage.models.engine._cb.output_router
    busy = scheduler.active_requests or scheduler.waiting_requests or router.result_handlers
    return not busy and router.output_queue.qsize() < 3  # of the last that hung up


def soon_idle(stage: SimpleNamespace, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_idle(stage):
        time.sleep(0.02)
    return is_idle(stage)


async def ask(asker: Any, row: str, text: str, kind: str) -> str:
    """The greedy answer of one request, by one of the ways to ask."""
    how = {"model": name_of(row), "temperature": 0}
    if kind == "responses":
        made = await asker.responses.create(input=text, max_output_tokens=16, **how)
        return str(made.output_text)
    if kind == "completions":
        made = await asker.completions.create(prompt=text, max_tokens=16, **how)
        return str(made.choices[0].text)
    messages = [{"role": "user", "content": text}]
    stream = await asker.chat.completions.create(
        messages=messages, max_tokens=16, stream=kind == "stream", **how
    )
    if kind == "chat":
        assert stream.model == how["model"]
        return str(stream.choices[0].message.content)
    chunks = [chunk async for chunk in stream]
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert sum(map(bool, parts)) > 3 and chunks[-1].usage.completion_tokens <= 16
    return "".join(parts)


def test_many_clients_each_with_its_own_mix(stage: SimpleNamespace) -> None:
    """24 at once, half of them streamed, share batches; each answer is PEFT's for its mix."""
    passes = []
    hook = stage.mux.model.register_forward_hook(lambda *given: passes.append(1))
    kinds = ["stream", "chat", "stream", "completions", "stream", "responses"]
    asked = [
        (row, f"question {i}", kinds[(i + j) % 6])
        for j in range(4)
        for i, row in enumerate(ROWS, start=10 * j)
    ]

    async def main() -> list[str]:
        url = f"{stage.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", timeout=PATIENCE) as asker:
            return await asyncio.gather(*(ask(asker, *each) for each in asked))

    got = asyncio.run(main())
    hook.remove()
    for (row, text, kind), made in zip(asked, got, strict=True):
        assert made == stage.tiny.answer(row, text, 16, kind != "completions"), (row, kind)
    assert len({stage.tiny.answer(row, "question 10") for row in ROWS}) > 4
    assert 0 < len(passes) < 24 * 16 / 3
    assert soon_idle(stage, PATIENCE)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_choose_the_same_request_id(stage: SimpleNamespace, stream: bool) -> None:
    """x-request-id is theirs to choose; the engine must not take one request for the other."""

    async def one(asker: httpx.AsyncClient, row: str) -> str:
        body = {"model": name_of(row), "prompt": "same", "max_tokens": 16, "temperature": 0}
        url, headers = f"{stage.url}/v1/completions", {"x-request-id": "mine"}
        got = await asker.post(url, json={**body, "stream": stream}, headers=headers)
        assert got.headers["x-request-id"] == "mine"
        events = [got.text]
        if stream:
            assert got.text.endswith("\n\ndata: [DONE]\n\n")
            events = [line[6:] for line in got.text.split("\n\n")[:-2]]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    async def main() -> list[str]:
        async with httpx.AsyncClient(timeout=10) as asker:
            return await asyncio.gather(*(one(asker, row) for row in ROWS))

    assert asyncio.run(main()) == [stage.tiny.answer(row, "same", 16, False) for row in ROWS]


def test_models_are_the_base_and_each_adapter(stage: SimpleNamespace) -> None:
    names = [model.id for model in client(stage).models.list()]
    assert names == ["base", "base:sql", "base:french", "base:legal"]
    assert httpx.get(f"{stage.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("gpt-5", 404, "'base:sql+0.4*french'"),
        ("base:nobody", 404, "unknown adapter 'nobody'"),
        ("base:sql+nobody", 404, "unknown adapter 'nobody'"),
        ("base:", 400, "at position 0"),
        ("base:sql+", 400, "at position 4"),
        ("base:sql+sql", 400, "each adapter once at position 4"),
        ("base:sql*2", 400, "at position 3"),
        ("base:1e99*sql", 400, "finite"),
        ("base:french+-10.5*sql", 400, "weights from -10 to 10, got -10.5 for 'sql'"),
    ],
)
def test_names_of_models_that_are_none(
    stage: SimpleNamespace, model: str, status: int, said: str
) -> None:
    messages = [{"role": "user", "content": "x"}]
    with client(stage) as asker, pytest.raises(openai.APIStatusError) as caught:
        asker.chat.completions.create(model=model, messages=messages)
    assert caught.value.status_code == status and said in caught.value.body["message"]


CHAT = {"messages": [{"role": "user", "content": "x"}]}
NESTED: Any = functools.reduce(lambda inner, _: [inner], range(400), 1)
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("chat/completions", {}, "`messages`"),
        ("chat/completions", {"messages": []}, "`messages`"),
        ("chat/completions", {"messages": IMAGE}, "got 'image_url'"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {**CHAT, "n": 2}, "`n`"),
        ("chat/completions", {**CHAT, "logprobs": True}, "`logprobs`"),
        ("chat/completions", {**CHAT, "stop": ""}, "`stop"),
        ("chat/completions", {**CHAT, "stop": ["x"] * 17}, "`stop"),
        ("completions", {"prompt": "x", "stop": [1]}, "`stop"),
        ("responses", {"input": "x", "stop": "x"}, "`stop` is not served"),
        ("chat/completions", {**CHAT, "tools": [{}]}, "`tools` is not served"),
        ("chat/completions", {**CHAT, "response_format": {"type": "x"}}, "`response_format.type`"),
        ("chat/completions", {**CHAT, "modalities": ["text", "audio"]}, "`modalities.1`"),
        ("chat/completions", {**CHAT, "logit_bias": {"1": 2}}, "`logit_bias`"),
        ("chat/completions", {**CHAT, "frequency_penalty": 0.5}, "`frequency_penalty`"),
        ("chat/completions", {**CHAT, "generation_config": "{}"}, "`generation_config`"),
        ("chat/completions", {**CHAT, "adapters": "sql"}, "`adapters` is not served"),
        ("chat/completions", {**CHAT, "seed": 1, "temperature": 1}, "`seed` is served only"),
        ("chat/completions", {**CHAT, "temperature": -1}, "`temperature`"),
        ("chat/completions", {**CHAT, "temperature": "1"}, "`temperature`"),
        ("chat/completions", {**CHAT, "top_p": 0}, "`top_p`"),
        ("chat/completions", {**CHAT, "top_k": 0}, "`top_k`"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, "`max_tokens`"),
        ("chat/completions", {**CHAT, "max_tokens": CACHE}, f"at most {CACHE}"),
        ("completions", {"prompt": ["a", "b"]}, "`prompt`"),
        ("completions", {"prompt": "y" * CACHE}, f"got {CACHE} and 1"),
        ("completions", {"prompt": ""}, "must have a token"),
        ("completions", {"prompt": "x", "echo": True}, "`echo`"),
        ("completions", {"prompt": "x", "suffix": "y"}, "`suffix`"),
        ("responses", {"input": "x", "tools": [{}]}, "`tools` is not served"),
        ("responses", {"input": "x", "include": ["y"]}, "`include` is not served"),
        ("responses", {"input": "x", "text": {"format": {"type": "y"}}}, "`text.format.type`"),
        ("responses", {"input": "x", "previous_response_id": "1"}, "`previous_response_id`"),
        ("responses", {"input": "x", "reasoning": {}}, "`reasoning`"),
        ("responses", {"input": []}, "`input"),
        ("responses", {"input": "x", "instructions": "\ud800"}, "half a character in '\\ud800'"),
        ("completions", {"prompt": "a\udfff"}, "half a character"),
        ("completions", {"prompt": "x", "metadata": NESTED}, "at most 20 levels"),
    ],
)
def test_what_is_not_served_is_refused(
    stage: SimpleNamespace, path: str, body: dict[str, Any], said: str
) -> None:
    content = json.dumps({"model": "base:sql", **body})  # httpx's own refuses half a character
    url, headers = f"{stage.url}/v1/{path}", {"content-type": "application/json"}
    response = httpx.post(url, content=content, headers=headers, timeout=PATIENCE)
    assert response.status_code == 400 and said in response.json()["error"]["message"]


def test_bodies_that_are_no_json(stage: SimpleNamespace) -> None:
    for body in (b"{", b"[1]", b'"x"'):
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{stage.url}/v1/completions", content=body, headers=headers)
        assert response.status_code == 400 and "in JSON" in response.json()["error"]["message"]
    response = httpx.post(f"{stage.url}/v1/completions", content=b"x" * (5 << 20))
    assert response.status_code == 413


def test_fields_that_say_nothing_are_taken(stage: SimpleNamespace) -> None:
    """As clients send them along: null, and what is usual."""
    usual = {"n": 1, "logprobs": False, "stop": None, "tools": None, "presence_penalty": 0.0}
    got = answer(chat(stage, "sql", user="me", seed=7, stream_options=None, **usual))
    assert got == stage.tiny.answer("sql", "hello")
    parts = [{"type": "text", "text": "hello"}]
    message = {"role": "user", "content": parts, "refusal": None, "tool_calls": None}
    assert answer(chat(stage, "sql", messages=[message])) == got
    more = {"logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"]}
    assert answer(chat(stage, "sql", tools=[], **more)) == got
    how = {"model": "base:sql", "temperature": 0}
    old = post(stage, "completions", prompt="hello", max_tokens=16, suffix="", logit_bias={}, **how)
    assert old.json()["choices"][0]["text"] == stage.tiny.answer("sql", "hello", 16, False)
    form = {"text": {"format": {"type": "text"}}, "tools": [], "include": []}
    new = post(stage, "responses", input="hello", max_output_tokens=16, **form, **how)
    assert new.json()["output"][0]["content"][0]["text"] == got


def test_an_answer_comes_back_as_it_was_sent(stage: SimpleNamespace) -> None:
    """As clients keep a conversation: with all that the answer said beside its text."""
    how = {"model": "base:sql", "temperature": 0}
    with client(stage) as asker:
        old = asker.chat.completions.create(messages=message("hello"), max_tokens=8, **how)
        new = asker.responses.create(input="hello", max_output_tokens=8, **how)
    said = old.choices[0].message
    assert new.output_text == said.content

    def read(path: str, **given: Any) -> int:
        usage = post(stage, path, **given, **how).json()["usage"]
        return int(usage["input_tokens" if path == "responses" else "prompt_tokens"])

    def between(answers: list[Any]) -> list[Any]:
        return [*message("hello"), *answers, *message("more")]

    plain = between([{"role": "assistant", "content": said.content}])
    expected = read("chat/completions", messages=plain)
    assert expected > read("chat/completions", messages=message("more")) + len(said.content or "")
    for dump in (said.model_dump(), said.to_dict()):
        whole = between([{"annotations": [], **dump}])  # as OpenAI's own answers have
        assert read("chat/completions", messages=whole) == expected
    for output in (new.model_dump()["output"], new.to_dict()["output"]):
        output[0]["content"][0]["logprobs"] = []
        assert read("responses", input=between(output)) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_response_says_whether_it_was_cut(
    stage: SimpleNamespace, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the model itself ends is whole, also at the last token of all."""

    def ask(most: int) -> Any:
        how = {"model": "base:french", "temperature": 0, "stream": stream}
        with client(stage) as asker:
            made = asker.responses.create(input="hello", max_output_tokens=most, **how)
            if not stream:
                return made
            last = [*made][-1]
        assert last.type == f"response.{last.response.status}"
        return last.response

    parts = ["", *(stage.tiny.answer("french", "hello", n) for n in range(1, 17))]
    tokens = [long.removeprefix(short) for short, long in itertools.pairwise(parts)]
    most = max(n for n, token in enumerate(tokens, 1) if token and tokens.index(token) == n - 1)
    cut = ask(most)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete" and cut.usage.output_tokens == most
    usual = stage.models.model.generation_config
    last = stage.tiny.tokenizer.get_vocab()[tokens[most - 1]]
    monkeypatch.setattr(usual, "eos_token_id", [usual.eos_token_id, last])
    whole = ask(most)
    assert whole.usage.output_tokens == most
    assert whole.status == "completed" and whole.incomplete_details is None


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_the_first_stop(
    stage: SimpleNamespace, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.tiny.answer("sql", "hello", 24, path != "completions")
    given = {"prompt": "hello"} if path == "completions" else {"messages": message("hello")}

    def ask(stop: Any, most: int = 24) -> tuple[str, str, int]:
        how = {"max_tokens": most, "temperature": 0, "stop": stop, "stream": stream}
        got = post(stage, path, model="base:sql", **given, **how)
        assert got.status_code == 200, got.text
        lines = got.text.split("\n\n")[:-2] if stream else [f"data: {got.text}"]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        choices = [event["choices"][0] for event in events]
        parts = [c.get("text") or (c.get("delta") or c.get("message") or {}) for c in choices]
        text = "".join(p if isinstance(p, str) else p.get("content") or "" for p in parts)
        return text, choices[-1]["finish_reason"], events[-1]["usage"]["completion_tokens"]

    for first, last in ((0, 1), (2, 5), (7, 8), (9, 14), (len(whole) - 2, len(whole))):
        stop = whole[first:last]
        for stops in (stop, ["nowhere", stop], [whole + "!", stop]):
            text, reason, tokens = ask(stops)
            assert (text, reason) == (whole[: whole.index(stop)], "stop"), stops
            assert 0 < tokens <= 24
            assert ask(stops, tokens) == (text, reason, tokens), "also at the last token"
        assert last == len(whole) or tokens < 24
    for unlike in ("nowhere", whole[-3:] + "nowhere", ["n" * 256], []):
        assert ask(unlike) == (whole, "length", 24)
    cancelled: list[str] = []
    expected = ask(whole[7:8])
    with monkeypatch.context() as patch:  # the engine has tokens on their way
        patch.setattr(stage.models.engine, "cancel_request", cancelled.append)
        assert ask(whole[7:8]) == expected
        assert soon_idle(stage, PATIENCE) and cancelled


def test_a_stop_where_answers_are_taken_apart(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen's are, which may begin with thoughts; its own rule for that is transformers'."""
    utils = importlib.import_module("transformers.cli.serving.utils")
    rules = next(v for k, v in utils._RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in k)
    rules = {**rules, "start_anchor": "assistant:"}  # as this model's chat template has it
    monkeypatch.setattr(stage.models.processor, "response_template", rules, raising=False)
    whole = answer(chat(stage, "sql"))
    assert whole == stage.tiny.answer("sql", "hello").strip()
    stop = whole[4:7]
    got = chat(stage, "sql", stop=stop)
    assert answer(got) == whole[: whole.index(stop)]
    assert got.json()["choices"][0]["finish_reason"] == "stop"
    assert 0 < got.json()["usage"]["completion_tokens"] < 16


def test_stops_are_found_across_parts_and_not_in_thoughts() -> None:
    """Whatever the cuts, of all texts of five letters and all stops of up to three."""
    stops_of = example("stops")
    thought = type("ReasoningText", (str,), {})
    for letters in itertools.product("ab", repeat=5):
        text = "".join(letters)
        for stops in (["b"], ["aa"], ["aba"], ["bb", "aab"], ["bab", "ab"]):
            for cut in range(6):
                queue = stops_of.UntilStop(stops)
                for item in (text[:cut], text[cut:], None):
                    queue.put_nowait(item)
                parts = [queue.get_nowait() for _ in range(queue.qsize())]
                assert parts.pop() is None and "".join(parts) == stops_of.before(stops, text)
                assert queue.stopped == any(stop in text for stop in stops)
    queue = stops_of.UntilStop(["aa"])
    for item in ("ba", thought("aa"), "ab", None):
        queue.put_nowait(item)
    assert [queue.get_nowait() for _ in range(5)] == ["b", "a", "aa", "ab", None]
    assert not queue.stopped


def test_each_request_draws_as_it_says(stage: SimpleNamespace) -> None:
    """Greedy and hot ones in the same batches; extremes end nobody's answer."""
    hot = {"temperature": 2, "max_tokens": 32}
    cold = stage.tiny.answer("sql", "hello", 32)
    ways: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 32},
        {**hot, "top_k": 1},
        {**hot, "top_p": 1e-9},
        {"temperature": 1e-300, "max_tokens": 32},
        {"temperature": None, "max_tokens": 32},  # as the model's generation_config: greedy
        {**hot},
        {**hot},
        {**hot, "top_k": 1 << 40},
        {**hot, "temperature": None, "top_p": 1.0},
    ]

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE) as asker:
            url, messages = (
                f"{stage.url}/v1/chat/completions",
                [{"role": "user", "content": "hello"}],
            )
            body = {"model": "base:sql", "messages": messages}
            return await asyncio.gather(*(asker.post(url, json={**body, **way}) for way in ways))

    got = [answer(response) for response in asyncio.run(main())]
    assert got[:5] == [cold] * 5
    assert len({cold, *got[5:]}) == 5


def test_a_request_of_the_largest_size(stage: SimpleNamespace) -> None:
    """It fills the cache alone, and one token more would be refused; others wait, and are right."""

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE) as asker:
            url = f"{stage.url}/v1/completions"
            large = {"model": "base:sql", "prompt": "y" * (CACHE - 4), "max_tokens": 4}
            small = {"model": "base:french", "prompt": "z", "max_tokens": 4}
            bodies = [large, small, large, small]
            return await asyncio.gather(
                *(asker.post(url, json={**body, "temperature": 0}) for body in bodies)
            )

    large, small, *again = [r.json()["choices"][0]["text"] for r in asyncio.run(main())]
    assert large == stage.tiny.answer("sql", "y" * (CACHE - 4), 4, False)
    assert small == stage.tiny.answer("french", "z", 4, False)
    assert again == [large, small]


def test_an_answer_may_be_as_long_as_there_is_room(stage: SimpleNamespace) -> None:
    response = post(stage, "completions", model="base", prompt="y" * (CACHE - 3), temperature=0)
    assert response.json()["usage"]["completion_tokens"] <= 3, response.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_request(stage: SimpleNamespace, stream: bool) -> None:
    assert soon_idle(stage, PATIENCE)
    body = {**CHAT, "model": "base:sql", "max_tokens": 900, "temperature": 2, "stream": stream}
    slow = stage.mux.model.register_forward_hook(lambda *given: time.sleep(0.02))
    try:
        with httpx.Client(timeout=PATIENCE if stream else 0.5) as asker:
            if stream:
                with asker.stream("POST", f"{stage.url}/v1/chat/completions", json=body) as got:
                    lines = got.iter_lines()
                    assert next(lines) and not is_idle(stage)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    asker.post(f"{stage.url}/v1/chat/completions", json=body)
        assert soon_idle(stage, 2)  # it would have taken 18 seconds
    finally:
        slow.remove()
    assert answer(chat(stage, "french")) == stage.tiny.answer("french", "hello")


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_a_client_that_hangs_up_before_its_stream_has_begun(
    stage: SimpleNamespace, path: str
) -> None:
    """At once, and a little later: one of these finds the server before the first step."""
    assert soon_idle(stage, PATIENCE)
    asked, longest = {
        "completions": ({"prompt": "x"}, "max_tokens"),
        "chat/completions": (CHAT, "max_tokens"),
        "responses": ({"input": "x"}, "max_output_tokens"),
    }[path]
    body = json.dumps({**asked, "model": "base:sql", longest: 900, "stream": True}).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    asking = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    slow = stage.mux.model.register_forward_hook(lambda *given: time.sleep(0.02))
    try:
        for i in range(20):
            with socket.create_connection(("127.0.0.1", httpx.URL(stage.url).port)) as client:
                client.sendall(asking)
                time.sleep(i * 0.0005)
        time.sleep(0.3)
        assert soon_idle(stage, 2)  # it would have taken 18 seconds
    finally:
        slow.remove()


def test_an_adapter_that_overflows_fails_its_requests_alone(stage: SimpleNamespace) -> None:
    """Its values are finite, so that it can be loaded; what comes of them is not."""
    shapes = {path: stage.mux.model.get_submodule(path).weight.shape for path in stage.mux.targets}
    huge = {p: (torch.full((1, K), 1e30), torch.full((N, 1), 1e30)) for p, (N, K) in shapes.items()}
    stage.mux.add_adapter("huge", huge, alpha=1)
    try:
        with ThreadPoolExecutor(6) as threads:
            good = threads.map(lambda row: answer(chat(stage, row)), ROWS[1:5])
            bad = threads.submit(chat, stage, "huge")
            streamed = threads.submit(chat, stage, "sql+huge", stream=True)
            assert [*good] == [stage.tiny.answer(row, "hello") for row in ROWS[1:5]]
        assert bad.result().status_code == 400 and "that overflow" in bad.result().text
        assert '"error": "request' in streamed.result().text
    finally:
        stage.mux.remove("huge")
    assert soon_idle(stage, PATIENCE)


def test_a_key_under_a_prefix(stage: SimpleNamespace) -> None:
    """As behind a proxy, in another application, or in Ray with a route_prefix."""
    app = application(stage.models, key="mine")
    outer = FastAPI()
    outer.mount("/api", app)
    host, mine = {"host": "127.0.0.1"}, {"authorization": "Bearer mine"}
    for client in (
        TestClient(app, root_path="/api", headers=host),
        TestClient(outer, headers=host),
        TestClient(app, headers=host),
    ):
        prefix = "" if client.app is app and not client._transport.root_path else "/api"
        for path in ("/v1/models", "/v1/nothing", "//v1/models", "/nothing", "/V1/models"):
            assert client.get(f"{prefix}{path}").status_code == 401, path
        assert client.get(f"{prefix}/v1/models", headers=mine).status_code == 200
        assert client.get(f"{prefix}/health").status_code == 200
        assert client.get(f"{prefix}/").status_code == 200


def test_what_nobody_foresaw_has_the_form_of_an_error(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.models.engine, "_add", None)
    response = chat(stage, "sql")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed; its log says more"


def test_too_many_requests_at_once(stage: SimpleNamespace) -> None:
    engine = stage.models.engine
    engine._most_requests = 0
    try:
        response = chat(stage, "sql")
    finally:
        engine._most_requests = 256
    assert response.status_code == 503 and "try later" in response.text


def test_the_head_alone_and_methods_that_are_not_served(stage: SimpleNamespace) -> None:
    for path in ("", "health", "v1/models"):
        whole, head = httpx.get(f"{stage.url}/{path}"), httpx.head(f"{stage.url}/{path}")
        assert head.status_code == 200 and not head.content
        for header in ("content-type", "content-length"):
            assert head.headers[header] == whole.headers[header]
        refused = httpx.delete(f"{stage.url}/{path}")
        assert refused.status_code == 405 and {*refused.headers["allow"].split(", ")} >= {"GET"}
    refused = httpx.get(f"{stage.url}/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_a_body_that_does_not_come(stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told, and the request holds up nothing, such as the end of the server."""
    gate, patience = example("gate"), example("__main__").PATIENCE
    assert gate.SLOWEST < patience
    monkeypatch.setattr(gate, "SLOWEST", 0.2)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Length: 5000"]
    head = "\r\n".join([*lines, "Connection: close", "", "{"])
    with socket.create_connection(("127.0.0.1", httpx.URL(stage.url).port), PATIENCE) as asker:
        asker.sendall(head.encode())
        said = b"".join(iter(lambda: asker.recv(1 << 16), b""))  # to the end of the connection
    assert said.startswith(b"HTTP/1.1 408 ")
    error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == 408 and "within 0.2 seconds" in error["message"]


def test_what_transformers_would_serve_besides_is_not_there(stage: SimpleNamespace) -> None:
    """/reset takes the model away from everybody, /load_model fetches one from anywhere."""
    for path in ("reset", "load_model", "v1/systemone", "v1/audio/transcriptions"):
        assert httpx.post(f"{stage.url}/{path}", json={"model": "x"}).status_code == 404
    for path in ("docs", "openapi.json"):
        assert httpx.get(f"{stage.url}/{path}").status_code == 404
    for path in ("load_lora_adapter", "unload_lora_adapter"):  # without a key they do not exist
        assert post(stage, path, lora_name="sql", lora_path="sql").status_code == 404


ODD_HOSTS = [
    "[::1]",
    "[::1]:80",
    "localhost:80@evil",
    "localhost:80:80",
    "[localhost",
    "me@localhost",
]


def test_a_name_that_was_taken_for_this_machine(stage: SimpleNamespace) -> None:
    """As by a web page whose server says that its name is 127.0.0.1."""
    url, port = f"{stage.url}/v1/models", httpx.URL(stage.url).port
    for host in ("example.org", f"example.org:{port}", "127.0.0.1.example.org", "", *ODD_HOSTS):
        response = httpx.get(url, headers={"host": host})
        assert response.status_code == 400
        said = response.json()["error"]["message"]
        assert "`Host` must be 127.0.0.1 or localhost, got" in said and "--host" in said
    for host in ("127.0.0.1", f"localhost:{port}", "LOCALHOST"):
        assert httpx.get(url, headers={"host": host}).status_code == 200
    response = httpx.get(url, headers={"host": "[::1]:80"})
    assert "got '[::1]'" in response.json()["error"]["message"]
    with (
        client(stage) as asker,
        pytest.raises(openai.BadRequestError, match="got 'example.org'"),
    ):
        asker.models.list(extra_headers={"host": "example.org"})


def test_an_older_transformers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ImportError, match=r"5\.23 or newer, got 5\.17\.0"), started(tiny):
        pass


def test_adapters_are_loaded_only_where_there_is_a_key(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="needs a key"):
        application(None, loadable=tiny.adapters)


def test_a_worker_that_died(tiny: Tiny) -> None:
    """Who waits is told, streamed or not, and so is who asks whether the server is well."""

    def fail(*given: Any) -> None:
        raise RuntimeError('a "quoted" failure')

    with started(tiny, cache_tokens=CACHE) as models, served(application(models)) as url:
        broken = SimpleNamespace(url=url)
        models.model.register_forward_hook(fail)
        streamed = chat(broken, "sql", stream=True)
        with client(broken) as asker, pytest.raises(openai.APIError, match="quoted"):
            asker.chat.completions.create(**CHAT, model="base", stream=True).close()
        assert httpx.get(f"{url}/health").status_code == 503
        response = chat(broken, "sql")
    assert "a 'quoted' failure" in streamed.text
    assert response.status_code == 503 and "quoted" in response.text


def test_an_adapter_for_which_there_is_no_room_is_read_later(tiny: Tiny) -> None:
    """With --memory, where those that are pinned fill it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny.base)
    mux, load = lora_mux.attach(model, memory=MEMORY), example("loading")._load
    for name in ("sql", "french"):
        assert load(mux, name, tiny.adapters / name)
        mux.pin(name)
    assert not load(mux, "legal", tiny.adapters / "legal")
    assert "legal" in mux.adapters and not mux.memory().adapters["legal"].resident
    mux.unpin("french")
    assert load(mux, "legal", tiny.adapters / "legal", replace=True)
    assert mux.memory().adapters["legal"].resident
