"""What a call does, without a clock: floating-point operations, and bytes that it allocates.

The same in each run, so that a copy too many or a product that grew shows where times scatter.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _added_product(y: Any, a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
    """Of y += a b, by the shapes."""
    return 2 * prod(a) * b[-1]


# torch itself does not count these.
IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _added_product)


def work(call: Callable[[], object]) -> dict[str, int]:
    """Of one call on the CPU: "flops" of its products, "allocated_bytes" of all its tensors."""
    call()  # what is made once is not counted
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter:
        call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or ())
    return {"flops": counter.get_total_flops(), "allocated_bytes": allocated}
