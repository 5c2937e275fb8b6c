"""What a manager of transformers' continuous batching has answered."""

from typing import Any


def collected(manager: Any, count: int) -> dict[str, list[int]]:
    results: dict[str, list[int]] = {}
    while len(results) < count:
        result = manager.get_result(timeout=20)
        assert result is not None and result.error is None, result
        results[result.request_id] = result.generated_tokens
    return results
