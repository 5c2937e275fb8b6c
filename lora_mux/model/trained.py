"""The adapters of an attached model that are trained, in the batches that others are served by."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..adapters import TrainedAdapter
from ..checkpoints import copy_to_host, write_peft_folder
from ..configs import initial_factors, new_strengths
from ..core import LoraWeights, Routing, check_number, host_may_read, to_device
from ..errors import AdapterError, ArgumentTypeError, RoutingError, TrainingError
from ..layers import find_heads, weights_from_pairs
from .loaded import LoadedAdapters


class TrainedAdapters(LoadedAdapters):
    """What a Mux does with adapters that learn."""

    def create(
        self,
        name: str,
        *,
        r: int,
        alpha: float,
        targets: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        use_rslora: bool = False,
        seed: int | None = None,
    ) -> int:
        """A new adapter that changes nothing yet, to be trained: A as PEFT draws it, and B = 0.

        Args:
            name: any new str other than `"__base__"`.
            r: its rank.
            alpha: scaling = alpha / r, or alpha / sqrt(r) with use_rslora.
            targets: of the linear layers that carry adapters here; PEFT's target_modules. None =
                all that `attach` was told; with "all-linear", in either place, the output head is
                none of them.
            dropout: see `train`.
            rank_pattern: other ranks, as PEFT has them.
            alpha_pattern: other alphas, likewise.
            use_rslora: as PEFT has it.
            seed: of the draw. None = of torch's own generator.

        Returns:
            The adapter's handle.

        Raises:
            AdapterError: the name is taken, or a value does not fit the model.
            ArgumentTypeError: a value has the wrong type.
            PoolCapacityError: there is no room for the adapter.
        """
        model = self._check_attached()
        self._slots.check_new(name)
        rate = _rate(dropout)
        heads = self._heads if targets is None else find_heads(model, targets)
        linear = [p for p, la in self._layers.items() if la.mux_kind is None and p not in heads]
        strengths = new_strengths(
            linear,
            r=r,
            alpha=alpha,
            targets=targets,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            use_rslora=use_rslora,
        )
        generator = _generator(seed)
        factors = {}
        for path, (rank, scaling) in strengths.items():
            pool = self._layers[path].mux_pool
            sizes = pool.in_features, pool.out_features
            factors[path] = LoraWeights(*initial_factors(*sizes, rank, generator), scaling)
        stored = replace(copy_to_host(f"create({name!r})", factors, False), dropout=rate)
        return self._publish({name: lambda: self._prepare(stored)})[name]

    def train(
        self,
        name: str,
        *,
        weights: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        dropout: float | None = None,
    ) -> TrainedAdapter:
        """Begin to train an adapter: from now on, passes whose rows name it have its gradients.

        Its parameters are fp32, whatever the model's dtype is, and belong to the returned module,
        not to the model. What an optimizer changes of them is in force from the next forward pass
        on, for training and for serving. Rows of all adapters may be in one batch.

        Args:
            name: of a loaded adapter of LoRA on linear layers.
            weights: the values to begin with, as for `add_adapter`, of the same targets and ranks.
                None: those that it was loaded from.
            dropout: how large a share of x is dropped before A, as PEFT's lora_dropout, while the
                model and the module are in train(); from 0 to below 1. None: what `create` was
                told, or the checkpoint's own, else 0. Adapters in one row need the same.

        Returns:
            The module, whose parameters and state_dict() have the keys of PEFT's files. Another
            call returns it again, with another dropout if one is given.

        Raises:
            UnknownAdapterError: the name is not loaded.
            TrainingError: the adapter is more than LoRA on linear layers; or its exact values are
                not known, see `weights`; or weights are given for one that is trained already.
            AdapterError: weights or dropout do not fit.
            PoolCapacityError: the adapter does not fit beside those in use.
        """
        self._check_attached()
        rate = None if dropout is None else _rate(dropout)
        self._slots.lookup([name])  # which raises
        if weights is not None and name in self.trained:
            raise TrainingError(
                f"`weights` must be None for {name!r}, which is trained already, got others; give "
                "load_state_dict() of the module the values, or freeze() the adapter first"
            )
        if weights is None:
            begin = self._adapters.values(name)
        else:
            begin = self._from_pairs(name, weights)
        trained = self._adapters.train(name, begin, rate)
        trained.mux_steps += weights is not None  # the pools do not have these values
        return trained

    def _from_pairs(
        self, name: str, weights: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, LoraWeights]:
        """Values of a user's, of an adapter's own shapes and with its scalings."""
        own = self._adapters.outline(name)
        given = weights_from_pairs(weights, None, 1.0, "weights")
        if own.keys() != given.keys():
            (path, *_) = sorted(own.keys() ^ given.keys())
            raise AdapterError(
                f"`weights` must have the targets of {name!r}, got {path!r} in one of them alone"
            )
        for path, part in given.items():
            A, B = own[path].A, own[path].B
            part.check_shapes(A.shape[1], B.shape[0], f"weights[{path!r}]")
            if part.A.shape != A.shape or own[path].bias is not None:
                raise AdapterError(
                    f"`weights[{path!r}]` must have rank {A.shape[0]}"
                    f"{' and a bias' if own[path].bias is not None else ''}, as {name!r} has, got "
                    f"rank {part.A.shape[0]}; load the adapter again in place of giving weights"
                )
            part.check_values(part.A.dtype, f"weights[{path!r}]")
        return {p: LoraWeights(w.A, w.B, own[p].scaling) for p, w in given.items()}

    def save(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        base_model: str | None = None,
        task_type: str | None = None,
    ) -> Path:
        """Write an adapter as a checkpoint folder of PEFT's, as it is now, trained or not.

        Args:
            name: of a loaded adapter of LoRA on linear layers.
            folder: where; it need not exist. Another checkpoint there is replaced as a whole.
            base_model: what the config calls the base. None = the model's `name_or_path`, if any.
            task_type: for the config, as "CAUSAL_LM".

        Returns:
            The folder.

        Raises:
            UnknownAdapterError: the name is not loaded.
            TrainingError: the adapter is more than LoRA on linear layers, or the model's dtype has
                rounded it and nobody has the exact values.
            CheckpointError: the folder cannot be written, or values are not finite. What was there
                is there still.
        """
        model = self._check_attached()
        values = self._adapters.values(name)
        dropout = self._adapters.training.dropouts.get(self._slots.lookup([name])[name], 0.0)
        own = getattr(model, "name_or_path", None) or None
        return write_peft_folder(
            *(folder, values),
            base_model=own if base_model is None else base_model,
            dropout=dropout,
            task_type=task_type,
            modules=[path for path, _ in model.named_modules()],
        )

    def publish(self, name: str) -> None:
        """Let passes have the present values of an adapter that is trained.

        Every forward pass does so for what an optimizer has stepped, or what was changed in place.
        This is for changes that leave no trace, as of `parameter.data`.

        Raises:
            UnknownAdapterError: the name is not loaded.
            TrainingError: it is not trained.
        """
        self._check_attached()
        self._adapters.training.of(name).mux_steps += 1
        self._adapters.training.publish([self._slots.lookup([name])[name]])

    def freeze(self, name: str) -> None:
        """End the training of an adapter, which goes on being served with what it has learnt.

        Its parameters belong to nobody afterwards. `remove`, and a `load` that replaces it, end the
        training as well.

        Raises:
            UnknownAdapterError: the name is not loaded.
            TrainingError: it is not trained, or has values that are not finite.
        """
        self._check_attached()
        self._adapters.training.check_finite(name)
        self._adapters.freeze(name)

    @property
    def trained(self) -> Mapping[str, TrainedAdapter]:
        """The adapters that are trained: name -> what `train` returned."""
        return {one.mux_name: one for one in self._adapters.training.all}

    def reduce_gradients(self, group: Any = None) -> None:
        """Give the gradients of adapters that are trained to all processes of data parallelism.

        Of each adapter it is the mean over those processes that have one other than 0, so that an
        adapter that a single batch has named is not made smaller by the others. One that none has
        named has None. Call it after backward(), in all processes, which train the same adapters.

        Args:
            group: of torch.distributed; None = all processes.

        Raises:
            TrainingError: the processes train different adapters.
        """
        self._check_attached()
        import torch.distributed as dist

        trained = sorted(self._adapters.training.all, key=lambda one: one.mux_name)
        # Not that of a parameter: a process that trains nothing must not let the others wait.
        device = next(iter(self._layers.values())).mux_pool.A_rows.device
        names = repr([(one.mux_name, [p.shape for p in _learning(one)]) for one in trained])
        known = int.from_bytes(hashlib.sha256(names.encode()).digest()[:7], "big")
        extremes = torch.tensor([known, -known], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
        if extremes.tolist() != [known, -known]:
            raise TrainingError(
                "all processes must train adapters of the same names and shapes, got "
                f"{[one.mux_name for one in trained]} here and others elsewhere"
            )
        if not trained:
            return
        # Not whether there is a gradient: a compiled pass has 0 for whom it did not name.
        named = torch.stack([_flat_gradient(one).any() for one in trained]).long()
        has = [p.grad is not None for one in trained for p in _learning(one)]
        counts = torch.cat([named, torch.tensor(has, device=device).long()])
        dist.all_reduce(counts, group=group)
        found: list[int] = counts.tolist()
        anywhere = iter(found[len(trained) :])
        for one, count in zip(trained, found[: len(trained)], strict=True):
            learning = {p: next(anywhere) > 0 for p in _learning(one)}
            if not count:
                one.zero_grad(set_to_none=True)
                continue
            flat = _flat_gradient(one)
            dist.all_reduce(flat, group=group)
            parts = torch.split(flat / count, [p.numel() for p in learning])
            for (parameter, some), part in zip(learning.items(), parts, strict=True):
                if some and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view(parameter.shape))


def _learning(trained: TrainedAdapter) -> list[Parameter]:
    """Its parameters but for those that a user holds still, which get no gradients."""
    return [p for p in trained.mux_parameters if p.requires_grad]


def _flat_gradient(trained: TrainedAdapter) -> Tensor:
    """The gradients of its parameters, one after the other; 0 where there is none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in _learning(trained)]
    none = trained.mux_parameters[0].new_zeros(0)
    return torch.cat([none, *(gradient.flatten() for gradient in found)])


def _generator(seed: object) -> torch.Generator:
    if seed is None:
        return torch.default_generator
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ArgumentTypeError(f"`seed` must be an int from 0 to 2**64 - 1, got {seed!r:.80}")
    return torch.Generator().manual_seed(seed)


def _rate(dropout: object) -> float:
    rate = check_number(dropout, "dropout", AdapterError)
    if not 0 <= rate < 1:
        raise AdapterError(f"`dropout` must be from 0 to below 1, got {rate}")
    return rate


def mean_by_adapter(losses: Tensor, routing: Routing, *, mask: Tensor | None = None) -> Tensor:
    """The sum of each adapter's own mean loss, so that it learns as it would alone.

        sum over sets of adapters s of  mean of losses[m] over the rows m that select s

    One mean over the whole batch gives each adapter its share of the rows. Rows that select no
    adapter do not count.

    Args:
        losses: [rows, ...], as of cross_entropy(..., reduction="none").
        routing: of the batch: what `with mux.route(rows) as routing` gives.
        mask: bool, of the shape of losses: those that count. None = all.

    Returns:
        A scalar. A loss that is not finite reaches the gradients of its own adapters alone.

    Raises:
        RoutingError: losses have another number of rows than the routing, or the mask another shape
            or dtype.

    Examples:
        >>> import torch, lora_mux
        >>> routing = lora_mux.Routing(torch.tensor([[0], [0], [1], [-1]]))
        >>> lora_mux.mean_by_adapter(torch.tensor([1.0, 3.0, 5.0, 9.0]), routing)
        tensor(7.)
    """
    if not isinstance(losses, Tensor) or losses.ndim == 0 or len(losses) != routing.rows:
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise RoutingError(
            f"`losses` must be a tensor [{routing.rows}, ...], with a row for each of the "
            f"routing's, got {got}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != losses.shape):
        raise RoutingError(
            f"`mask` must be bool of the losses' shape {list(losses.shape)}, got {mask.dtype} of "
            f"{list(mask.shape)}; attention_mask[:, 1:].bool() is one for the losses of all tokens "
            "but the first"
        )
    index = routing.index.sort(1).values
    again = index[:, 1:] == index[:, :-1]  # an adapter that a row names twice is one
    index = torch.cat([index[:, :1], index[:, 1:].masked_fill(again, -1)], 1).sort(1).values
    sets, of_row = torch.unique(index, dim=0, return_inverse=True)
    found = (sets >= 0).any(1), of_row
    if host_may_read(sets):  # an ordinary copy would let the host wait for all passes so far
        counts_set, of_row = to_device(found, losses.device)
    else:
        counts_set, of_row = (tensor.to(losses.device) for tensor in found)
    counted = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    counted = counted & counts_set[of_row].view(-1, *[1] * (losses.ndim - 1))
    numbers = counted.flatten(1).sum(1) if losses.ndim > 1 else counted.long()
    total = numbers.new_zeros(len(sets)).index_add(0, of_row, numbers).clamp(min=1)
    share = (1 / total[of_row]).view(-1, *[1] * (losses.ndim - 1))
    mean: Tensor = (torch.where(counted, losses, 0.0) * share).sum()
    return mean
