"""transformers' continuous batching, in which each request has its own adapters and sampling."""

import asyncio
import copy
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerationState,
    _StreamError,
    build_response_parser,
)

import lora_mux

from .gate import at_end
from .stops import UntilStop

PAGE = 32  # tokens; what a request has of the cache is rounded up to it
USUAL_ANSWER = 1024  # tokens, where a request does not say
COLDEST = 1e-4  # below it temperatures count as 0: logits / 1e-38 is infinite, and ends the engine


@dataclass
class Order:
    """What the engine is told of a request, where transformers has a GenerationConfig."""

    row: dict[str, float]
    sampling: dict[str, float | int]
    eos_token_id: int | list[int] | None
    max_new_tokens: int | None  # None = as is usual, as far as there is room
    stops: Sequence[str] = ()
    parsed: bool = False  # whether the answer is taken apart, as into thoughts and text


def sampling(
    usual: GenerationConfig,
    vocabulary: int,
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> dict[str, float | int]:
    """How the tokens of one request are drawn.

    What was left out is as the model's generation_config has it. That one alone says whether the
    answer is greedy where all three were left out.
    """
    left_out = temperature is None and top_p is None and top_k is None
    if temperature is not None and temperature < COLDEST or left_out and not usual.do_sample:
        return {"temperature": 1.0, "top_k": 1, "top_p": 0.0}  # one token, also of equal ones
    return {
        "temperature": float(temperature or usual.temperature or 1.0),
        "top_p": float(top_p or usual.top_p or 1.0),
        # A larger one indexes past the vocabulary, and ends the engine.
        "top_k": min(top_k or usual.top_k or vocabulary, vocabulary),
    }


def _note_end(order: Order, output: Any) -> None:
    """An answer that its own last token ends was not cut, also at the last token of all."""
    ends = order.eos_token_id
    if output.is_finished() and output.generated_tokens:
        if output.generated_tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            order.max_new_tokens = None


class Engine(CBGenerateManager):
    """The requests that are being answered.

    Both ways of generating replace transformers' own: these register a request's callback before
    its first token can come, name requests themselves (clients choose x-request-id, and two may
    choose the same), forget what was cancelled, and refuse what would end the worker for all.
    """

    def __init__(self, mux: lora_mux.Mux, cache_tokens: int, most_requests: int) -> None:
        config = ContinuousBatchingConfig(
            allow_block_sharing=False,  # blocks that other adapters computed
            use_cuda_graph=False,  # it would keep the adapters of its first requests
            per_request_processors=True,
            num_blocks=-(-cache_tokens // PAGE),
            page_size=PAGE,
        )
        super().__init__(config)
        self._most_requests = most_requests
        positions = getattr(mux.model.config.get_text_config(), "max_position_embeddings", None)
        self._longest = min(positions or cache_tokens, cache_tokens)

    def init_cb(self, model: Any, gen_config: GenerationConfig) -> None:
        """Start, before the first request; each request calls it again."""
        if self._cb is None:
            # With what requests may choose for themselves. Left alone, the first request would say
            # for all others how tokens are drawn.
            shared = copy.deepcopy(gen_config)
            shared.update(do_sample=True, temperature=0.9, top_k=50, top_p=0.9, use_cache=False)
            super().init_cb(model, shared)
            status = self._cb.background_thread_status
            while self._cb.batch_processor is None and status.fatal_error is None:
                time.sleep(0.01)
            if status.fatal_error is not None:  # such as no memory for the cache
                raise status.fatal_error

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Order,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], CBStreamer]:
        name, texts = uuid.uuid4().hex, UntilStop(gen_config.stops)
        streamer = self._streamer(name, processor, texts, response_parser)

        def on_output(output: Any) -> None:
            if texts.stopped:  # this one was on its way
                return
            _note_end(gen_config, output)
            streamer.put(output)
            if texts.stopped:
                self._stop(name, gen_config, output)
            elif output.error is not None:
                # transformers puts it between quotes without escaping it.
                plain = " ".join(output.error.split()).replace('"', "'").replace("\\", "/")
                texts.put_nowait(_StreamError(plain))
            elif output.is_finished():
                streamer.end()

        self._add(name, inputs["input_ids"], gen_config, on_output, streaming=True)
        at_end(lambda: self._end(name))
        return texts, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Order,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        name, ids = uuid.uuid4().hex, inputs["input_ids"]
        done = asyncio.get_running_loop().create_future()
        taken_apart = gen_config.stops and gen_config.parsed
        parser = build_response_parser(processor, model, ids) if taken_apart else None
        texts = UntilStop(gen_config.stops)  # nobody reads them: they tell where to stop
        streamer = self._streamer(name, processor, texts, parser)

        def on_output(output: Any) -> None:
            _note_end(gen_config, output)
            if gen_config.stops and not texts.stopped:
                streamer.put(output)
                if texts.stopped:
                    self._stop(name, gen_config, output)
            if (texts.stopped or output.is_finished()) and not done.done():
                done.set_result(output)

        self._add(name, ids, gen_config, on_output, streaming=bool(gen_config.stops))
        try:
            output = await done
        except asyncio.CancelledError:  # the client hung up
            self.cancel_request(name)
            raise
        if output.error is not None:
            self._check_alive(name)
            if not self._cb.is_running():
                raise CBWorkerDeadError("the server is stopping")
            raise HTTPException(400, f"the answer broke off: {output.error}")  # of it alone
        text = processor.decode(output.generated_tokens, skip_special_tokens=True)
        return text, len(ids), output.generated_tokens

    def _streamer(
        self, name: str, processor: Any, texts: asyncio.Queue[Any], parser: Any
    ) -> CBStreamer:
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        return CBStreamer(self, name, tokenizer, asyncio.get_running_loop(), texts, parser)

    def _add(
        self,
        name: str,
        ids: list[int],
        order: Order,
        on_output: Callable[[Any], None],
        *,
        streaming: bool,
    ) -> None:
        """Hand a request to the worker.

        Raises:
            HTTPException: 400, it is longer than the cache or the model; 503, there are too many.
            LoraMuxError: its adapters are not loaded, or can never fit into `memory`.
            CBWorkerDeadError: the worker has stopped.
        """
        self._check_alive(name)
        if len(self._cb.output_router.result_handlers) >= self._most_requests:
            raise HTTPException(503, f"{self._most_requests} requests are in progress: try later")
        if order.max_new_tokens is None:
            order.max_new_tokens = max(1, min(USUAL_ANSWER, self._longest - len(ids)))
        # Left alone, it would end the worker, and all answers with it.
        if not ids or len(ids) + order.max_new_tokens > self._longest:
            raise HTTPException(
                400,
                f"a prompt must have a token, and with its answer at most {self._longest}, got "
                f"{len(ids)} and {order.max_new_tokens}; shorten it, or ask for fewer",
            )
        self._cb.register_result_handler(name, on_output)
        try:
            added = self._cb.add_request(
                ids,
                name,
                max_new_tokens=order.max_new_tokens,
                streaming=streaming,
                eos_token_id=order.eos_token_id,
                adapter_names=order.row,
                **order.sampling,
            )
            if added is None:
                raise CBWorkerDeadError("the server is stopping")
        except BaseException:
            self._forget(name)
            raise

    def cancel_request(self, name: str) -> None:
        """Free a request: its place in the batch, its cache, its adapters. CBStreamer calls it."""
        self._cb.cancel_request(name)
        self._forget(name)

    def _stop(self, name: str, order: Order, output: Any) -> None:
        """End an answer where its text does: with its own reason, also at the last token of all."""
        order.max_new_tokens = None
        if not output.is_finished():
            self.cancel_request(name)

    def _end(self, name: str) -> None:
        if name in self._cb.output_router.result_handlers:  # its last output is not there yet
            self.cancel_request(name)

    def _forget(self, name: str) -> None:
        """A cancelled request has no last output, with which transformers would forget it."""
        router = self._cb.output_router
        router.result_handlers.pop(name, None)
        try:
            while True:  # what came for earlier ones; nobody reads this queue
                router.output_queue.get_nowait()
        except queue.Empty:
            pass

    def stop(self) -> None:
        """End the worker now; who was to be answered has been, or has waited long enough."""
        if self._cb is not None and self._cb.is_running():
            self._cb.stop(block=True, timeout=10, hard_stop=True)


class State(GenerationState):
    """transformers' state of generation, which has one engine for all requests."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=True)
        self._cb_manager = engine

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """The fallback would answer everybody as the base model; models.py has refused others."""
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> Engine:
        return self._cb_manager
