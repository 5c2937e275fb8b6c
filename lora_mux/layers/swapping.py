"""Making a layer of a model a MuxLinear in place, and a plain layer again."""

import torch
from torch import nn

from ..routes import Place, Router
from .linear import MuxLinear, mux_class
from .sharding import Shard
from .targets import Target, features


def swap_in(target: Target, place: Place, router: Router, dtype: torch.dtype) -> MuxLinear:
    """Make a target a MuxLinear in place, by its class: names, keys and hooks stay."""
    linear = target.linear
    made: MuxLinear = object.__new__(mux_class(type(linear)))  # type: ignore[arg-type]
    # Another thread may be calling the layer: it is equipped as a twin with the same attributes,
    # before it changes. transformers' closure around a shard holds the layer itself.
    if not isinstance(target.kind, Shard):
        object.__setattr__(made, "__dict__", vars(linear))
    else:
        linear.__class__ = type(made)
        made = linear  # type: ignore[assignment]
    made.mux_equip(target, router.slots, router, router.settings, dtype)
    made.mux_place = place
    linear.__class__ = type(made)
    assert isinstance(linear, MuxLinear)
    return linear


def has_its_sizes(layer: nn.Module) -> bool:
    """Whether a MuxLinear is as large as when it was attached."""
    assert isinstance(layer, MuxLinear)
    pool, kind = layer.mux_pool, layer.mux_kind
    if isinstance(layer, nn.Embedding):
        return (layer.num_embeddings, layer.embedding_dim) == (pool.in_features, pool.out_features)
    return kind is not None or features(layer) == (pool.in_features, pool.out_features)


def swap_out(linear: nn.Module) -> None:
    """Make it the layer that it was before swap_in, also if an interrupt ended that half-way.

    In this order it computes what the plain layer does, wherever an interrupt comes.
    """
    own = vars(linear)
    patched = own.get("mux_patched")
    if patched is not None:
        own["forward"] = patched
    if isinstance(linear, MuxLinear):
        linear.__class__ = type(linear).__bases__[1]
    linear._modules.pop("mux_pool", None)
    for name in [name for name in own if name.startswith("mux_")]:
        del own[name]
