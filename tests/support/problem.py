"""A batch for the kernels, as the launchers see it, with its answer in fp64 and its error budget.

Used by the interpreter's tests, by the fake driver's, by the GPU's and by the benchmark's gate.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SLOTS = 1 << 16
NAN = float("nan")


@dataclass
class Problem:
    """x [rows, K], y [rows, N] and a pool of adapters of the given ranks (0 = not in this layer).

    Rank rows that belong to no adapter hold NaN, so that reading them shows. `select` makes the
    index of slots [rows, J], -1 = none; by default drawn from everything.
    """

    rows: int = 7
    K: int = 33
    N: int = 41
    ranks: Sequence[int] = (1, 5, 24, 0, 17)
    J: int = 3
    dtype: torch.dtype = torch.float32
    select: Callable[["Problem"], Tensor] | None = None
    weighted: bool = True
    biased: Sequence[int] = ()  # slots whose last rank row is constant
    by_columns: int = 0  # B stands by columns, in blocks of as many rank rows, one for each slot
    seed: int = 0
    device: str = "cpu"

    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    index: Tensor = field(init=False)
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        S, gaps = len(self.ranks), 2
        C = sum(self.ranks) + gaps * S + 1
        if self.by_columns:
            C = self.by_columns * S
        self.A_rows = torch.full((C, -(-self.K // 16) * 16), NAN)
        self.B_rows = torch.full((C, -(-self.N // 16) * 16), NAN)
        self.constant = torch.zeros(C, dtype=torch.bool)
        self.rank = torch.tensor(list(self.ranks) or [0], dtype=torch.int32)
        self.offset = torch.zeros_like(self.rank)
        self.scaling = torch.rand(max(S, 1), generator=make) + 0.5
        start = 1
        for slot, rank in enumerate(self.ranks):
            if self.by_columns:  # see Pool on what must be finite
                start = slot * self.by_columns
                self.B_rows[start : start + -(-rank // 8) * 8] = 7.0
            self.offset[slot] = start
            rows = slice(start, start + rank)
            self.A_rows[rows] = 0
            self.B_rows[rows] = 0
            self.A_rows[rows, : self.K] = randn(rank, self.K) / self.K**0.5
            self.B_rows[rows, : self.N] = randn(rank, self.N) / max(rank, 1) ** 0.5
            if slot in self.biased:
                self.A_rows[start + rank - 1] = 0
                self.constant[start + rank - 1] = True
            start += rank + gaps
        self.A_rows, self.B_rows = self.A_rows.to(self.dtype), self.B_rows.to(self.dtype)
        self.x = randn(self.rows, self.K).to(self.dtype)
        self.y = randn(self.rows, self.N).to(self.dtype)
        if self.select is not None:
            slots = self.select(self)
        else:
            slots = torch.randint(-1, S, (self.rows, self.J), generator=make)
        self.J = slots.shape[1]
        # Handles with a generation, so that none is its slot by chance.
        self.live = torch.full((SLOTS,), -1, dtype=torch.int32)
        self.live[:S] = torch.arange(S, dtype=torch.int32) + (torch.arange(S) % 5 << 16)
        handles = torch.cat([self.live[:S].to(torch.int64), torch.tensor([-1])])
        self.index = handles[slots]
        self.weight = randn(self.rows, self.J) if self.weighted else torch.ones(slots.shape)
        self.to(self.device)

    def to(self, device: str) -> None:
        """Move all tensors to a device."""
        self.device = device
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    @property
    def pool(self) -> Any:
        """A Pool, in the order of the operators' arguments."""
        from lora_mux.kernels.tensors import Pool

        pool = Pool(*(getattr(self, name) for name in Pool._fields))
        if not self.by_columns:
            return pool
        blocks = pool.B_rows[:, : self.N].view(-1, self.by_columns, self.N)
        return pool._replace(B_rows=blocks.transpose(1, 2).contiguous())

    def plan(self, block_m: int) -> Any:
        """The Plan, by its launcher."""
        from lora_mux.kernels import launch

        return launch.plan(self.index, self.weight, self.live, len(self.rank), block_m)

    def choose(self, block_m: int | None = None, batch_invariant: bool = False) -> Any:
        """The Config for shrink and expand."""
        from lora_mux.kernels import config, launch

        return config.choose(
            rows=self.rows,
            in_features=self.K,
            out_features=self.N,
            itemsize=launch.product_itemsize(self.x, self.y, self.A_rows),
            architecture=launch.architecture(self.x.device),
            block_m=block_m,
            batch_invariant=batch_invariant,
        )

    def run(
        self, block_m: int | None = None, batch_invariant: bool = False, **replaced: Any
    ) -> Tensor:
        """y with the adapters, by the launchers; `replaced` are fields of the config."""
        from lora_mux.kernels import launch

        chosen = dataclasses.replace(self.choose(block_m, batch_invariant), **replaced)
        plan, y = self.plan(chosen.block_m), self.y.clone()
        h = self.x.new_empty(launch.h_shape(plan, self.max_rank, chosen), dtype=torch.float32)
        if y.numel() and self.J:
            launch.shrink(self.x, h, plan, self.pool, chosen)
            launch.expand(h, y, plan, self.pool, chosen)
        return y

    def base(self) -> tuple[Tensor, Tensor]:
        """y without adapters in fp64, and the sum of the absolute values of its terms."""
        return self.y.double().clone(), self.y.double().abs()

    def truth(self) -> tuple[Tensor, Tensor]:
        """(y in fp64, the sum of the absolute values of all terms that it is made of)."""
        y, size = self.base()
        slots = self.index.clone()
        slots[slots >= 0] &= SLOTS - 1
        for m, row in enumerate(slots.tolist()):
            for j, slot in enumerate(row):
                if slot < 0 or not self.ranks[slot]:
                    continue
                start = int(self.offset[slot])
                rows = slice(start, start + self.ranks[slot])
                A, B = self.A_rows[rows, : self.K].double(), self.B_rows[rows, : self.N].double()
                x, constant = self.x[m].double(), self.constant[rows]
                factor = float(self.weight[m, j]) * float(self.scaling[slot])
                h = torch.where(constant, 1.0, A @ x)
                y[m] += factor * (h @ B)
                size[m] += abs(factor) * (torch.where(constant, 1.0, A.abs() @ x.abs()) @ B.abs())
        return y, size

    def check(self, got: Tensor) -> None:
        """Every element within its own bound of the truth.

        One rounding of the exact value (half an ulp), sums of K + R products in fp32, and for
        16-bit types what h loses as two numbers of that type: the square of its rounding unit.
        """
        y, size = self.truth()
        unit = torch.finfo(self.dtype).eps / 2
        half = self.dtype != torch.float32
        sums = (self.K + sum(self.ranks)) * 2**-23
        budget = unit * y.abs() + (sums + (4 * unit**2 if half else 0.0)) * size + 1e-7 * half
        worst = ((got.double() - y).abs() / budget.clamp(min=1e-30)).nan_to_num(1e9)
        assert got.shape == y.shape and got.dtype == self.dtype
        assert not worst.numel() or worst.max() <= 1, f"{worst.max():.2f} of the budget"
        self.check_beside(got)

    def check_beside(self, got: Tensor) -> None:
        """What must hold besides the values."""
        untouched = (self.index < 0).all(1) if self.J else torch.ones_like(self.index.sum(1) > 0)
        assert torch.equal(got[untouched], self.y[untouched]), "a base row changed"


@dataclass
class FusedProblem(Problem):
    """A batch of few rows for the fused kernel, which computes the base layer as well."""

    bias: bool = True
    W: Tensor = field(init=False)
    b: Tensor | None = field(init=False)
    counters: Tensor = field(init=False)  # after the last run

    def __post_init__(self) -> None:
        super().__post_init__()
        make = torch.Generator().manual_seed(self.seed + 1)
        W = torch.randn(self.N, self.K, generator=make) / self.K**0.5
        self.W = W.to(self.device, self.dtype)
        b = torch.randn(self.N, generator=make).to(self.device, self.dtype)
        self.b = b if self.bias else None

    def base(self) -> tuple[Tensor, Tensor]:
        x, W = self.x.double(), self.W.double()
        b = x.new_zeros(self.N) if self.b is None else self.b.double()
        return x @ W.T + b, x.abs() @ W.abs().T + b.abs()

    def prepared(self, **replaced: Any) -> Callable[[], Tensor]:
        """A launch on the current stream that returns y; all of its calls share one plan."""
        from lora_mux.kernels import config, launch

        device = self.x.device
        chosen = config.choose_fused(self.rows, self.N, launch.architecture(device), self.J)
        chosen = dataclasses.replace(chosen, **replaced)
        plan = self.plan(chosen.block_m)
        self.counters = plan.counters

        def launched() -> Tensor:
            stream = launch.stream_number(device)
            assert stream is not None
            arguments = self.x, self.W, self.b, plan, self.pool, self.max_rank, stream
            return launch.linear(*arguments, chosen)

        return launched

    def run(self, times: int = 1, **replaced: Any) -> Tensor:
        """y by the launchers, `times` times over on the same plan."""
        launched = self.prepared(**replaced)
        ys = [launched() for _ in range(times)]
        for y in ys[1:]:
            torch.testing.assert_close(y, ys[0], rtol=0, atol=0, equal_nan=True)
        return ys[0]

    def check_beside(self, got: Tensor) -> None:
        assert not self.counters.any(), "the next launch would not wait"


def each(slots: list[list[int]]) -> Any:
    return lambda problem: torch.tensor(slots)


def zipf(problem: Problem) -> Tensor:
    chance = torch.arange(1, len(problem.ranks) + 1).float() ** -1.5
    make = torch.Generator().manual_seed(3)
    return torch.multinomial(chance, problem.rows * 2, True, generator=make).reshape(-1, 2)


CASES = {
    "mixed": Problem(),
    "zero rows": Problem(rows=0),
    "no places": Problem(J=0, select=lambda p: torch.empty(7, 0, dtype=torch.int64)),
    "no selection": Problem(select=each([[-1, -1]] * 7)),
    "no adapters": Problem(ranks=(), select=each([[-1, -1]] * 7)),
    "rank 1": Problem(ranks=(1, 1), J=1),
    "rank 16": Problem(ranks=(16, 16, 16), J=2),
    "rank 17": Problem(ranks=(17,), J=1),
    "rank 512": Problem(rows=3, ranks=(512, 3), J=2),
    "one column": Problem(K=1, N=1),
    "odd sizes": Problem(rows=5, K=131, N=67, ranks=(3, 20)),
    "aligned sizes": Problem(rows=16, K=64, N=64, ranks=(8, 16)),
    "several tiles": Problem(rows=37, K=40, N=48, ranks=(4, 9, 33)),
    "several column blocks": Problem(rows=3, N=200),
    "several K steps": Problem(rows=4, K=700, ranks=(4, 20)),
    "same adapter twice": Problem(select=each([[1, 1], [2, -1], [2, 1], [-1, 4], [4, 4]]), rows=5),
    "same adapter in all places": Problem(rows=2, select=each([[2] * 5, [4] * 5])),
    "places in front are empty": Problem(rows=3, select=each([[-1, 0], [-1, -1], [-1, 4]])),
    "unused slots": Problem(rows=4, ranks=(3,) * 9, select=each([[8], [-1], [0], [8]])),
    "adapter absent from the layer": Problem(rows=2, select=each([[3, -1], [3, 1]])),
    "all distinct": Problem(rows=9, ranks=(2,) * 9, select=lambda p: torch.arange(9)[:, None]),
    "all equal": Problem(rows=20, select=lambda p: torch.full((20, 1), 2)),
    "zipf": Problem(rows=24, ranks=(8, 3, 16, 40, 5), select=zipf),
    "biased": Problem(ranks=(4, 17, 33), biased=(0, 1), J=2),
    "unweighted": Problem(weighted=False),
    "many places": Problem(rows=3, ranks=(2, 5, 1), J=32),
    "union of two windows": Problem(  # of 64 slots
        rows=9, K=16, N=16, ranks=(1,) * 70, select=lambda p: torch.arange(81).view(9, 9) % 70
    ),
    "blocks of all ranks": Problem(rows=16, ranks=(1, 15, 16, 17, 32, 0, 33, 64), J=8),
}
