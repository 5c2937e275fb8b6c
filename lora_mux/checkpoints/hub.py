"""Checkpoint folders by name: local ones, and repositories of the Hugging Face hub."""

import importlib
import importlib.util
import re
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ArgumentTypeError, CheckpointError
from .peft_folder import CONFIG, DIFFUSERS, WEIGHTS

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name


def local_folder(folder: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder itself; for user/name that is no path here, where the hub's copy of it lies.

    Of a repository only config and safetensors are fetched, into the hub's cache.

    Raises:
        ArgumentTypeError: something that is no path.
        CheckpointError: a repository, or a revision of it, that can not be had.
    """
    if not isinstance(folder, str | PathLike):
        raise ArgumentTypeError(
            f"`folder` must be the path of a PEFT checkpoint or a repository of the hub, "
            f"got {type(folder).__name__}"
        )
    path = Path(folder)
    # adapters/sql with a folder adapters is a path with an error in it, and goes to no server.
    if not isinstance(folder, str) or not REPOSITORY.fullmatch(folder) or path.parent.exists():
        if revision is not None:
            raise CheckpointError(f"`revision` must be None for a local folder, got {revision!r}")
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"`folder` must be an existing folder, got {folder!r}; to load it from the hub: "
            "pip install 'lora-mux[hub]'"
        )
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        got: str = hub.snapshot_download(
            folder, revision=revision, allow_patterns=[CONFIG, WEIGHTS, DIFFUSERS]
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise CheckpointError(
            f"`folder` must be an existing folder or a repository of the hub, got {folder!r}: "
            f"{error}"
        ) from error
    return Path(got)
