"""Batches for the weight gradient, with their answers in fp64 and their error budgets.

Used by the interpreter's tests, by the fake driver's and by the GPU's.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_mux.kernels.config import GradientConfig
from lora_mux.kernels.pairs import Pairs, pairs_of
from problem import NAN

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = GradientConfig(
    group=2, block_p=16, block_c=32, split=2, warps=4, stages=2, registers=None
)  # several steps, splits and blocks of columns in few rows


@dataclass
class Batch:
    """u, v and gain of rows that select adapters, some of which are trained.

    All that the gradient has no business with is NaN: rows of others, places that name no adapter
    or name it again, and rank rows past the rank.
    """

    slots: Tensor  # [M, J]
    ranks: Sequence[int]  # of every slot
    trained: Sequence[int]  # slots, the numbers of which are 0, 1, ...
    columns: int = 40
    parts: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    u: Tensor = field(init=False)
    v: Tensor = field(init=False)
    gain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)
        self.slots = self.slots.int()
        (M, J), R = self.slots.shape, -(-max(self.ranks) // 16) * 16
        self.u = torch.full((M, J, R, self.parts), NAN)
        self.v = torch.full((M, self.columns), NAN, dtype=self.dtype)
        self.gain = torch.full((M, J), NAN)
        for m, j, rank in self.first_places(self.trained):
            self.u[m, j, :rank] = torch.randn(rank, self.parts, generator=make)
            self.v[m] = torch.randn(self.columns, generator=make)
            self.gain[m, j] = torch.randn((), generator=make)

    def first_places(self, of: Sequence[int]) -> list[tuple[int, int, int]]:
        """(row, place, rank) of each adapter in each row."""
        rows = enumerate(self.slots.tolist())
        return [(m, row.index(s), self.ranks[s]) for m, row in rows for s in {*row} & {*of}]

    def rows_of(self, slot: int) -> Tensor:
        return (self.slots == slot).any(1)

    def of_rows(self, rows: Tensor | list[int], trained: Sequence[int]) -> "Batch":
        """Some of the rows, in this order, and what is trained of them."""
        part = dataclasses.replace(self, slots=self.slots[rows], trained=trained)
        part.u, part.v, part.gain = self.u[rows], self.v[rows], self.gain[rows]
        return part

    def to(self, device: str) -> "Batch":
        """A copy on a device."""
        moved = copy.copy(self)
        for name in ("slots", "u", "v", "gain"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    @property
    def numbered(self) -> list[tuple[int, int]]:
        return [(number, self.ranks[slot]) for number, slot in enumerate(self.trained)]

    @property
    def pairs(self) -> Pairs:
        trained = torch.tensor(self.trained, dtype=torch.int32, device=self.slots.device)
        return pairs_of(self.slots, trained, len(self.ranks))

    def run(self, config: GradientConfig | None = SMALL, **options: Any) -> Tensor:
        """What the launcher returns."""
        from lora_mux.kernels import launch_gradient

        ranks = options.pop("ranks", self.numbered)
        given = self.u, self.v, options.pop("gain", self.gain), self.pairs
        return launch_gradient.weight_gradient(*given, ranks, config=config, **options)

    def truth(self) -> tuple[Tensor, Tensor]:
        """(the gradient in fp64, the sum of the absolute values of its terms)."""
        u, v = self.u.double().sum(3) * self.gain.double()[:, :, None], self.v.double()
        found = [torch.zeros(2, 0, self.columns, dtype=torch.float64)]
        for slot in self.trained:
            total = torch.zeros(2, self.ranks[slot], self.columns, dtype=torch.float64)
            for m, j, rank in self.first_places([slot]):
                term = torch.outer(u[m, j, :rank], v[m])
                total += torch.stack([term, term.abs()])
            found.append(total)
        both = torch.cat(found, 1)
        return both[0], both[1]

    def check(self, got: Tensor) -> None:
        """Every element within its own bound: sums in fp32, and what u loses as two numbers."""
        want, size = self.truth()
        unit = torch.finfo(self.dtype).eps / 2
        half = self.dtype != torch.float32
        most = (len(self.slots) + self.parts + 2) * 2**-24 + (4 * unit**2 if half else 0.0)
        # Numbers below fp16's normal ones lose more of what is left of u.
        budget = most * size + 1e-7 * half * size.clamp(min=1)
        error = (got.double() - want).abs()
        assert got.shape == want.shape and got.dtype == torch.float32
        assert got.isfinite().all() and (error <= budget).all(), (error / budget).max()

    def split_by_adapter(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split([rank for _, rank in self.numbered])


def drawn(seed: int, **fixed: Any) -> tuple[Batch, GradientConfig]:
    """A batch of mixed ranks, rows that select nothing and others' adapters, and a config."""
    make = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=make))]

    M, J = pick(1, 17, 64, 150), pick(1, 2, 4)
    slots = torch.randint(-1, 6, (M, J), generator=make)
    slots[torch.rand(M, generator=make) < 0.15] = -1
    trained = torch.randperm(6, generator=make)[: pick(1, 2, 4, 6)].tolist()
    if seed % 3 == 0:
        slots[slots == trained[0]] = -1  # it is not in the batch
    others = {"columns": pick(16, 33, 48, 130), "parts": pick(1, 2), "dtype": pick(*DTYPES)}
    ranks = [pick(1, 4, 7, 8, 16, 24, 40) for _ in range(6)]
    batch = Batch(slots, ranks, **{"trained": trained, "seed": seed, **others, **fixed})
    config = dataclasses.replace(SMALL, split=pick(1, 2, 4), group=pick(1, 2, 4), block_c=64)
    return batch, config
