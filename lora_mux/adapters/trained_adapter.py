"""The parameters of one adapter that is trained, as users and optimizers have them.

An optimizer steps parameters of its own, in fp32: with those of a 16-bit pool, AdamW at a learning
rate of 1e-4 leaves 6 % of the weights where they are.
"""

import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from ..checkpoints import saved_key
from ..core import LoraWeights, Masters, Stream, note_stream, wait_for
from ..errors import TrainingError

Self = TypeVar("Self", bound="TrainedAdapter")
# Parameter -> whose it is, for the optimizers' hook. No attribute of it, which pickles would hold.
_OWNERS: MutableMapping[Tensor, "weakref.ref[TrainedAdapter]"] = WeakIdKeyDictionary()


class TrainedAdapter(nn.Module):
    """The parameters of one adapter that is trained, under the keys of PEFT's files.

    `Mux.train` makes it. It is no part of the model. Its parameters lie where the layers' pools do:
    to(), half() and their kin leave them alone. In eval(), as in the model's, nothing is dropped.
    """

    def __init__(
        self,
        name: str,
        masters: Mapping[str, Masters],
        follow: Callable[["TrainedAdapter"], None] | None,
    ) -> None:
        super().__init__()
        self.mux_name, self.mux_masters, self.mux_follow = name, dict(masters), follow
        self.mux_steps = 0  # of optimizers; fused ones leave no other trace on a parameter
        self.mux_streams: dict[Stream, None] = {}  # on which the values were made and stepped
        self.mux_parameters = [p for one in masters.values() for p in one.parameters]
        owner = weakref.ref(self)
        for path, one in masters.items():
            for name in one.weights.tensors():
                _register(self, saved_key(path, name), getattr(one, name))
        for parameter in self.mux_parameters:
            _OWNERS[parameter] = owner
        self.mux_note_stream()

    def mux_note_stream(self) -> None:
        """Values were changed here: who reads them on another stream waits for this one."""
        note_stream(self.mux_streams, {parameter.device for parameter in self.mux_parameters})

    @property
    def mux_state(self) -> list[int]:
        """Another one whenever the values may be others."""
        return [parameter._version for parameter in self.mux_parameters] + [self.mux_steps]

    @property
    def weights(self) -> dict[str, LoraWeights]:
        """Path -> the factors as they are now, for the current streams; not copies."""
        wait_for(self.mux_streams)
        return {path: masters.weights for path, masters in self.mux_masters.items()}

    def train(self: Self, mode: bool = True) -> Self:
        """As of any module; in eval() nothing of x is dropped for this adapter."""
        super().train(mode)
        if self.mux_follow is not None:
            self.mux_follow(self)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module, but for `assign`: the parameters stay the ones that are trained.

        Raises:
            TrainingError: `assign` is True.
        """
        if assign:
            raise TrainingError(
                "`assign` must be False, got True, which would put tensors here that nobody "
                "trains; leave it out, and the values are copied"
            )
        return super().load_state_dict(state_dict, strict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mux_follow": None, "mux_streams": {}}  # a copy is nobody's

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    def extra_repr(self) -> str:
        """Name, and how many numbers are trained."""
        numbers = sum(parameter.numel() for parameter in self.mux_parameters)
        return f"{self.mux_name!r}, {numbers} numbers"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _register(root: nn.Module, key: str, parameter: nn.Parameter) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        inner = root._modules.get(folder)
        if inner is None:
            inner = root._modules[folder] = nn.Module()
        root = inner
    root.register_parameter(last, parameter)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before and after a step of any optimizer: note whose parameters it has.

    Before, because an interrupt may come between what a fused step has written and its end.
    """
    owners = {
        owner
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (owner := _OWNERS.get(parameter)) is not None
    }
    for owner in owners:
        if (trained := owner()) is not None:
            trained.mux_steps += 1
            trained.mux_note_stream()


_HOOKS: list[Any] = []  # ours, once there is one


def follow_optimizers() -> None:
    """From now on the steps of all optimizers are noted."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_stepped))
        _HOOKS.append(register_optimizer_step_post_hook(_stepped))
