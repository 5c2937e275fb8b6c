"""HTTP in front of the replicas: it sends each request to the replica that has its adapters."""

from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from lora_mux.errors import LoraMuxError, UnknownAdapterError

from .replicas import affinity

web = FastAPI()


class Request(BaseModel):
    """The body of a request; `Engine.question` says more of it."""

    model_config = ConfigDict(extra="forbid")
    text: str
    adapters: str = "__base__"
    tokens: int = 16
    stream: bool = False


def refusal(error: Exception) -> HTTPException:
    """What HTTP says of an error."""
    if isinstance(error, RayTaskError):  # whose text has the replica's traceback
        error = error.cause
    if isinstance(error, BackPressureError):
        return HTTPException(503, "too many requests wait; send it later", {"Retry-After": "1"})
    if isinstance(error, RayActorError):
        return HTTPException(503, "its replica died; send it again", {"Retry-After": "0"})
    if isinstance(error, UnknownAdapterError):
        return HTTPException(404, str(error))
    if isinstance(error, LoraMuxError | ValueError):
        return HTTPException(400, str(error))
    raise error


# More than what its handle lets pass, so that requests are refused there, and not kept here.
@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(web)
class Front:
    """The way in."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    @web.post("/generate")
    async def generate(self, request: Request) -> Response:
        """The answer as plain text, or as a stream of it."""
        asked = request.model_dump(exclude={"stream"})
        try:
            chosen = self._replicas.options(session_id=affinity(request.adapters))
            if not request.stream:
                return PlainTextResponse(await chosen.remote(asked))
            parts = aiter(chosen.options(stream=True).stream.remote(asked))
            first = await anext(parts, "")  # here errors have a status still
        except Exception as error:
            raise refusal(error) from error

        async def text() -> AsyncIterator[str]:
            yield first
            async for part in parts:
                yield part

        return StreamingResponse(text(), media_type="text/plain")
