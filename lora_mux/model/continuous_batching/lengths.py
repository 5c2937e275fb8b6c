"""How many tokens a request can have. One that has none, or too many, would end the manager."""

from collections.abc import Sequence
from typing import Any

from ...errors import InputError


def most_tokens(processor: Any) -> int | None:
    """How many tokens of one request the cache of a manager's processor can hold.

    Args:
        processor: of batches.

    Returns:
        None = any number: the model sees the last ones only.
    """
    cache = processor.cache
    for owner in (cache, processor.scheduler):  # the scheduler in 5.15
        if getattr(owner, "read_cache_limit", None) is not None:
            return None
    is_new = hasattr(cache, "max_tokens_read")  # 5.15 wants room for two more than there are
    most: int = cache.max_tokens_read if is_new else cache.num_pages - 2
    return most


def check_length(tokens: Sequence[Any], most: int | None) -> None:
    """Look at the tokens of a request.

    Args:
        tokens: of its prompt.
        most: as in `most_tokens`.

    Raises:
        InputError: there are none, or more than the cache can hold.
    """
    if not tokens:
        raise InputError(
            "`input_ids` must have at least one token, got none; begin with the tokenizer's "
            "bos_token_id"
        )
    if most is not None and len(tokens) > most:
        raise too_long(most, str(len(tokens)))


def too_long(most: int | None, got: str) -> InputError:
    """What a request is told whose tokens the cache cannot hold."""
    return InputError(
        f"a request must have at most {most} tokens with its answer, which is what the cache "
        f"holds, got {got}; give the manager more num_blocks, or this request fewer tokens"
    )
