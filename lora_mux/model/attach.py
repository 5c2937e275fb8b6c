"""attach(model) and attach_peft(peft_model), which make a Mux."""

from collections.abc import Sequence

from torch import nn

from .. import ops
from ..adapters import parse_size
from ..checkpoints import read_peft_model, retire_peft, without_peft
from ..errors import ArgumentTypeError, TargetError
from ..layers import MuxLinear, as_targets, find_heads, find_others, find_targets
from .mux import Mux
from .top import mux_of, unwrapped


def attach(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
    memory: int | str | None = None,
) -> Mux:
    """Let the rows of a model's batches choose their own adapters.

    The model changes in place: its targets become MuxLinears by a change of class. Parameters,
    module names, state_dict keys and hooks stay what they were, and `Mux.detach` gives the plain
    model back. Attach last, after quantising, sharding or moving the model.

    Args:
        model: any nn.Module. Of one in a wrapper of torch.compile or data parallelism, the model
            inside.
        targets: "all-linear" (every linear layer except the output head, as in PEFT; the head,
            the tokens' embedding and convolutions join when an adapter touches them; with `memory`,
            the head at once and the others not), a list of path suffixes
            (["q_proj", "v_proj"]), or a regular expression that matches whole paths.
        backend: "auto" (Triton on CUDA and ROCm, batched products on the CPU, the reference
            elsewhere), "triton" or "reference".
        batch_invariant: with Triton, compute what the adapters add to a row with the same bits,
            whatever batch the row comes in. Slower for many rows.
        fused: compute base and adapters in one launch; see `MuxLinear`.
        memory: how much memory the rank rows of all targets may take, in bytes or as a str like
            "2GiB". Adapters beyond it wait on the host. None: every loaded adapter stays on the
            device, and the pools grow.

    Returns:
        The Mux of the model.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        TargetError: nothing matches, or a match cannot carry adapters. Or the model is attached
            already, as a copy of an attached one is.
        BackendError: the backend does not exist, or cannot run here.
        AdapterError: memory is not a size.
        PoolCapacityError: memory is less than one rank row in each target.

    Examples:
        >>> import torch, lora_mux
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> mux = lora_mux.attach(model)
        >>> handle = mux.add_adapter("sql", {"1": (torch.ones(2, 8), torch.ones(4, 2))}, alpha=2)
        >>> x = torch.ones(2, 8)
        >>> base = model(x)
        >>> with mux.route(["sql", None]):
        ...     mixed = model(x)
        >>> torch.equal(mixed[0], base[0]), torch.equal(mixed[1], base[1])
        (False, True)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    settings = ops.Settings(backend, batch_invariant, fused)
    model = unwrapped(model)
    _check_plain(model)
    size = None if memory is None else parse_size(memory)
    found, heads = find_targets(model, targets), find_heads(model, targets)
    if size is not None:  # pools of a fixed size share it from the beginning
        return Mux(model, found | as_targets(model, heads), settings, size, heads=heads)
    return Mux(model, found, settings, None, heads | find_others(model, targets), heads)


def detach(model: nn.Module) -> None:
    """Give the plain model back: `Mux.of(model).detach()`, for whoever has only the model.

    Args:
        model: an attached model, or a copy of one.

    Raises:
        TargetError: the model is not attached.
        RoutingBusyError: a block is open or a pass is in progress, in any thread or task.
    """
    Mux.of(model).detach()


def attach_peft(
    peft_model: nn.Module,
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
) -> Mux:
    """Take over the adapters that PEFT has in memory.

    They are in a PeftModel, or in a model that transformers' `model.load_adapter` or diffusers'
    `pipe.load_lora_weights` put them into (for diffusers, give `pipe.transformer` or `pipe.unet`).
    PEFT's layers are taken out of the base model, and nothing is merged. The base model is attached
    where the adapters touch it. The active adapters are in force, with the scales that set_scale or
    set_adapters gave them as weights. Use `mux.model` from now on: the PeftModel passes calls on to
    it, and raises a TargetError for PEFT's own methods.

    DoRA is taken over as it is in force now, with its scale in the norms and a weight of 1. Weights
    and sums mean something else here than in PEFT, see docs/from_peft.md.

    Args:
        peft_model: a model whose adapters are LoRA or DoRA.
        backend: as in `attach`.
        batch_invariant: as in `attach`.
        fused: as in `attach`.

    Returns:
        The Mux of the base model.

    Raises:
        ArgumentTypeError: the model has no adapters of PEFT's.
        CheckpointError: an adapter is more than LoRA or DoRA, is merged, has no values, is in
            force in a part of its layers only, or is DoRA on top of other adapters.
        TargetError: a layer cannot carry adapters, or the adapters were taken over already.
        AdapterError: values are not finite in the layer's dtype, or DoRA needs a weight that cannot
            be read.
        BackendError: the backend does not exist, or cannot run here.
    """
    settings = ops.Settings(backend, batch_invariant, fused)
    if isinstance(peft_model, nn.Module):
        peft_model = unwrapped(peft_model)
    live = read_peft_model(peft_model)
    with without_peft(live):
        mux = Mux(live.base, live.targets, settings)
        try:
            mux._add(live.adapters, "peft_model", live.saved)
            mux.set_adapter(live.active)
        except BaseException:
            mux.detach()
            raise
    retire_peft(peft_model, live.base)
    return mux


def _check_plain(model: nn.Module) -> None:
    if mux_of(model) is not None:
        raise TargetError(
            "`model` must be plain, got one that is attached already, as copies of an attached "
            "model are; Mux.of(model) is its Mux, and detach(model) makes it plain"
        )
    for path, module in model.named_modules():
        if mux_of(module) is not None:
            raise TargetError(
                f"`model` must be plain, got one that holds an attached model, {path!r}; use that "
                "one's Mux, or detach it first"
            )
        if isinstance(module, MuxLinear):
            where = "belongs to an attached model around it, whose Mux serves it"
            if module.mux_router is None:
                where = "stands alone; put the plain layer into its place"
            raise TargetError(
                f"`model` must be plain, got one that holds a MuxLinear, {path!r}, which {where}"
            )
