"""Other projects' kernels as providers: vLLM's and SGLang's, if LORA_MUX_PEERS names a folder that
has them, and FlashInfer's, if that is installed.

None of their code is here. The folder holds a module `peers`, which wraps their kernels in plain
functions on plain tensors:

    vllm_weights(A, B, scales), vllm_plan(slots, max_loras)
    vllm_lora_multi(y, x, *weights, plans, w)
    sglang_pack(A, B, ranks), sglang_plan(backend, slots, ranks, scales, decode=)
    sglang_lora_multi(y, x, *packed, plans, w), reset_caches()

A [adapters, R, K] and B [adapters, N, R] are padded to the largest rank. The engines take one
adapter a row, so a row with J adapters takes J passes over x, scaled by its weights.
"""

import importlib
import os
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from providers import Call, NotApplicable, Provider, stacked
from workloads import Problem


@cache
def harness() -> ModuleType:
    """The module of the named folder."""
    folder = os.environ.get("LORA_MUX_PEERS")
    if not folder:
        raise NotApplicable("LORA_MUX_PEERS names no folder with the engines' kernels")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("peers")
    except ImportError as error:
        raise NotApplicable(f"LORA_MUX_PEERS: {error}") from error


def vllm(problem: Problem, base: Call) -> Call:
    """vLLM's shrink and expand (its defaults: a grid for every adapter that may be loaded)."""
    peers = harness()
    peers.reset_caches()  # kept by the address of tensors that may be gone
    A, B = stacked(problem)
    scales = torch.ones(len(A))
    weights = peers.vllm_weights([A], [B], scales)
    plans = [peers.vllm_plan(p.to(torch.int32), len(A)) for p in problem.index.unbind(1)]
    weight = problem.weight if problem.workload.weighted else None
    return lambda: peers.vllm_lora_multi(base(), problem.x, *weights, plans, weight)


def sglang(backend: str) -> Provider:
    """SGLang's kernels: "triton_v2", "csgmv" or "triton"."""

    def prepare(problem: Problem, base: Call) -> Call:
        peers = harness()
        peers.reset_caches()  # kept by the address of tensors that may be gone
        A, B = stacked(problem)
        # Its older backends know no row without an adapter: one of rank 0 stands in.
        none = torch.zeros_like(A[:1]), torch.zeros_like(B[:1])
        A, B = torch.cat([A, none[0]]), torch.cat([B, none[1]])
        ranks = torch.tensor([*map(len, problem.A), 0], dtype=torch.int32)
        packed = peers.sglang_pack([A], [B], ranks)
        decode = problem.x.shape[0] <= 128
        plans = [
            peers.sglang_plan(backend, p.to(torch.int32), ranks, torch.ones(len(A)), decode=decode)
            for p in problem.index.unbind(1)
        ]
        weight = problem.weight if problem.workload.weighted else None

        def call() -> Tensor:
            y: Tensor = peers.sglang_lora_multi(base(), problem.x, *packed, plans, weight)
            return y

        return call

    return prepare


def flashinfer(problem: Problem, base: Call) -> Call:
    """FlashInfer's LoRA of experts (from 0.7.2): an adapter stands for an expert of one LoRA.

    The one kernel library that sums several weighted adapters of a row in one call. Adapters have
    one rank, and N = K.
    """
    try:
        from flashinfer.fused_moe import prepare_bgmv_moe
    except ImportError as error:
        raise NotApplicable(f"flashinfer: {error}") from error
    A, B = stacked(problem)
    rows, places = (problem.index >= 0).nonzero(as_tuple=True)
    nobody = torch.zeros(len(problem.x), dtype=torch.int64, device=problem.x.device)
    try:
        plan = prepare_bgmv_moe(
            *(problem.x, [A[None].contiguous()], [B[None].contiguous()], rows),
            *(problem.index[rows, places], nobody, problem.weight[rows, places], len(A)),
            fallback=False,
        )
    except ValueError as error:
        raise NotApplicable(f"flashinfer: {error}") from error
    return lambda: base().add_(plan.run())


PEERS: dict[str, Provider] = {
    "FlashInfer": flashinfer,
    "vLLM": vllm,
    "SGLang triton_v2": sglang("triton_v2"),
    "SGLang csgmv": sglang("csgmv"),
    "SGLang triton": sglang("triton"),
}
