"""In front of the application: for whom a request is, the key, its size, and who hangs up."""

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse

LOCAL = {"127.0.0.1", "localhost"}
PUBLIC = "/", "/health"  # all else needs the key, under whatever prefix the application is
LARGEST = 4 << 20  # bytes of a request; texts are tokenized on the event loop, where all wait
SLOWEST = 20  # seconds for a whole request: less than the end of the server waits for its answers
# A name or an address, and a port; what is no such is compared as a whole, and is nobody's.
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?", re.ASCII)

_AT_END: ContextVar[list[Callable[[], None]]] = ContextVar("at_end")


def at_end(free: Callable[[], None]) -> None:
    """Call this when the request is over that is being answered, however it ends.

    A stream cannot do so itself: where the client is gone before the first step, it never runs.
    """
    _AT_END.get().append(free)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's form, which its client shows."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "code": status}}
    return JSONResponse(content, status, headers)


class Gate:
    """ASGI middleware.

    The work for a client that hangs up is cancelled, streamed or not: FastAPI by itself would
    notice only while it sends.
    """

    def __init__(self, app: Any, key: str | None, local: bool) -> None:
        self._app, self._local = app, local
        self._bearer = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._local and not (hosts := _hosts(scope)) <= LOCAL:
            message = (
                f"`Host` must be 127.0.0.1 or localhost, got {min(hosts - LOCAL)!r:.80}: send "
                "that, or start the server with another --host"
            )
            await refusal(400, message)(scope, receive, send)
            return
        if not self._may_enter(scope):
            message = "the server's key must come as `Authorization: Bearer KEY`"
            await refusal(401, message)(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_body(receive), SLOWEST)
        except asyncio.TimeoutError:
            message = f"a request must be sent within {SLOWEST} seconds: send it again"
            await refusal(408, message)(scope, receive, send)
            return
        if body is None:
            message = f"a request must have at most {LARGEST} bytes: send a shorter text"
            await refusal(413, message)(scope, receive, send)
            return
        gone = asyncio.Event()
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_from_here() -> Any:
            for part in parts:
                return part
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            answer.cancel()

        freed: list[Callable[[], None]] = []
        _AT_END.set(freed)  # of this task; those that it starts have the same list
        answer = asyncio.ensure_future(self._app(scope, receive_from_here, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await answer
        except asyncio.CancelledError:
            answer.cancel()  # where it is we who are cancelled, at the end of the server
            if not gone.is_set():
                raise
        finally:
            watcher.cancel()
            for free in freed:
                free()

    def _may_enter(self, scope: Any) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._bearer is None or path in PUBLIC:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._bearer)


def _hosts(scope: Any) -> set[str]:
    """To whom a request was sent, without ports; {""} = it does not say."""
    given = [value for name, value in scope["headers"] if name == b"host"] or [b""]
    texts = [value.decode("latin-1").lower() for value in given]
    return {found[1] if (found := HOST.fullmatch(text)) else text for text in texts}


async def _body(receive: Any) -> bytes | None:
    """The whole body; None = it is too large."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST:
            return None
    return bytes(body)
