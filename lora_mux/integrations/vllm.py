"""vLLM's plug-in: model="sql+0.4*french" names a mix, which vLLM serves as one adapter.

    export LORA_MUX_VLLM=names LORA_MUX_ADAPTERS=adapters VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    vllm serve MODEL --enable-lora --max-lora-rank 64

vLLM finds `register` by the entry point in pyproject.toml, and calls it in each of its processes.
Without LORA_MUX_VLLM it does nothing. docs/engines.md has the limits.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import BackendError, short
from .named_mixes import MAX_MIXES, NamedMixes

NAME = "lora_mux"


def register() -> None:
    """Do what LORA_MUX_VLLM asks for: "names", "kernels", or both with a comma.

    Raises:
        BackendError: a variable has another value than it may have.
        CheckpointError: LORA_MUX_ADAPTERS is no folder.
    """
    parts = {part.strip() for part in os.environ.get("LORA_MUX_VLLM", "").split(",")} - {""}
    if not parts <= {"names", "kernels"}:
        raise BackendError(
            "`LORA_MUX_VLLM` must be names, kernels, both with a comma, or unset, got "
            f"{short(os.environ['LORA_MUX_VLLM'])}"
        )
    if "names" in parts:
        _register_names()
    if "kernels" in parts:
        from .vllm_kernels import swap_operators

        swap_operators()


def _register_names() -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    adapters = os.environ.get("LORA_MUX_ADAPTERS")
    if not adapters:
        raise BackendError(
            "`LORA_MUX_ADAPTERS` must be the folder of the adapters with LORA_MUX_VLLM=names, "
            "got none"
        )
    # vLLM asks no resolver without it, and every mix would be unknown.
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").strip().lower() not in ("1", "true"):
        raise BackendError(
            "`VLLM_ALLOW_RUNTIME_LORA_UPDATING` must be 1 with LORA_MUX_VLLM=names, got "
            f"{short(os.environ.get('VLLM_ALLOW_RUNTIME_LORA_UPDATING'))}"
        )
    most = os.environ.get("LORA_MUX_MIXES", str(MAX_MIXES))
    if not most.isdecimal():
        raise BackendError(f"`LORA_MUX_MIXES` must be a number of mixes, got {short(most)}")
    mixes = NamedMixes(adapters, os.environ.get("LORA_MUX_CACHE") or None, int(most))
    LoRAResolverRegistry.register_resolver(NAME, MuxResolver(mixes))


class MuxResolver:
    """What vLLM asks for an adapter whose name it does not know: a LoRAResolver."""

    def __init__(self, mixes: NamedMixes) -> None:
        self._mixes = mixes
        # One thread: two requests for a mix compose it once, and memory holds one mix at a time.
        self._composing = ThreadPoolExecutor(1, thread_name_prefix="lora_mux")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """A LoRARequest for a mix, or None, to which vLLM answers 404.

        Raises:
            LoraMuxError: which is a ValueError, to which vLLM answers 400 with its text.
        """
        loop = asyncio.get_running_loop()
        arguments = lora_name, base_model_name
        folder = await loop.run_in_executor(self._composing, self._mixes.folder, *arguments)
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name, 1, str(folder))  # vLLM replaces the number by one of its own
