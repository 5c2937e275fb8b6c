"""A web server for streams of tokens, in all the ways in which people write one."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from torch import Tensor

import lora_mux
from peft_oracle import transformers

Entry = str | list[str] | None
TOKENS = 6
GREEDY: dict[str, Any] = {
    "max_new_tokens": TOKENS,
    "min_new_tokens": TOKENS,
    "do_sample": False,
    "pad_token_id": 0,
}
PATIENCE = 60.0  # seconds; a machine may be busy, and a client that waits longer hangs


class Digits:
    """A tokenizer for streamers: each token is a line with its number."""

    def decode(self, ids: Any, **how: Any) -> str:
        return "".join(f"{int(token)}\n" for token in ids)


def entry_of(text: str) -> Entry:
    """An adapter, a mix of adapters ("a+b"), or the base model ("")."""
    return None if not text else text.split("+") if "+" in text else text


def following(model: Any, ids: Tensor, **how: Any) -> Tensor:
    """The prompt with its next token."""
    with torch.no_grad():
        token = model(ids, **how).logits[:, -1].argmax(-1, keepdim=True)
    return torch.cat([ids, token], 1)


def lines(ids: Tensor, start: int) -> str:
    return Digits().decode(ids[0, start:])


def make_app(model: Any, mux: lora_mux.Mux, prompt: Tensor) -> FastAPI:
    """An app with one path for each way of streaming; ?entry= chooses the adapters."""
    app = FastAPI()
    start = prompt.shape[1]

    @app.get("/async_generator")
    async def async_generator(entry: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            ids = prompt
            with mux.route([entry_of(entry)]):
                for _ in range(TOKENS):
                    await asyncio.sleep(0)
                    ids = following(model, ids)
                    yield lines(ids, -1)

        return StreamingResponse(stream())

    @app.get("/sync_generator")
    def sync_generator(entry: str) -> StreamingResponse:
        def stream() -> Iterator[str]:
            ids = prompt
            with mux.route([entry_of(entry)]):
                for _ in range(TOKENS):
                    ids = following(model, ids)
                    yield lines(ids, -1)

        return StreamingResponse(stream())

    @app.get("/rows_with_the_call")
    async def rows_with_the_call(entry: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            ids = prompt
            for _ in range(TOKENS):
                ids = await asyncio.to_thread(
                    following, model, ids, adapter_names=[entry_of(entry)]
                )
                yield lines(ids, -1)

        return StreamingResponse(stream())

    @app.get("/generate_with_rows")
    async def generate_with_rows(entry: str) -> StreamingResponse:
        rows = [entry_of(entry)]
        ids = await asyncio.to_thread(model.generate, prompt, adapter_names=rows, **GREEDY)
        return StreamingResponse(iter([lines(ids, start)]))

    @app.get("/block_around_awaits")
    async def block_around_awaits(entry: str) -> StreamingResponse:
        with mux.route([entry_of(entry)]):
            await asyncio.sleep(0.001)
            ids = following(model, prompt)
            await asyncio.sleep(0.001)
            ids = await asyncio.to_thread(following, model, ids)
            again = await asyncio.to_thread(model.generate, prompt, **GREEDY)
        assert torch.equal(again[:, : ids.shape[1]], ids)
        return StreamingResponse(iter([lines(again, start)]))

    async def rows(entry: str) -> AsyncIterator[None]:
        with mux.route([entry_of(entry)]):
            yield

    @app.get("/block_of_a_dependency")
    async def block_of_a_dependency(rows: None = Depends(rows)) -> str:
        ids = await asyncio.to_thread(model.generate, prompt, **GREEDY)
        return lines(ids, start)

    @app.get("/streamer")
    def streamer(entry: str) -> StreamingResponse:
        def stream() -> Iterator[str]:
            texts = transformers.TextIteratorStreamer(Digits(), skip_prompt=True, timeout=PATIENCE)
            how = {"inputs": prompt, "streamer": texts, **GREEDY}
            with mux.route([entry_of(entry)]):
                threading.Thread(target=model.generate, kwargs=how).start()
                yield from texts

        return StreamingResponse(stream())

    @app.get("/async_streamer")
    async def async_streamer(entry: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            texts = transformers.AsyncTextIteratorStreamer(
                Digits(), skip_prompt=True, timeout=PATIENCE
            )
            how = {"inputs": prompt, "streamer": texts, **GREEDY}
            with mux.route([entry_of(entry)]):
                threading.Thread(target=model.generate, kwargs=how).start()
                async for text in texts:
                    yield text

        return StreamingResponse(stream())

    @app.get("/no_rows")
    async def no_rows(entry: str) -> StreamingResponse:
        """A stream of the base model that says nothing of rows."""
        assert not entry

        async def stream() -> AsyncIterator[str]:
            ids = prompt
            for _ in range(TOKENS):
                await asyncio.sleep(0)
                ids = following(model, ids)
                yield lines(ids, -1)

        return StreamingResponse(stream())

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address at which uvicorn serves an app, in a thread."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, ws="none", lifespan="off", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
