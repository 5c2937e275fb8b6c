"""What operators take besides their own tensors, and how that is written in their signatures."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..core import RankRows
from ..errors import TrainingError


class How(NamedTuple):
    """The options of an operator."""

    max_rank: int  # at least every rank of the pool
    batch_invariant: bool = False
    triton: bool | None = None  # None = on CUDA
    fused: bool = True  # `linear` alone: in one launch, where that can be


class Trained(NamedTuple):
    """What is trained of a layer's adapters: nothing, or parameters whose gradients are wanted.

    Their values are those of the pool's rank rows: autograd follows the parameters, and nothing
    reads them. T adapters are trained in the model, and are numbered in the order of `trained`.
    """

    # A [r, K], B [N, r] and, where it has one, bias [N] of each adapter that this layer trains.
    parameters: list[Tensor] | None = None
    owners: list[int] | None = None  # of each parameter: the number of its adapter
    trained: Tensor | None = None  # [T] int32, the adapters' slots
    pair: Tensor | None = None  # [M * J] int32: see kernels/src/pairs.py
    start: Tensor | None = None  # [T + 1] int32

    @property
    def factors(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The number of each adapter that this layer trains, and its A, B and, if any, bias."""
        owned = zip(self.owners or (), self.parameters or (), strict=True)
        for number, found in groupby(owned, key=itemgetter(0)):
            yield number, [parameter for _, parameter in found]

    @property
    def ranks(self) -> list[tuple[int, int]]:
        """(number, rank rows) of each adapter that this layer trains; a bias is one more."""
        return [(number, A.shape[0] + len(bias)) for number, (A, _, *bias) in self.factors]

    @property
    def biases(self) -> list[int]:
        """1 for each that has a bias, else 0."""
        return [len(bias) for _, (_, _, *bias) in self.factors]

    def split(self, of_A: Tensor, of_B: Tensor) -> list[Tensor]:
        """`by_parameter` of all."""
        return by_parameter(of_A, of_B, self.ranks, self.biases, self.parameters or [])


def by_parameter(
    of_A: Tensor,
    of_B: Tensor,
    ranks: Sequence[tuple[int, int]],
    biases: Sequence[int],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The gradient of each parameter: views, laid out as the parameters are.

    Args:
        of_A: [R, K], of all rank rows.
        of_B: [R, N], likewise.
        ranks: (number, rank rows) of each adapter, a bias included.
        biases: 1 for each that has one, else 0.
        parameters: A, B and, if there is one, bias of each adapter.
    """
    rows = [n for (_, rank), b in zip(ranks, biases, strict=True) for n in (rank - b, *[1] * b)]
    parts: list[Tensor] = []
    # Two calls for all: a slice by itself takes 2 us.
    cut = of_A.split_with_sizes(rows), of_B.T.split_with_sizes(rows, 1)
    both = iter(zip(*cut, strict=True))
    for has_bias in biases:
        parts += next(both)
        if has_bias:
            parts.append(next(both)[1][:, 0])
    return [
        part if part.dtype == parameter.dtype else part.to(parameter.dtype)
        for part, parameter in zip(parts, parameters, strict=True)
    ]


def check_unchanged(parameters: Iterable[Tensor], versions: Sequence[int]) -> None:
    """Refuse a backward after the adapters that it trains were changed.

    Args:
        parameters: of the adapters.
        versions: `parameter._version` of each, at the forward pass.

    Raises:
        TrainingError: one of them is another now.
    """
    if [parameter._version for parameter in parameters] != list(versions):
        raise has_changed()


def refuse_second_derivatives() -> None:
    """Refuse a backward of adapters that are trained which autograd follows itself.

    Raises:
        TrainingError: it does.
    """
    if torch.is_grad_enabled():
        raise TrainingError(
            "`create_graph` must be False where adapters are trained, whose gradients have no "
            "gradients themselves, got True; freeze() the adapters for that pass"
        )


def has_changed() -> TrainingError:
    """What a backward raises whose adapters are others than at the forward pass."""
    return TrainingError(
        "the parameters of an adapter must be those of the forward pass when backward() runs, "
        "got changed ones, as after an optimizer's step or publish(); run backward() before "
        "the step, or the forward pass again"
    )


SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
    bool | None: "bool?",
    list[Tensor] | None: "Tensor[]?",
    list[int] | None: "int[]?",
}


def schema(fields: Any) -> str:
    """The fields of a NamedTuple class as arguments of an operator: "Tensor slots, ..."."""
    types = get_type_hints(fields, localns={"Tensor": Tensor})
    defaults = {name: f"={value}" for name, value in fields._field_defaults.items()}
    return ", ".join(
        f"{SCHEMA_TYPES[types[name]]} {name}{defaults.get(name, '')}" for name in fields._fields
    )


def row_by_row(rows: RankRows) -> RankRows:
    """The adapters with B's rank rows one after the other: a copy where B stands by columns."""
    B = rows.B_rows
    return rows if B.dim() == 2 else rows._replace(B_rows=B.transpose(1, 2).flatten(0, 1))


def transposed(rows: RankRows) -> RankRows:
    """The adapters from y to x: A and B in each other's place. A bias does not depend on x."""
    return rows._replace(A_rows=row_by_row(rows).B_rows, B_rows=rows.A_rows, constant=None)
