"""What comes into a layer's pool: checked whole before anything changes."""

from collections.abc import Iterable

from torch import Tensor

from ..core import LoraWeights, Pool, Slots, number, slot_of
from ..errors import AdapterError, ArgumentTypeError, PoolCapacityError
from .sharding import Shard


def checked(pool: Pool, shard: Shard | None, weights: LoraWeights, argument: str) -> LoraWeights:
    """What a pool is to hold of an adapter's factors, or an error that names them."""
    return pool.check(_cut(shard, weights, argument), argument)


def check_fit(pool: Pool, shard: Shard | None, weights: LoraWeights, argument: str) -> LoraWeights:
    """The same of factors without values, of which the shapes are checked."""
    cut = _cut(shard, weights, argument)
    pool.check_fit(cut, argument)
    return cut


def _cut(shard: Shard | None, weights: LoraWeights, argument: str) -> LoraWeights:
    tensors = isinstance(weights.A, Tensor) and isinstance(weights.B, Tensor)
    if shard is not None and tensors:  # else the pool says what they should be
        return shard.cut(weights, argument)
    return weights


def store(slots: Slots, parts: Iterable[tuple[Pool, LoraWeights | None]]) -> int:
    """Write checked parts to their pools under a new handle, which has no name yet."""
    handle = slots.allot()
    try:
        write(slots, handle, parts)
    except BaseException:
        slots.free(handle)
        raise
    return handle


def write(slots: Slots, handle: int, parts: Iterable[tuple[Pool, LoraWeights | None]]) -> None:
    """Write checked parts to their pools, then wake the handle; a failure leaves nothing behind."""
    written = []
    try:
        for pool, weights in parts:
            written.append(pool)
            pool.write(slot_of(handle), weights, slots.capacity)
        slots.wake(handle)
    except BaseException:
        for pool in written:
            pool.erase(slot_of(handle))
        raise


def check_room(slots: Slots, pool: Pool, weights: LoraWeights, argument: str) -> None:
    """Refuse to move a pool that a CUDA graph reads: the graph would go on reading the old one."""
    if slots.captured and not pool.fits(weights, slots.next_slot()):
        raise PoolCapacityError(
            f"`{argument}` must fit into the pool, which can not grow because a captured CUDA "
            f"graph reads it, got rank {weights.A.shape[0]} beside {len(slots.handles)} adapters "
            f"in {pool.A_rows.shape[0]} rank rows (largest rank {pool.max_rank}, "
            f"{pool.rank.shape[0]} slots); reserve() more before capturing"
        )


def check_reservation(slots: Slots, adapters: object, rank: object) -> None:
    """Refuse what reserve() can not do."""
    for name, value in (("adapters", adapters), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"`{name}` must be an int, got {type(value).__name__}")
        if value < 1:
            raise AdapterError(f"`{name}` must be at least 1, got {value}")
    if slots.captured:
        raise PoolCapacityError("reserve() comes before capturing: a CUDA graph reads this pool")


def scaling_from(alpha: object, scaling: object, A: object) -> float:
    """alpha / r for A [r, in_features], or scaling itself: exactly one must be given."""
    if (alpha is None) == (scaling is None):
        raise AdapterError(
            f"give exactly one of `alpha` (scaling = alpha / r) and `scaling`, "
            f"got alpha={alpha!r}, scaling={scaling!r}"
        )
    if alpha is None:
        return number(scaling, "scaling", AdapterError)
    # An A without rank rows, or that is no matrix at all, is the pool's to refuse.
    rank = A.shape[0] if isinstance(A, Tensor) and A.ndim == 2 and len(A) else 1
    return number(alpha, "alpha", AdapterError) / rank
