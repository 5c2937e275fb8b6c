"""Workloads: one linear layer, one batch, and which adapters its rows select."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

# Site -> (K, N) of its linear layer, siblings stacked.
SITES = {
    "8B o": (4096, 4096),
    "8B qkv": (4096, 6144),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B o": (8192, 8192),
    "70B qkv": (8192, 10240),
    "70B gate_up": (8192, 57344),
    "70B down": (28672, 8192),
}
MIXED = (8, 16, 32, 64, 128)
Popularity = Literal["identical", "uniform", "distinct", "zipf"]


@dataclass(frozen=True)
class Workload:
    """A layer and a batch; everything random comes from `seed`."""

    site: str
    K: int
    N: int
    samples: int
    adapters: int  # loaded, and selected from
    ranks: tuple[int, ...] = (16,)  # in turn
    selections: int = 1  # J, different adapters of a row
    popularity: Popularity = "uniform"  # zipf: with exponent 1.5
    base_share: float = 0.0  # of the samples, which select nothing
    tokens: int = 1  # rows of a sample, which select the same
    dtype: str = "bfloat16"
    weighted: bool = True
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Problem:
    """The tensors of a workload."""

    workload: Workload
    x: Tensor  # [M, K]
    W: Tensor  # [N, K]
    A: list[Tensor]  # [r, K] each
    B: list[Tensor]  # [N, r] each
    index: Tensor  # [M, J] int64, into A and B; -1 = none
    weight: Tensor  # [M, J] fp32

    @cached_property
    def strength(self) -> Tensor:
        """[M, adapters] fp32: the weight of each adapter in each row."""
        strength = self.weight.new_zeros(len(self.index), len(self.A) + 1)
        place = torch.where(self.index < 0, len(self.A), self.index)
        return strength.scatter_add(1, place, self.weight)[:, :-1]

    @cached_property
    def expected(self) -> Tensor:
        """[M, N] fp64: the formula, one adapter after the other."""
        x = self.x.double()
        y = x @ self.W.double().T
        for adapter, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            y += self.strength[:, adapter, None].double() * ((x @ A.double().T) @ B.double().T)
        return y

    def error(self, y: Tensor) -> float:
        """Relative norm of y's error."""
        return float((y.double() - self.expected).norm() / self.expected.norm())


def problem(workload: Workload, device: torch.device, seed: int = 0) -> Problem:
    """The tensors; each set of buffers that keeps the cache cold has a `seed` of its own."""
    w = workload
    generator = torch.Generator(device).manual_seed(w.seed + seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(w.torch_dtype)

    ranks = [w.ranks[i % len(w.ranks)] for i in range(w.adapters)]
    index = _selections(w, generator).repeat_interleave(w.tokens, 0)
    weight = torch.ones(index.shape, device=device)
    if w.weighted:
        weight = torch.rand(index.shape, generator=generator, device=device) + 0.5
    return Problem(
        w,
        random(w.rows, w.K),
        random(w.N, w.K, scale=w.K**-0.5),
        [random(r, w.K, scale=w.K**-0.5) for r in ranks],
        [random(w.N, r, scale=r**-0.5) for r in ranks],
        index,
        weight,
    )


def _selections(w: Workload, generator: torch.Generator) -> Tensor:
    """[samples, J] int64, distinct in a row."""
    device, shape = generator.device, (w.samples, w.adapters)
    if w.popularity == "distinct":
        turn = torch.arange(w.samples * w.selections, device=device) % w.adapters
        index = turn.view(w.samples, w.selections)
    elif w.popularity == "identical":
        index = torch.arange(w.selections, device=device).expand(w.samples, -1)
    else:
        chance = torch.ones(shape, device=device)
        if w.popularity == "zipf":
            chance /= torch.arange(1, w.adapters + 1, device=device) ** 1.5
        # Gumbel's top k: w.selections draws without replacement, in proportion to chance.
        noise = -torch.rand(shape, generator=generator, device=device).log()
        index = (noise / chance).topk(w.selections, largest=False).indices
    base = torch.rand(w.samples, generator=generator, device=device) < w.base_share
    return torch.where(base[:, None], -1, index)


def tiny() -> Iterator[Workload]:
    """To try the scripts without a GPU. In fp16: the interpreter multiplies the bits of bf16."""
    shape = {"selections": 2, "base_share": 0.2, "weighted": False}
    yield Workload("tiny", 64, 48, 5, 3, (8,), dtype="float16", **shape)


def smoke() -> Iterator[Workload]:
    """The sites of an 8B model, decode and prefill, with 1 adapter, 8, and 4 of 8 in each row."""
    for (site, size), rows in itertools.product(list(SITES.items())[:4], (1, 32, 128, 2048)):
        for adapters, selections in ((1, 1), (8, 1), (8, 4)):
            yield Workload(site, *size, rows, adapters, selections=selections)


def grid() -> Iterator[Workload]:
    """Every site and row count, with one thing at a time varied around 8 adapters of rank 16."""
    for (site, size), rows in itertools.product(
        SITES.items(), (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
    ):
        # Prefill comes in requests, whose rows lie together.
        tokens = max(1, rows // 8) if rows > 256 else 1
        shape = {"samples": rows // tokens, "tokens": tokens}
        yield Workload(site, *size, adapters=1, **shape)
        yield Workload(site, *size, adapters=8, **shape)
        if site not in ("8B o", "8B down"):
            continue
        yield Workload(site, *size, adapters=8, ranks=MIXED, **shape)
        yield Workload(site, *size, adapters=8, selections=2, **shape)
        yield Workload(site, *size, adapters=8, selections=4, **shape)
        yield Workload(site, *size, adapters=8, base_share=0.5, **shape)
        yield Workload(site, *size, adapters=64, popularity="zipf", **shape)
        if rows in (64, 256):
            yield Workload(site, *size, rows, rows, popularity="distinct")
            yield Workload(site, *size, rows, rows, (64,), popularity="distinct")


def headline() -> Iterator[Workload]:
    """The questions of docs/benchmarks.md."""
    for site, size in list(SITES.items())[:4]:
        yield Workload(site, *size, 32, 8)
        yield Workload(site, *size, 1, 1)
        yield Workload(site, *size, 32, 8, selections=4)
        yield Workload(site, *size, 32, 32, MIXED)
        yield Workload(site, *size, 8, 8, tokens=1024)
    # PEFT's mixed batch knows no weights.
    yield Workload("8B o", 4096, 4096, 32, 8, weighted=False)
    yield Workload("8B o", 4096, 4096, 32, 8, selections=4, weighted=False)
    for distinct in (64, 256):
        yield Workload("8B o", 4096, 4096, distinct, distinct, popularity="distinct")
    # The two cases that we may lose.
    yield Workload("8B o", 4096, 4096, 2, 1, tokens=1024, popularity="identical")
    yield Workload("8B o", 4096, 4096, 4, 2, (64,))


def subsets() -> Iterator[Workload]:
    """Several weighted adapters a row, where FlashInfer can be asked too: N = K, one rank."""
    for selections, rows in itertools.product((2, 4), (1, 4, 16, 64, 256)):
        yield Workload("8B o", 4096, 4096, rows, 8, selections=selections)


def cpu(quick: bool = False) -> Iterator[Workload]:
    """The cells of docs/benchmarks.md: widths, rows, distinct adapters, dtypes, selections."""
    for dtype, width, tokens, adapters, J in itertools.product(
        ("float32", "bfloat16"), (1024, 2048, 4096), (1, 16), (1, 4, 16, 64), (1, 2, 4)
    ):
        if adapters < J or (quick and (width > 1024 or tokens > 1)):
            continue
        yield Workload(
            *(f"{width}", width, width, 64, adapters),
            selections=J,
            popularity="distinct" if adapters == 64 else "uniform",
            tokens=tokens,
            dtype=dtype,
            weighted=False,
        )
