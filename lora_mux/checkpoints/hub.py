"""Checkpoint folders by name: local ones, and repositories of the Hugging Face hub."""

import importlib
import importlib.util
import os
import re
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ArgumentTypeError, CheckpointError
from .diffusers_file import DIFFUSERS_FILE
from .peft_folder import CONFIG_FILE, WEIGHTS_FILE

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name


def local_folder(folder: str | PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first if it is on the hub.

    Args:
        folder: a path, or user/name of a repository. Only its config and its safetensors are
            downloaded, into the hub's cache.
        revision: a branch, a tag or a commit of the repository.

    Raises:
        ArgumentTypeError: folder is not a path.
        CheckpointError: the repository or its revision cannot be had.
    """
    if not isinstance(folder, str | PathLike) or isinstance(os.fspath(folder), bytes):
        raise ArgumentTypeError(
            f"`folder` must be the path of a PEFT checkpoint or a repository of the hub, "
            f"got {type(folder).__name__}"
        )
    path = Path(folder)
    is_repository = isinstance(folder, str) and REPOSITORY.fullmatch(folder)
    # If there is a folder adapters, then adapters/sql is a misspelt path, and no server hears of
    # it.
    if not is_repository or os.path.exists(path.parent):
        if revision is not None:
            raise CheckpointError(f"`revision` must be None for a local folder, got {revision!r}")
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"`folder` must be an existing folder, got {folder!r:.200}; to load it from the hub: "
            "pip install 'lora-mux[hub]'"
        )
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        downloaded: str = hub.snapshot_download(
            folder, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE]
        )
    except Exception as error:  # of the hub's library, and of whatever it sends requests with
        raise CheckpointError(
            f"`folder` must be an existing folder or a repository of the hub, got {folder!r:.200}: "
            f"{str(error)[:300]}"
        ) from error
    return Path(downloaded)
