"""A batch on a layer for `lora-mux tune`, as the launchers see it."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import tuned
from .bench import DTYPES
from .timing import microseconds, sets_for_cold_l2

if TYPE_CHECKING:
    from ..kernels.config import Config, FusedConfig
    from ..kernels.tensors import Plan, Pool


class Buffers(NamedTuple):
    """What one call works on; several sets keep the L2 cache cold."""

    x: Tensor  # [rows, K]
    y: Tensor  # [rows, N]
    W: Tensor  # [N, K]
    pool: "Pool"
    plan: "Plan"  # of shrink's and expand's tiles
    fused_plan: "Plan"  # of the fused kernel's


class Problem:
    """One batch on a layer, and the ways to compute it, each a function of its config."""

    def __init__(self, args: argparse.Namespace, rows: int, device: torch.device) -> None:
        from ..kernels import launch

        K, N, R, J = args.in_features, args.out_features, args.rank, args.selections
        dtype, S = DTYPES[args.dtype], max(args.adapters, args.selections)
        self.case = tuned.Case(rows, K, N, R, J, dtype.itemsize)
        self.device, self.architecture = device, launch.architecture(device)
        self.sets = sets_for_cold_l2(dtype.itemsize * S * R * (K + N), device)
        self.buffers = [self._buffers(S, dtype) for _ in range(self.sets)]

    def _buffers(self, adapters: int, dtype: torch.dtype) -> Buffers:
        from ..kernels import config, launch
        from ..kernels.tensors import Pool

        rows, K, N, R, J, _ = self.case
        S = adapters
        like: dict[str, Any] = {"device": self.device, "dtype": dtype}
        pool = Pool(
            A_rows=torch.randn(S * R, -(-K // 16) * 16, **like),
            B_rows=torch.zeros(S * R, -(-N // 16) * 16, **like),  # y stays finite
            constant=torch.zeros(S * R, dtype=torch.bool, device=self.device),
            offset=torch.arange(S, dtype=torch.int32, device=self.device) * R,
            rank=torch.full((S,), R, dtype=torch.int32, device=self.device),
            scaling=torch.ones(S, device=self.device),
        )
        index = torch.rand(rows, S).topk(J).indices.to(self.device, torch.int32)
        live = torch.full((1 << 16,), -1, dtype=torch.int32, device=self.device)
        live[:S] = torch.arange(S)
        batch = index, torch.ones(rows, J, device=self.device), live, S
        return Buffers(
            x=torch.randn(rows, K, **like),
            y=torch.zeros(rows, N, **like),
            W=torch.randn(N, K, **like),
            pool=pool,
            plan=launch.plan(*batch, config.tile_rows(rows, dtype.itemsize)),
            fused_plan=launch.plan(*batch, config.fused_tile_rows(rows)),
        )

    def chosen(self) -> "Config":
        """The Config in use as long as nothing was measured."""
        from ..kernels import config

        rows, K, N, _, _, itemsize = self.case
        return config.choose(rows, K, N, itemsize, self.architecture)

    def chosen_fused(self) -> "FusedConfig":
        """The same for the fused kernel."""
        from ..kernels import config

        rows, _, N, _, places, _ = self.case
        return config.choose_fused(rows, N, self.architecture, places)

    def pair(self, config: "Config", n: int) -> None:
        """One shrink and one expand."""
        self._shrink_expand(self.buffers[n].y, config, n)

    def separate(self, config: "Config", n: int) -> None:
        """The base layer, shrink and expand."""
        self._shrink_expand(nn.functional.linear(self.buffers[n].x, self.buffers[n].W), config, n)

    def _shrink_expand(self, y: Tensor, config: "Config", n: int) -> None:
        from ..kernels import launch

        x, _, _, pool, plan, _ = self.buffers[n]
        h = x.new_empty(launch.h_shape(plan, self.case.rank, config), dtype=torch.float32)
        launch.shrink(x, h, plan, pool, config)
        launch.expand(h, y, plan, pool, config)

    def fused(self, fused: "FusedConfig", n: int) -> None:
        """The same in one launch, for a few rows."""
        from ..kernels import launch

        x, _, W, pool, _, plan = self.buffers[n]
        launch.linear(x, W, None, plan, pool, self.case.rank, 0, fused)

    def microseconds(
        self, calls: Mapping[str, Callable[[int], None]], runs: int
    ) -> dict[str, float]:
        """Medians of interleaved runs."""
        times = microseconds(calls, self.sets, self.device, runs)
        return {name: time["p50"] for name, time in times.items()}
