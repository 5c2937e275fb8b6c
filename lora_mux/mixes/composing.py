"""A row of adapters as one PEFT folder, for engines that take one adapter per request.

Concatenated rank rows add up: with A = [A_1; A_2] and B = [w_1 s_1 B_1, w_2 s_2 B_2]

    B A x = w_1 s_1 B_1 (A_1 x) + w_2 s_2 B_2 (A_2 x)

so that one adapter of rank r_1 + r_2 is exactly their weighted sum.
"""

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checkpoints import read_peft_folder, write_peft_folder
from ..core import LoraWeights, Selection, selected_adapters
from ..errors import (
    AdapterError,
    ArgumentTypeError,
    CheckpointError,
    UnknownAdapterError,
    short,
    warn,
)
from .row_text import parse_row


def compose(
    folders: Mapping[str, str | PathLike[str]],
    row: Selection,
    folder: str | PathLike[str],
    *,
    base_model: str | None = None,
) -> Path:
    """Write the weighted sum of adapters as one adapter, a folder that PEFT and engines read.

    Its rank is the sum of theirs, the same in all layers, and its scaling is 1. Its factors are in
    fp32, or fp64 if one of theirs is; in these the sum is exact, and B is rounded once. Where an
    adapter has a lower rank in a layer than elsewhere, or none, zeros fill the rest up, because not
    all engines know a rank_pattern. Adapters of weight 0 take no rank.

    Args:
        folders: name -> a local PEFT folder; more than the row's are not looked at.
        row: an entry of `rows` in `Mux.route`, or a text that `parse_row` reads.
        folder: where to write. Its checkpoint, if it has one, is replaced as a whole.
        base_model: the name or the path of the base, for whoever loads the folder by itself.

    Returns:
        The folder.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        RoutingError: the row is malformed.
        UnknownAdapterError: a name in the row is not in `folders`.
        AdapterError: nothing is left of the row, or adapters disagree about a layer's shape.
        CheckpointError: a folder cannot be read, is one that the row names, or cannot be written;
            or it holds more than LoRA on linear layers, which has no such sum: DoRA, saved modules,
            embeddings, convolutions. Or it holds copies of the base's weights, as PEFT saves them
            beside LoRA on a head: without the model nobody can tell whether they are equal to its.
            Saved with save_embedding_layers=False it can be composed.
    """
    chosen = parse_row(row) if isinstance(row, str) else selected_adapters(row, "row")
    weights = {name: weight for name, weight in chosen.items() if weight}
    if not isinstance(folders, Mapping):
        raise ArgumentTypeError(
            f"`folders` must map names to folders, got {type(folders).__name__}"
        )
    for name in chosen:
        if name not in folders:
            raise UnknownAdapterError(
                f"`folders` must have every adapter of the row, got none for {short(name)}"
            )
    if not weights:
        raise AdapterError(
            f"`row` must select an adapter with a weight other than 0, got {short(row)}, which is "
            "the base model; ask the engine for that one by its own name"
        )
    paths = {"folder": folder, **{f"folders[{short(name)}]": folders[name] for name in chosen}}
    for argument, path in paths.items():
        if not isinstance(path, str | PathLike):
            raise ArgumentTypeError(f"`{argument}` must be a path, got {type(path).__name__}")
    for name in chosen:
        if _is_same(folders[name], folder):
            raise CheckpointError(
                f"`folder` must be none of those that the row names, got that of {short(name)}; "
                "write to another"
            )
    parts = {name: _factors(name, folders[name]) for name in weights}
    layers = dict.fromkeys(path for part in parts.values() for path in part)
    ranks = {name: max(p.A.shape[0] for p in part.values()) for name, part in parts.items()}
    composed = {path: _sum(path, parts, weights, ranks) for path in layers}
    return write_peft_folder(folder, composed, base_model=base_model)


def _is_same(one: str | PathLike[str], other: str | PathLike[str]) -> bool:
    return os.path.exists(other) and os.path.exists(one) and os.path.samefile(one, other)


def _factors(name: str, folder: str | PathLike[str]) -> dict[str, LoraWeights]:
    """Path -> the factors of an adapter, which may be summed."""
    try:
        stored = read_peft_folder(folder)
    except CheckpointError as error:
        if ".base_layer." not in str(error):  # which names the key
            raise
        raise CheckpointError(
            f"adapter {short(name)} must hold no copy of the base's weights to be composed, since "
            "without the model nobody can tell whether it is equal to them; save the adapter with "
            f"save_embedding_layers=False, or serve it with lora_mux ({error})"
        ) from None
    for remark in stored.outline.remarks:
        warn(f"adapter {short(name)}: {stored.source} {remark}")
    for path, keys in stored.outline.keys.items():
        is_kernel = len(stored.outline.places[keys["A"]].shape) > 2
        if is_kernel or "embedding" in keys["A"]:
            raise CheckpointError(
                f"{stored.source} must hold LoRA on linear layers to be composed, got that of "
                f"{'a convolution' if is_kernel else 'an embedding'} at {short(path)}; serve this "
                "adapter with lora_mux, which needs no such folder"
            )
    return stored.weights(stored.read(False))


def _sum(
    path: str,
    parts: Mapping[str, Mapping[str, LoraWeights]],
    weights: Mapping[str, float],
    ranks: Mapping[str, int],
) -> LoraWeights:
    """One layer's factors, in which each adapter has the same rank rows as in every other layer."""
    those = {name: part[path] for name, part in parts.items() if path in part}
    (first, one), *_ = those.items()
    K, N = one.A.shape[1], one.B.shape[0]
    dtype = torch.float32
    for name, part in those.items():
        if (part.A.shape[1], part.B.shape[0]) != (K, N):
            raise AdapterError(
                f"`row` must have adapters of one base model, got {short(first)} with "
                f"{K} -> {N} features at {short(path)}, and {short(name)} with "
                f"{part.A.shape[1]} -> {part.B.shape[0]}"
            )
        for tensor in part.tensors().values():
            dtype = torch.promote_types(dtype, tensor.dtype)
    A, B, bias = [], [], None
    for name, rank in ranks.items():
        part = those.get(name) or LoraWeights(torch.zeros(0, K), torch.zeros(N, 0), 0.0)
        strength, missing = weights[name] * part.scaling, rank - part.A.shape[0]
        A.append(pad(part.A.to(dtype), (0, 0, 0, missing)))
        B.append(pad(part.B.to(dtype) * strength, (0, missing)))
        if part.bias is not None:
            bias = _added(bias, part.bias.to(dtype) * strength)
    return LoraWeights(torch.cat(A), torch.cat(B, 1), 1.0, bias)


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
