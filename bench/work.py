"""What a call does, without a clock: floating-point operations, bytes moved and allocated.

They are the same in every run, so they show a copy too many, or a product that grew, where times
would scatter.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


def moved_bytes(call: Callable[[], object]) -> int:
    """What the operators of a call read and write, caches left out."""
    with _Traffic() as traffic:
        call()
    return traffic.bytes


class _Traffic(TorchDispatchMode):
    """Counts each operator's tensors; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given, made = func._schema.name, _tensors((args, kwargs)), _tensors(out)
        known = {t.untyped_storage().data_ptr() for t in given}
        written = [
            t
            for t in made
            if func._schema.is_mutable or t.untyped_storage().data_ptr() not in known
        ]
        if "index_add" in name:  # reads the source, and reads and writes as many rows
            self.bytes += 3 * _bytes(given[-1:])
        elif name in ("aten::index_select", "aten::index"):
            self.bytes += 2 * _bytes(written)
        elif "zeros" in name:
            self.bytes += _bytes(written)
        elif written and "empty" not in name:
            self.bytes += _bytes(given) + _bytes(written)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
