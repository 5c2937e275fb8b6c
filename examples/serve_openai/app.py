"""The application: transformers' handlers, the errors, the page."""

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError

from lora_mux.errors import LoraMuxError, UnknownAdapterError

from . import fields
from .engine import Order, State, sampling
from .gate import Gate, refusal
from .loading import add_loading
from .models import Models
from .stops import before

# build_server() also has /reset and /load_model, by which anybody could take the model away.
SERVED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}
PAGE = Path(__file__).with_name("page.html")


class Checked:
    """In front of a handler of transformers: what is asked for, checked, is all that it sees."""

    kind: type[fields.Asked]
    parsed = False
    model_manager: Models

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        asked = fields.checked(self.kind, body)
        seen = asked.model_dump(exclude_none=True)
        return await super().handle_request({**seen, "asked": asked}, request_id)  # type: ignore[misc]

    def _validate_request(self, body: dict[str, Any]) -> None:
        """It is done: transformers' own would refuse `top_k`, and ignore much else."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body["model"], self.model_manager.model, self.model_manager.processor

    def _build_generation_config(
        self, body: dict[str, Any], usual: GenerationConfig, use_cb: bool = False
    ) -> Order:
        asked: fields.Asked = body["asked"]
        vocabulary = self.model_manager.model.config.get_text_config().vocab_size
        drawn = sampling(
            usual,
            vocabulary,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
        )
        if asked.seed is not None and drawn["top_k"] != 1:
            raise HTTPException(
                400,
                "`seed` is served only with `temperature` 0: the requests of a batch draw from "
                "one generator, so that no seed repeats an answer",
            )
        how = asked.longest, asked.stops, self.parsed
        return Order(asked.row, drawn, usual.eos_token_id, *how)


class Older(Checked):
    """The two older endpoints: they have `stop`, and a last line that some clients wait for."""

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response: JSONResponse = await super()._non_streaming(*args, **kwargs)  # type: ignore[misc]
        order = _order(*args, *kwargs.values())
        if not order.stops:
            return response
        answer = json.loads(response.body)
        choice = answer["choices"][0]
        where, name = (choice, "text") if "text" in choice else (choice["message"], "content")
        where[name] = before(order.stops, where[name] or "")
        return JSONResponse(answer)

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _with_done(response.body_iterator)
        return response


async def _with_done(parts: Any) -> AsyncIterator[str]:
    async with aclosing(parts):
        async for part in parts:
            yield part
    yield "data: [DONE]\n\n"


class Chat(Older, ChatCompletionHandler):
    kind = fields.Chat
    parsed = True

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if not getattr(self.model_manager.processor, "chat_template", None):
            raise HTTPException(
                400, "this model has no chat template: POST the text to /v1/completions"
            )
        return await super().handle_request(body, request_id)


class Completion(Older, CompletionHandler):
    kind = fields.Completion


class Response(Checked, ResponseHandler):
    """transformers' own says of all answers that they are complete."""

    kind = fields.Response

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response: JSONResponse = await super()._non_streaming(*args, **kwargs)
        answer = json.loads(response.body)
        return JSONResponse(answer) if _cut(answer, _order(*args, *kwargs.values())) else response

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = super()._streaming(*args, **kwargs)
        order = _order(*args, *kwargs.values())
        response.body_iterator = _with_status(response.body_iterator, order)
        return response


def _order(*given: Any) -> Order:
    return next(each for each in given if isinstance(each, Order))


def _cut(answer: dict[str, Any], order: Order) -> bool:
    """Whether `max_output_tokens` has cut an answer of /v1/responses, which then says so."""
    most = order.max_new_tokens
    if most is None or answer["usage"]["output_tokens"] < most:
        return False
    answer["status"] = answer["output"][-1]["status"] = "incomplete"
    answer["incomplete_details"] = {"reason": "max_output_tokens"}
    return True


async def _with_status(parts: Any, order: Order) -> AsyncIterator[str]:
    async with aclosing(parts):
        async for part in parts:
            if '"type":"response.completed"' in part:  # in a text, quotes are escaped
                event = json.loads(part.removeprefix("data: "))
                if _cut(event["response"], order):
                    part = f"data: {json.dumps({**event, 'type': 'response.incomplete'})}\n\n"
            yield part


def build(
    models: Models, *, key: str | None = None, loadable: Path | None = None, local: bool = True
) -> FastAPI:
    """The application of a model that has been started.

    Args:
        models: the model, its adapters and its engine, which end with the application.
        key: whoever uses /v1/ must have it. None = nobody needs one.
        loadable: the folder inside of which adapters may be loaded, by whoever has the key.
        local: refuse requests that were sent to another name than this machine's own, as those of
            a web page that has taken a name of its own for 127.0.0.1.
    """
    if loadable is not None and not key:
        raise ValueError("`loadable` needs a key, got none: whoever asks could load adapters")
    state = State(models.engine)
    handlers = (kind(models, state) for kind in (Chat, Completion, Response))
    app = build_server(models, *handlers, None, None, state)
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) in SERVED]
    if loadable is not None:
        add_loading(app, models, loadable)
    _add_page(app)
    app.router.routes.sort(key=lambda route: "GET" not in route.methods)  # a 405 names the first's
    for route in app.router.routes:
        if "GET" in route.methods:
            route.methods.add("HEAD")  # FastAPI leaves it out, and uvicorn sends no body then
    _add_errors(app)
    app.add_middleware(Gate, key=key, local=local)
    return app


def _add_page(app: FastAPI) -> None:
    page = PAGE.read_text("utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = (
        f"default-src 'none'; {allowed['script']}; {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.get("/")
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def _add_errors(app: FastAPI) -> None:
    async def explain(request: Request, error: Any) -> JSONResponse:
        if isinstance(error, HTTPException):
            return refusal(error.status_code, error.detail, error.headers)
        if isinstance(error, RequestValidationError):
            return refusal(400, fields.explain(error.errors()))
        if isinstance(error, UnknownAdapterError):
            return refusal(404, str(error))
        if isinstance(error, CBWorkerDeadError):
            return refusal(503, str(error))
        if isinstance(error, TemplateError):
            return refusal(400, f"`messages` do not fit the model's chat template: {error}")
        if isinstance(error, LoraMuxError):
            return refusal(400, str(error))
        return refusal(500, "the server failed; its log says more")

    # Starlette's own HTTPException, which FastAPI's is one of: it raises that where nothing is.
    kinds = (HTTPException, RequestValidationError, CBWorkerDeadError, TemplateError, LoraMuxError)
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, explain)
