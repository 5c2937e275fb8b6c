"""attach(model) and attach_peft(peft_model): how a model comes by its Mux."""

from collections.abc import Sequence

from torch import nn

from .. import ops
from ..adapters import bytes_of
from ..checkpoints import read_live, unload
from ..errors import ArgumentTypeError, TargetError
from ..layers import MuxLinear, find_targets
from .mux import Mux


def attach(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
    memory: int | str | None = None,
) -> Mux:
    """Let the rows of a model's batches choose their own adapters; in place.

    The targets become MuxLinears by a change of class: parameters, module names, state_dict keys
    and hooks stay what they were, and detach() gives the plain model back. Attach last, after
    quantising or moving the model.

    Args:
        model: any nn.Module.
        targets: "all-linear" (every linear layer except the output head, as in PEFT), a list of
            path suffixes (["q_proj", "v_proj"]), or a regular expression for whole paths.
        backend: "auto" (Triton on CUDA and ROCm, batched products on the CPU, the reference
            elsewhere), "triton" or "reference".
        batch_invariant: with Triton, what the adapters add to a row has the same bits whatever
            batch the row comes in; costs speed for many rows.
        fused: base and adapters in one launch, as in `MuxLinear`.
        memory: how much the rank rows of all targets may take, in bytes or as "2GiB"; adapters
            beyond it wait on the host. None: all that is loaded stays, and the pools grow.

    Raises:
        TargetError: nothing matches, a match can not carry adapters, or the model has a Mux.
        BackendError: a backend that does not exist or cannot run.
        PoolCapacityError: memory for less than one rank row in each target.

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
    if any(isinstance(module, MuxLinear) for module in model.modules()):
        raise TargetError(
            "`model` must be plain, got one that is attached already; detach it first"
        )
    size = None if memory is None else bytes_of(memory)
    return Mux(model, find_targets(model, targets), settings, size)


def attach_peft(
    peft_model: nn.Module,
    *,
    backend: ops.Backend = "auto",
    batch_invariant: bool = False,
    fused: ops.Fused = "auto",
) -> Mux:
    """Take over what PEFT has in memory: a PeftModel, or adapters put into a plain model.

    The latter is what transformers' `model.load_adapter` makes of a model, and diffusers'
    `pipe.load_lora_weights` of `pipe.transformer` or `pipe.unet`, from any file that they read.
    PEFT's layers are taken out of the base model, which merges nothing, the base model is attached
    where its adapters touch it, and those that were active are in force. Use `mux.model` from now
    on, and no longer the PeftModel.

    Args:
        peft_model: a model whose adapters are LoRA on linear layers.
        backend: as in `attach`.
        batch_invariant: as in `attach`.
        fused: as in `attach`.

    Raises:
        ArgumentTypeError: a model without adapters of PEFT's.
        CheckpointError: an adapter that is more than plain LoRA, or that is merged.
        TargetError: a layer that can not carry adapters.
    """
    settings = ops.Settings(backend, batch_invariant, fused)
    live = read_live(peft_model)
    mux = Mux(unload(peft_model), live.targets, settings)
    for name, weights in live.adapters.items():
        mux._adapters.add(name, weights, "peft_model")
    mux.set_adapter(live.active)
    return mux
