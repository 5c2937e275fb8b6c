"""An experiment: lora_mux's operators in the linear layers of vLLM, LORA_MUX_VLLM=kernels.

Rows are right, and checked on the CPU. The kernels read vLLM's own stacks, A [slots, 1, R, K] and
B [slots, 1, N, R], as they are. Nothing is known of its speed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import RankRows
from ..errors import BackendError, InputError

BLOCK_M = 16  # rows of a tile
HANDLES = 1 << 16  # slot i of vLLM is the handle i


class MuxOperators:
    """Over one of vLLM's PunicaWrappers: linear layers with our operators, all else as it is."""

    token_lora_indices: Tensor  # [M] int64, the slot of each row, -1 = the base model

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        super().update_metadata(*arguments, **options)  # type: ignore[misc]
        self._plans: dict[tuple[int, int, float], tuple[Any, ...]] = {}

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        **options: Any,
    ) -> None:
        """y[m] += scale * B[i] (A[i] x[m]) for each slice of y, i = the slot of row m.

        Args:
            y: [..., sum of output_slices], changed in place.
            x: [..., K].
            lora_a_stacked: [slots, 1, R, K] for each slice.
            lora_b_stacked: [slots, 1, N, R] for each slice.

        Raises:
            BackendError: inside torch.compile or a CUDA graph, which would keep one batch's rows.
            InputError: vLLM has told of other rows than x has.
        """
        if torch.compiler.is_compiling() or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            raise BackendError(
                "`LORA_MUX_VLLM` must be without kernels where vLLM compiles or captures graphs, "
                "got kernels; add --enforce-eager"
            )
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if len(self.token_lora_indices) != len(x):
            raise InputError(
                f"`x` must have the {len(self.token_lora_indices)} rows that vLLM has named "
                f"adapters for, got {len(x)}; serve without LORA_MUX_VLLM=kernels"
            )
        first = 0
        for A, B, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            slots, _, R, K = A.shape
            plan, tables = self._planned(slots, R, scale)
            rows = RankRows(A.view(slots * R, K), B.view(slots, size, R), None, *tables)
            part = y[:, first : first + size]
            torch.ops.lora_mux.add_lora_(part, x, *rows, *plan, R)
            first += size

    def _planned(self, slots: int, R: int, scale: float) -> tuple[Any, ...]:
        """The plan of a batch and the tables of a pool, once for all layers that share them."""
        key = slots, R, scale
        if key not in self._plans:
            index = self.token_lora_indices[:, None]
            slot = torch.arange(slots, dtype=torch.int32, device=index.device)
            live = slot.new_full((HANDLES,), -2)  # of nobody
            live[:slots] = slot
            weight = torch.ones(index.shape, device=index.device)
            plan = torch.ops.lora_mux.plan(index, weight, live, slots, BLOCK_M)
            scaling = torch.full((slots,), scale, device=index.device)
            self._plans[key] = plan, (slot * R, torch.full_like(slot, R), scaling)
        return self._plans[key]


def swap_operators() -> None:
    """Let vLLM's platform name a wrapper of ours."""
    from vllm.platforms import current_platform

    type(current_platform).get_punica_wrapper = classmethod(
        lambda cls: f"{__name__}.MuxPunicaWrapper"
    )


def __getattr__(name: str) -> type:
    """MuxPunicaWrapper, made where vLLM makes one: its base imports kernels."""
    if name != "MuxPunicaWrapper":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as Base
    else:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Base
    return type(name, (MuxOperators, Base), {})
