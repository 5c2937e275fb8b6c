"""What happens at the model's top: a pass begins with its rows, and ends."""

import functools
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..core import BUFFERS, TABLES
from ..errors import RoutingError, TargetError
from ..routes import Router
from .given_rows import KEYWORD, GivenRows

# Names of parameters and buffers that DistributedDataParallel is to leave as they are.
POOL, IGNORED = "mux_pool", "_ddp_params_and_buffers_to_ignore"
_UNTRACED: dict[Callable[..., None], Callable[..., None]] = {}


class BeginPass:
    """Forward pre-hook of the model. By the hook one finds the model's Mux."""

    def __init__(self, mux: GivenRows) -> None:
        self.mux = mux

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        router, rows = self.mux._router, kwargs.get(KEYWORD)
        if torch.compiler.is_compiling():
            if rows is not None:
                raise RoutingError(
                    f"`{KEYWORD}` must be None where a whole model is compiled, got rows, which no "
                    "graph can have as inputs; call the model inside `with mux.route(rows)`"
                )
            router.begin_traced(args, kwargs)
        else:
            _untraced(_begin)(self.mux, args, kwargs, sys._getframe(1))
        if KEYWORD not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


class EndPass:
    """Forward hook of the model."""

    def __init__(self, mux: GivenRows) -> None:
        self.mux = mux

    def __call__(self, model: nn.Module, args: Any, output: object) -> None:
        router = self.mux._router
        # In a pass it is not the model that is traced, but this hook alone.
        if torch.compiler.is_compiling() and not router.view.cell.in_pass:
            router.end_traced()
        else:
            _untraced(Router.end)(router, output)


def _begin(
    mux: GivenRows, args: tuple[Any, ...], kwargs: dict[str, Any], caller: FrameType
) -> None:
    rows = kwargs.get(KEYWORD)
    given = None if rows is None else functools.partial(mux._give, rows)
    mux._router.begin(args, kwargs, caller, given)
    # After the pass has begun, because its end comes also when these raise.
    mux._check_in_place()
    _refuse_broadcasts(mux)


def _refuse_broadcasts(mux: GivenRows) -> None:
    """Refuse a pass after another process's pools were copied over those of this one."""
    ddp, anchor = nn.parallel.DistributedDataParallel._active_ddp_module, mux._router.anchor
    if anchor is None:
        return
    copied = False
    if ddp is not None and ddp.broadcast_buffers:
        copied = any(map(_is_of_pool, ddp.named_module_buffers))
    if copied:  # which leaves no trace in a pass, and must do so for later ones
        torch.autograd.graph.increment_version(anchor.rank)
    if copied or anchor.is_overwritten:
        raise TargetError(
            "the adapters of this process must be its own, got them overwritten by another's, as "
            "by DistributedDataParallel around a module that holds the attached model; wrap the "
            "attached model itself, or let `_ddp_params_and_buffers_to_ignore` of that module be "
            '[n for n, _ in module.named_buffers() if "mux_pool" in n] before it is wrapped; '
            "then attach anew"
        )


def _untraced(function: Callable[..., None]) -> Callable[..., None]:
    """A function that torch.compile leaves alone, with all that it calls.

    Where it has given up a model, as after a refusal inside it, it tries the functions that are
    called there, and would compile these for each list of rows.
    """
    # Not by a decorator, which would import a compiler for everybody.
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _UNTRACED:
        _UNTRACED[function] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return _UNTRACED[function]


def mux_of(model: nn.Module) -> GivenRows | None:
    """The Mux that a model is attached by; None for a plain model."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, BeginPass):
            return hook.mux
    return None


def remove_hooks(model: nn.Module, mux: GivenRows) -> None:
    """Take a Mux's hooks off its model, as many as there are."""
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, BeginPass | EndPass) and hook.mux is mux:
                # First, wherever an interrupt hits: without its mark a hook is called wrongly.
                del hooks[number]
                model._forward_hooks_always_called.pop(number, None)
                model._forward_pre_hooks_with_kwargs.pop(number, None)


def keep_from_broadcasts(model: nn.Module, paths: Iterable[str]) -> None:
    """Let each process of DistributedDataParallel have adapters of its own.

    It copies all buffers from the first process to the others, when it is made and at each pass.
    There, rows would silently have adapters that they have not named.
    """
    own = [f"{path}.{POOL}.{n}".lstrip(".") for path in paths for n in (*BUFFERS, *TABLES)]
    compiled = [f"_orig_mod.{name}" for name in own]  # inside what torch.compile returns
    setattr(model, IGNORED, {*getattr(model, IGNORED, ()), *own, *compiled})


def allow_broadcasts(model: nn.Module) -> None:
    """Undo `keep_from_broadcasts`, also if an interrupt ended that."""
    others = {name for name in getattr(model, IGNORED, ()) if not _is_of_pool(name)}
    if others:
        setattr(model, IGNORED, others)
    else:
        vars(model).pop(IGNORED, None)


def _is_of_pool(name: str) -> bool:
    return f".{POOL}." in f".{name}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and data parallelism put around it."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inside = "module" if isinstance(model, parallel) else "_orig_mod"  # of torch.compile
    inner = model._modules.get(inside)
    return model if inner is None else unwrapped(inner)
