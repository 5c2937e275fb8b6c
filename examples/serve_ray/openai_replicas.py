"""The OpenAI-compatible server of examples/serve_openai on many replicas.

A client that sends its adapters' names, sorted, as the header x-session-id gets to the replica
where others with the same adapters are.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_openai.app import build
from serve_openai.models import Models

from .replicas import BY_SESSION


@serve.deployment(
    max_ongoing_requests=64,  # of a replica, all in one continuous batch
    max_queued_requests=128,  # of a proxy; it answers one more with a 503
    graceful_shutdown_timeout_s=60,  # for what a replica has still to answer when it is to go
    health_check_period_s=2,
    request_router_config=BY_SESSION,
)
@serve.ingress()
class OpenAI:
    """A replica, which answers whatever comes to it in one continuous batch."""

    def __init__(
        self, model: str, folders: Mapping[str, str], key: str | None, settings: Mapping[str, Any]
    ) -> None:
        self._models, self._key = Models(model, folders, **settings), key

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray calls it after the constructor."""
        return build(self._models, key=self._key)

    def check_health(self) -> None:
        """Ray starts another replica if this fails three times in a row."""
        if not self._models.engine.is_alive():
            raise RuntimeError("the engine's thread has ended")


def openai_replicas(
    model: str,
    folders: Mapping[str, str],
    count: int,
    gpus: float = 0,
    key: str | None = None,
    **settings: Any,
) -> serve.Application:
    """The server's replicas, for HTTP.

    Args:
        model: a folder, or a name on the hub.
        folders: name -> the folder of each adapter, which every replica can read.
        count: how many replicas.
        gpus: how many GPUs, or what share of one, a replica has for itself.
        key: whoever uses /v1/ must have it. None = nobody needs one.
        **settings: of serve_openai's Models: memory, cache_tokens, most_requests.
    """
    one = OpenAI.options(num_replicas=count, ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    return one.bind(model, dict(folders), key, settings)
