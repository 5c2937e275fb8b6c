"""Replicas of a model on Ray Serve, whose requests say their adapters in the payload.

Not as Ray's multiplexed_model_id: by that, Ray splits a batch into one for each adapter.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from tokenizers.decoders import DecodeStream

import lora_mux

from .engine import Engine, Pieces, Question

BATCH = 16

# A session_id means a replica, as long as there is it and it is not full.
BY_SESSION = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    initial_backoff_s=0.005,  # of a request that waits for a free replica; Ray's own 25 ms are as
    max_backoff_s=0.02,  # long as a step of the model
)


def affinity(adapters: str) -> str:
    """The session_id of a request: those with the same adapters, whatever their weights, meet.

    Raises:
        RoutingError: the adapters are malformed.
    """
    return "+".join(sorted(lora_mux.parse_row(adapters))) or "__base__"


@serve.deployment(
    max_ongoing_requests=2 * BATCH,  # of a replica: a batch, and one that waits
    max_queued_requests=4 * BATCH,  # of a handle; one more is refused with a BackPressureError
    graceful_shutdown_timeout_s=30,  # for what a replica has still to answer when it is to go
    health_check_period_s=2,
    request_router_config=BY_SESSION,
)
class Mixed:
    """A replica. It answers one batch at a time, whatever adapters its requests have."""

    def __init__(
        self, model: str, adapters: str, memory: str | None = None, batch_wait: float = 0.03
    ) -> None:
        self._engine = Engine(model, adapters, memory)
        self._thread = ThreadPoolExecutor(1)  # the model's; the event loop stays free
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._failure: Exception | None = None
        self._batches = self._requests = self._running = 0
        self._idle = asyncio.Event()  # no batch is running
        self._idle.set()
        self._batch.set_batch_wait_timeout_s(batch_wait)

    async def __call__(self, request: Mapping[str, Any]) -> str:
        """The answer's text; `Engine.question` says what a request is, and its errors."""
        tokens = [token async for token in self._tokens(request)]
        return self._engine.tokenizer.decode(tokens, skip_special_tokens=True)

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[str]:
        """The answer's text as it comes."""
        text = DecodeStream(skip_special_tokens=True)
        async for token in self._tokens(request):
            # None where a character takes more tokens.
            if part := text.step(self._engine.tokenizer.backend_tokenizer, token):
                yield part

    async def stats(self) -> dict[str, Any]:
        """What this replica has loaded and answered."""
        return {
            "pid": os.getpid(),
            "adapters": [*self._engine.mux.adapters],
            "batches": self._batches,
            "requests": self._requests,
        }

    async def check_health(self) -> None:
        """Ray starts another replica if this fails three times in a row.

        It fails from a batch that ended with an error that nobody foresaw, as of a GPU, until a
        batch succeeds.
        """
        if self._failure is not None:
            raise RuntimeError(f"the last batch failed: {self._failure!r}")

    async def _tokens(self, request: Mapping[str, Any]) -> AsyncIterator[int]:
        question = self._engine.question(request)
        missing = question.row.keys() - self._engine.mux.adapters.keys()
        await asyncio.gather(*map(self._pulled, missing))
        # Ray would make a batch of what comes in each 30 ms, also while another one runs, and run
        # these small ones in turn: 35 requests/s in place of 63, of bench/serve_ray_load.py.
        await self._idle.wait()
        try:
            async for piece in self._batch(question):
                if isinstance(piece, Exception):
                    raise piece
                if piece is not None:
                    yield piece
        finally:
            question.gone.set()

    async def _pulled(self, name: str) -> None:
        """Wait for an adapter, which is loaded once for all who do."""
        if name not in self._pulls:
            pull = asyncio.create_task(asyncio.to_thread(self._engine.pull, name))
            pull.add_done_callback(lambda _: self._pulls.pop(name))
            self._pulls[name] = pull
        await asyncio.shield(self._pulls[name])  # a client that leaves takes it from nobody

    @serve.batch(max_batch_size=BATCH)
    async def _batch(self, questions: Sequence[Question]) -> AsyncIterator[list[Any]]:
        """At each step a list with the piece of each question, or None."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[Pieces | None]()

        def put(pieces: Pieces | None) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, pieces)

        self._batches += 1
        self._requests += len(questions)
        self._running += 1
        self._idle.clear()
        answered = loop.run_in_executor(self._thread, self._engine.answer, questions, put)
        answered.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (pieces := await steps.get()) is not None:
                yield [pieces.get(i) for i in range(len(questions))]
            await answered
            self._failure = None
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()


def replicas(
    model: str, adapters: str, count: int, gpus: float = 0, **settings: Any
) -> serve.Application:
    """Replicas of a model, for a handle.

    Args:
        model: a folder, or a name on the hub.
        adapters: the folder of PEFT folders, which every replica can read.
        count: how many replicas.
        gpus: how many GPUs, or what share of one, a replica has for itself.
        **settings: memory (as in lora_mux.attach) and batch_wait (seconds for which a batch waits
            for more requests; about as long as the answers of the last one take to their clients).
    """
    one = Mixed.options(num_replicas=count, ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    return one.bind(model, adapters, **settings)
