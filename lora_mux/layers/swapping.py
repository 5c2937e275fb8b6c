"""Making a layer of a model a MuxLinear in place, and a plain layer again."""

import torch

from ..routes import Place, Router
from .linear import MuxLinear, mux_class
from .targets import Target


def swap_in(target: Target, place: Place, router: Router, dtype: torch.dtype) -> MuxLinear:
    """Make a target a MuxLinear in place, by its class: names, keys and hooks stay."""
    linear = target.linear
    linear.__class__ = mux_class(type(linear))  # type: ignore[arg-type]
    assert isinstance(linear, MuxLinear)
    linear.mux_equip(target.shard, router.slots, router, router.settings, dtype)
    linear.mux_place = place
    router.anchor = router.anchor or linear.mux_pool
    return linear


def swap_out(layer: MuxLinear) -> None:
    """The linear layer as it was before swap_in."""
    patched = layer.mux_patched
    for name in [name for name in vars(layer) if name.startswith("mux_")]:
        del vars(layer)[name]
    del layer.mux_pool
    if patched is not None:
        vars(layer)["forward"] = patched
    layer.__class__ = type(layer).__bases__[1]
