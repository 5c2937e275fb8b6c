"""The model, its adapters and the engine, from start to end."""

import os
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

import lora_mux
from lora_mux.errors import TargetError

from .engine import Engine

OLDEST = 5, 23  # of transformers: before, its parts and their arguments have other names
TRIAL = "on trial: "  # before the name of an adapter that no request can ask for


class Models(ModelManager):
    """transformers' manager of models, which has one, attached before the first request.

    Args:
        model: a name on the hub, or a folder.
        folders: name -> folder of each adapter.
        device: as transformers takes it; "auto" = a GPU if there is one.
        memory: of `lora_mux.attach`.
        cache_tokens: how many tokens the cache of all requests in progress has.
        most_requests: how many may be in progress.
    """

    def __init__(
        self,
        model: str,
        folders: Mapping[str, str | os.PathLike[str]],
        *,
        device: str = "auto",
        memory: str | int | None = None,
        cache_tokens: int = 32768,
        most_requests: int = 256,
    ) -> None:
        if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
            raise ImportError(
                f"serve_openai needs transformers 5.23 or newer, got {transformers.__version__}: "
                "pip install '.[serve]' in a clone"
            )
        super().__init__(device=device, force_model=model, continuous_batching=True)
        name = self.process_model_name(model)
        self.model, self.processor = self.load_model_and_processor(name)
        modality = self.get_model_modality(self.model, processor=self.processor)
        if modality != Modality.LLM or not hasattr(self.model, "init_continuous_batching"):
            raise TargetError(
                f"`model` must be a language model that transformers batches continuously, got "
                f"{type(self.model).__name__} ({modality.value})"
            )
        self.mux, self.bounded = lora_mux.attach(self.model, memory=memory), memory is not None
        for adapter in folders:
            check_name(adapter)
        self.mux.load_many(folders)
        self.engine = Engine(self.mux, cache_tokens, most_requests)
        self.engine.init_cb(self.model, self.model.generation_config)

    def list_models(self) -> list[dict[str, Any]]:
        """The base model, and each adapter alone; requests may name any mix of them."""
        names = ["base", *(f"base:{n}" for n in self.mux.adapters if not n.startswith(TRIAL))]
        return [{"id": n, "object": "model", "created": 0, "owned_by": "lora_mux"} for n in names]

    get_gen_models = list_models  # its name before transformers 5.24

    def shutdown(self) -> None:
        """With the process, which frees the model; the worker alone would keep it from ending."""
        self.engine.stop()


def check_name(name: str) -> None:
    """Refuse a name that no request could ask for.

    Raises:
        RoutingError: with what a name may have.
    """
    lora_mux.format_row({name: 1.0})
