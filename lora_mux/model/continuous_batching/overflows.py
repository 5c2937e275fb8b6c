"""A request whose adapters overflow fails alone.

In sdpa and eager attention all requests of a batch are one product. A mask sets apart what belongs
to others, but 0 * NaN is NaN: one request's overflow would be in every answer of its batch. And a
NaN among the logits ends transformers' sampling, and with it the manager.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, LoraMuxError

# No key is larger. Products with larger ones exceed fp32 and bf16, and what is infinite is not
# hidden by a mask of the smallest finite number either.
LARGEST = 1e18


class Overflows:
    """Watches the batches of a manager's processor.

    Keys and values that overflow are not written, and the logits of their requests not drawn from.
    What is seen is read on the host where transformers reads the tokens.
    """

    def __init__(self, processor: Any, fail: Callable[[Any, LoraMuxError], None]) -> None:
        self._ios, self._fail = processor.inputs_and_outputs, fail
        self._watched = False
        self._fine: Tensor | None = None  # [tokens] of the batch that is computed
        self._seen: dict[int, tuple[Tensor | None, Tensor]] = {}  # of batches, by their place
        for owner, name, method in (
            (processor.cache, "update", self._update),
            (processor.model_runner, "_sample", self._sample),
            (self._ios, "prepare_batch_update", self._prepare_batch_update),
        ):
            # On the instance, from its class: a processor may be handed out again.
            setattr(owner, name, partial(method, getattr(type(owner), name).__get__(owner)))

    def begin(self, watched: bool) -> None:
        """A batch is computed next.

        Args:
            watched: whether one of its requests has adapters.
        """
        self._watched, self._fine = watched, None

    def _update(
        self,
        update: Callable[..., Any],
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """PagedAttentionCache.update, with keys and values [1, heads, tokens, size]."""
        both: tuple[Tensor, ...] = key_states, value_states
        host = getattr(self._ios, "io_pairs", None)
        batch = self._ios if host is None else host[self._ios.current_pair].host_io
        if self._watched and batch.attention_mask is not None:  # else it is flash attention's
            sizes = [x.abs().amax((0, 1, 3)) for x in both]
            fine = torch.maximum(*sizes) <= LARGEST  # False for NaN
            self._fine = fine if self._fine is None else self._fine & fine
            both = tuple(x.masked_fill(~fine[:, None], 0) for x in both)
        return update(*both, *args, **kwargs)

    def _sample(self, sample: Callable[..., Any], scores: Tensor, output_ids: Tensor) -> Any:
        """ModelRunner._sample, with scores [1, requests, vocabulary]."""
        if self._watched:
            fine = scores.amax(-1).isfinite()  # some are -inf where top_k or top_p cut them off
            self._seen[getattr(self._ios, "current_pair", 0)] = self._fine, fine[0]
            scores = scores.masked_fill(~fine[..., None], 0)
        return sample(scores, output_ids)

    def _prepare_batch_update(
        self, prepare: Callable[[], tuple[list[Any], list[int], list[float] | None]]
    ) -> tuple[list[Any], list[int], list[float] | None]:
        """Without the requests that fail."""
        batch, tokens, logprobs = prepare()  # which waits for the device
        seen = self._seen.pop(getattr(self._ios, "current_pair", 0), None)
        if seen is None:
            return batch, tokens, logprobs
        good, kept = [], []
        fine = _fine_requests(batch, *seen)
        place = 0
        for request, is_fine in zip(batch, fine, strict=True):
            if is_fine:
                good.append(request)
                kept += [place] * request.has_new_token
            elif request.state.error is None:  # it may have failed in the batch before
                self._fail(request.state, _overflow(request.state.request_id))
            place += request.has_new_token
        chosen = None if logprobs is None else [logprobs[i] for i in kept]
        return good, [tokens[i] for i in kept], chosen


def _fine_requests(batch: Sequence[Any], tokens: Tensor | None, logits: Tensor) -> list[bool]:
    """Which requests of a batch have numbers, by those of their tokens and of their logits."""
    of_tokens = None if tokens is None else iter(tokens.tolist())
    of_logits = iter(logits.tolist())
    fine = []
    for request in batch:
        own = [next(of_tokens) for _ in range(request.query_length)] if of_tokens else [True]
        own += [next(of_logits)] if request.has_new_token else []
        fine.append(all(own))
    return fine


def _overflow(name: str) -> InputError:
    return InputError(
        f"request {name!r} must have adapters whose sums are finite, got some that overflow; give "
        "them smaller weights, or remove the one that is broken"
    )
