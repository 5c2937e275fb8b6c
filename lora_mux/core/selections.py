"""What users ask for by names: one entry for each row, made into a Routing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import ArgumentTypeError, RoutingError
from .arguments import check_number, check_numbers
from .routing import BASE, NONE, LastPass, Routing, unchecked_routing

# The entry of one row: nothing (None or "__base__"), one adapter, several, or several weighted.
Selection: TypeAlias = str | None | Sequence[str] | Mapping[str, float]


def selected_adapters(entry: object, argument: str) -> dict[str, float]:
    """Name -> weight of the adapters that one entry selects; empty for the base model.

    Raises:
        ArgumentTypeError: the entry, a name or a weight has the wrong type.
        RoutingError: a name appears twice, a weight is not finite in fp32, or "__base__" is one of
            several.
    """
    if entry is None or (isinstance(entry, str) and entry == BASE):
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if isinstance(entry, Mapping):
        return {
            _check_name(name, argument): check_number(weight, f"{argument}[{name!r}]")
            for name, weight in entry.items()
        }
    if isinstance(entry, Sequence) and not isinstance(entry, bytes):
        names = [_check_name(name, argument) for name in entry]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RoutingError(
                f"`{argument}` must name each adapter once, got {repeated[0]!r} "
                f"{names.count(repeated[0])} times; use a weight: {{{repeated[0]!r}: 2.0}}"
            )
        return dict.fromkeys(names, 1.0)
    raise ArgumentTypeError(
        f"`{argument}` must be None, a name, a sequence of names or a mapping name -> weight, "
        f"got {type(entry).__name__}"
    )


def weighted_adapters(
    adapter: Selection, weights: float | Sequence[float] | None
) -> dict[str, float]:
    """Name -> weight of the adapters that all rows are to select.

    Args:
        adapter: an entry; see `Selection`.
        weights: one number for each of its names, or one for all; None = those of the entry.

    Raises:
        RoutingError: weights are given twice, or do not fit the names.
    """
    chosen = selected_adapters(adapter, "adapter")
    if weights is None:
        return chosen
    if isinstance(adapter, Mapping):
        raise RoutingError(
            "`weights` must be None if `adapter` maps names to weights, got "
            f"{type(weights).__name__}"
        )
    return dict(zip(chosen, check_numbers(weights, len(chosen), "weights"), strict=True))


def routing_from_names(
    rows: Sequence[object],
    handles: Callable[[Sequence[str]], Mapping[str, int]],
    argument: str = "rows",
) -> Routing:
    """The routing with one row for each entry of `rows`.

    Args:
        rows: the entries; see `Selection`.
        handles: maps names to handles, and raises for a name that it does not know.
        argument: what error messages call `rows`.

    Examples:
        >>> handles = lambda names: {"a": 0, "b": 1}
        >>> routing_from_names([None, "a", {"a": 0.5, "b": 2.0}], handles).index.tolist()
        [[-1, -1], [0, -1], [0, 1]]
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise ArgumentTypeError(
            f"`{argument}` must be a sequence with one entry per sample, or an index tensor, "
            f"got {type(rows).__name__}; for the whole batch use set_adapter"
        )
    if rows and all(type(entry) is str for entry in rows):
        return _one_each(rows, handles)
    selections = [selected_adapters(entry, f"{argument}[{i}]") for i, entry in enumerate(rows)]
    handle_of = handles([name for chosen in selections for name in chosen])
    width = max([1, *map(len, selections)])
    index = [[handle_of[name] for name in s] + [NONE] * (width - len(s)) for s in selections]
    weight = [[*s.values()] + [0.0] * (width - len(s)) for s in selections]
    shape = (len(selections), width)
    # Everything was checked above. A tensor made by way of numpy takes half the time.
    return unchecked_routing(
        torch.from_numpy(np.array(index, np.int64).reshape(shape)),
        torch.from_numpy(np.array(weight, np.float32).reshape(shape)),
        LastPass(),
    )


def _one_each(
    names: Sequence[Any], handles: Callable[[Sequence[str]], Mapping[str, int]]
) -> Routing:
    """The routing of rows with one name each: what servers ask for, in a third of the time."""
    different = {*names} - {BASE}
    handle_of = {BASE: NONE, **handles([*different])}
    index = np.array([[handle_of[name]] for name in names], np.int64)
    weight = (index != NONE).astype(np.float32)
    return unchecked_routing(torch.from_numpy(index), torch.from_numpy(weight), LastPass())


def flattened(
    index: torch.Tensor,
    weights: torch.Tensor | None,
    others: Mapping[str, object],
    argument: str = "rows",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An index [samples, tokens, J] and its weights, with one row for each token.

    Args:
        index: the index.
        weights: of the index's shape; None = all 1.
        others: arguments that mean nothing beside such an index, by name: they must be None.
        argument: what error messages call the index.

    Raises:
        RoutingError: an argument is given, or the weights have another shape.
    """
    for name, value in others.items():
        if value is not None:
            raise RoutingError(
                f"`{name}` must be None if `{argument}` is [samples, tokens, J], which has a row "
                f"for each token of the batch, got {value!r}"
            )
    if weights is None:
        return index.flatten(0, 1), None
    if not isinstance(weights, torch.Tensor) or weights.shape != index.shape:
        is_tensor = isinstance(weights, torch.Tensor)
        got = list(weights.shape) if is_tensor else type(weights).__name__
        raise RoutingError(
            f"`weights` must be a tensor of the index's shape {list(index.shape)}, got {got}"
        )
    return index.flatten(0, 1), weights.flatten(0, 1)


def _check_name(name: object, argument: str) -> str:
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"`{argument}` must name adapters by str, got {type(name).__name__}"
        )
    if name == BASE:
        raise RoutingError(
            f'`{argument}` must name adapters, got "{BASE}" among others; it means the base model, '
            "and can only stand alone"
        )
    return name
