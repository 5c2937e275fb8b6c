"""A batch on a layer for `lora-mux tune`, as the launchers see it."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import tuned
from .bench import DTYPES
from .timing import microseconds, sets_for_cold_l2

if TYPE_CHECKING:
    from ..kernels.config import Config, FusedConfig


class Problem:
    """One batch on a layer, and the ways to compute it, each a function of its config."""

    def __init__(self, args: argparse.Namespace, rows: int, device: torch.device) -> None:
        from ..kernels import config, launch

        K, N, R, J = args.in_features, args.out_features, args.rank, args.selections
        dtype, S = DTYPES[args.dtype], max(args.adapters, args.selections)
        self.case = tuned.Case(rows, K, N, R, J, dtype.itemsize)
        self.device, self.architecture = device, launch.architecture(device)
        block_m = config.tile_rows(rows, dtype.itemsize)
        self.sets = sets_for_cold_l2(dtype.itemsize * S * R * (K + N), device)
        self.buffers = []
        for _ in range(self.sets):
            index = torch.rand(rows, S).topk(J).indices.to(torch.int32)
            live = torch.full((1 << 16,), -1, dtype=torch.int32)
            live[:S] = torch.arange(S)
            routing = index.to(device), torch.ones(rows, J, device=device), live.to(device), S
            plans = (
                launch.plan(*routing, block_m),
                launch.plan(*routing, config.fused_tile_rows(rows)),
            )
            like: dict[str, Any] = {"device": device, "dtype": dtype}
            table = [torch.arange(S) * R, torch.full((S,), R), torch.ones(S)]
            offset, rank, scaling = (t.to(device) for t in table)
            constant = torch.zeros(S * R, dtype=torch.bool, device=device)
            self.buffers.append(
                (
                    torch.randn(rows, K, **like),
                    torch.randn(S * R, -(-K // 16) * 16, **like),
                    torch.zeros(S * R, -(-N // 16) * 16, **like),  # y stays finite
                    torch.zeros(rows, N, **like),
                    plans,
                    (offset.int(), rank.int(), scaling.float(), constant),
                    torch.randn(N, K, **like),
                )
            )

    def chosen(self) -> "Config":
        """What is used as long as nothing was measured."""
        return self._choose(None)

    def _choose(self, block_m: int | None) -> "Config":
        from ..kernels import config

        case = self.case._asdict()
        return config.choose(**case, architecture=self.architecture, block_m=block_m)

    def chosen_fused(self) -> "FusedConfig":
        """The same for the fused kernel."""
        from ..kernels import config

        return config.choose_fused(self.case.rows, self.case.out_features, self.architecture)

    def pair(self, config: "Config", n: int) -> None:
        """One shrink and one expand."""
        x, A, B, y, (plan, _), tables, _ = self.buffers[n]
        self._shrink_expand(x, A, B, y, plan, tables, config)

    def separate(self, config: "Config", n: int) -> None:
        """The base layer, shrink and expand."""
        x, A, B, _, (plan, _), tables, W = self.buffers[n]
        self._shrink_expand(x, A, B, nn.functional.linear(x, W), plan, tables, config)

    def fused(self, fused: "FusedConfig", n: int) -> None:
        """The same in one launch; shrink before it for many rows, as lora_mux.operators does."""
        from ..kernels import config, launch

        x, A, B, _, (_, plan), (offset, rank, scaling, constant), W = self.buffers[n]
        _, strength, union, length, place, state, counters = plan
        before = None if len(x) <= config.SHRINKS_WITHIN else self._choose(fused.block_m)
        launch.linear(
            *(x, W, None, A, B, strength, union, length, place, state),
            *(offset, rank, scaling, constant, counters[0, :2]),
            *(self.case.rank, fused, before),
        )

    def _shrink_expand(
        self, x: Tensor, A: Tensor, B: Tensor, y: Tensor, plan: Any, tables: Any, config: "Config"
    ) -> None:
        from ..kernels import launch

        slots, strength, union, length, place, state, _ = plan
        offset, rank, scaling, _ = tables
        shape = launch.h_shape(slots, self.case.rank, config)
        h = torch.empty(shape, device=self.device, dtype=torch.float32)
        launch.shrink(x, A, h, strength, union, length, place, offset, rank, scaling, None, config)
        launch.expand(h, B, y, union, length, place, state, offset, rank, config)

    def microseconds(
        self, calls: Mapping[str, Callable[[int], None]], runs: int
    ) -> dict[str, float]:
        """Medians of interleaved runs."""
        times = microseconds(calls, self.sets, self.device, runs)
        return {name: time["p50"] for name, time in times.items()}
