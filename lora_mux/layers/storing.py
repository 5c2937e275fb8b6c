"""How an adapter gets into the pools of its layers: checked as a whole before anything changes."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..core import LoraWeights, Pool, Slots, check_number, slot_of
from ..errors import AdapterError, ArgumentTypeError, PoolCapacityError
from .kinds import Kind


def cut_and_check(
    pool: Pool, kind: Kind | None, weights: LoraWeights, argument: str
) -> LoraWeights:
    """The factors that a pool is to hold, in its dtype and on its device.

    Args:
        kind: what the layer is; None = a whole linear layer.
        weights: the factors as they are given.
        argument: what error messages call them.

    Raises:
        AdapterError: shapes or values do not fit the layer.
        ArgumentTypeError: a factor is not a floating tensor.
    """
    return pool.check(_cut(kind, weights, argument), argument)


def cut_and_check_shapes(
    pool: Pool, kind: Kind | None, weights: LoraWeights, argument: str
) -> LoraWeights:
    """As `cut_and_check`, for factors that have shapes but no values yet."""
    cut = _cut(kind, weights, argument)
    pool.check_fit(cut, argument)
    return cut


def _cut(kind: Kind | None, weights: LoraWeights, argument: str) -> LoraWeights:
    are_tensors = isinstance(weights.A, Tensor) and isinstance(weights.B, Tensor)
    if kind is not None and are_tensors:  # the pool refuses anything else
        return kind.cut(weights, argument)
    return weights


def write(slots: Slots, handle: int, parts: Iterable[tuple[Pool, LoraWeights | None]]) -> None:
    """Write checked factors to their pools, under a handle that is not live yet."""
    for pool, weights in parts:
        pool.write(slot_of(handle), weights, slots.capacity)


def check_room(slots: Slots, pool: Pool, weights: LoraWeights, argument: str) -> None:
    """Refuse to move a pool that a CUDA graph reads: the graph would go on reading the old one."""
    if slots.captured and not pool.fits(weights, slots.next_slot()):
        raise PoolCapacityError(
            f"`{argument}` must fit into the pool, which cannot grow because a captured CUDA "
            f"graph reads it, got rank {weights.A.shape[0]} beside {len(slots.handles)} adapters "
            f"in {pool.A_rows.shape[0]} rank rows (largest rank {pool.max_rank}, "
            f"{pool.rank.shape[0]} slots); reserve() more before capturing"
        )


def check_reservation(slots: Slots, adapters: object, rank: object) -> None:
    """Refuse arguments that reserve() cannot serve."""
    for name, value in (("adapters", adapters), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"`{name}` must be an int, got {type(value).__name__}")
        if value < 1:
            raise AdapterError(f"`{name}` must be at least 1, got {value}")
    if slots.captured:
        raise PoolCapacityError(
            "the pool cannot grow because a captured CUDA graph reads it; call reserve() before "
            "capturing"
        )


def scaling_from(alpha: object, scaling: object, A: object) -> float:
    """alpha / r for A [r, in_features], or scaling itself: exactly one of them must be given."""
    if (alpha is None) == (scaling is None):
        raise AdapterError(
            f"give exactly one of `alpha` (scaling = alpha / r) and `scaling`, "
            f"got alpha={alpha!r}, scaling={scaling!r}"
        )
    if alpha is None:
        return check_number(scaling, "scaling", AdapterError)
    # The pool will refuse an A that has no rank rows, or that is no matrix or kernel at all.
    rank = A.shape[0] if isinstance(A, Tensor) and A.ndim > 1 and len(A) else 1
    return check_number(alpha, "alpha", AdapterError) / rank


def weights_from_pairs(
    pairs: object, alpha: object, scaling: object, argument: str
) -> dict[str, LoraWeights]:
    """Path -> factors, from a user's mapping path -> (A, B).

    Raises:
        ArgumentTypeError: it is no mapping, or its values are no pairs.
        AdapterError: alpha and scaling are both given, or neither is.
    """
    if not isinstance(pairs, Mapping):
        raise ArgumentTypeError(
            f"`{argument}` must map target paths to (A, B), got {type(pairs).__name__}"
        )
    weights = {}
    for path, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ArgumentTypeError(
                f"`{argument}[{path!r}]` must be a pair (A, B), got {type(pair).__name__}"
            )
        A, B = pair
        weights[path] = LoraWeights(A, B, scaling_from(alpha, scaling, A))
    return weights
