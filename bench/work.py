"""What a call does, without a clock: floating-point operations, and bytes that it allocates.

Both are the same in every run, so they show a copy too many, or a product that grew, where times
would scatter.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """What one call does."""

    flops: int  # of its products
    allocated_bytes: int  # of all its tensors


def _added_product(y: Any, a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
    """FLOPs of y += a b, from the shapes."""
    return 2 * prod(a) * b[-1]


# torch does not count these itself.
IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _added_product)


def work(call: Callable[[], object]) -> Work:
    """The work of one call on the CPU."""
    call()  # not counted: it may make what later calls find
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter:
        call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or ())
    return Work(counter.get_total_flops(), allocated)
