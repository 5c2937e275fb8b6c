"""Adapters that come and go while the server runs: the two endpoints that vLLM has for it."""

import uuid
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

import lora_mux
from lora_mux.errors import LoraMuxError, PoolCapacityError

from .models import TRIAL, Models, check_name


class Load(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str


def add_loading(app: FastAPI, models: Models, root: Path) -> None:
    """Let whoever has the key load folders inside of `root`, and remove adapters."""
    root, mux = root.resolve(strict=True), models.mux

    # Not async: they run in threads, and files are read beside the forward passes.
    @app.post("/v1/load_lora_adapter")
    def load(asked: Load) -> PlainTextResponse:
        check_name(asked.lora_name)
        folder = _folder(root, asked.lora_path)
        if models.bounded and asked.load_inplace and asked.lora_name in mux.adapters:
            trial = TRIAL + uuid.uuid4().hex
            _load(mux, trial, folder)  # so that the name keeps its adapter if this one is broken
            mux.remove(trial)
        is_read = _load(mux, asked.lora_name, folder, asked.load_inplace)
        later = "" if is_read else " Those in use leave no room: it is read when there is some."
        return PlainTextResponse(f"Success: adapter {asked.lora_name!r} is loaded.{later}")

    @app.post("/v1/unload_lora_adapter")
    def unload(asked: Unload) -> PlainTextResponse:
        """The name is gone at once; requests that have the adapter end with it."""
        mux.remove(asked.lora_name)
        return PlainTextResponse(f"Success: adapter {asked.lora_name!r} is removed.")


def _load(mux: lora_mux.Mux, name: str, folder: Path, replace: bool = False) -> bool:
    """Load an adapter. With --memory its values are read and checked only where it gets room.

    Returns:
        Whether they are read.
    """
    mux.load(name, folder, replace=replace)
    try:
        mux.prefetch([name])
    except PoolCapacityError:
        return False
    except LoraMuxError:
        mux.remove(name)
        raise
    return True


def _folder(root: Path, path: str) -> Path:
    """A folder inside of `root`, after all links.

    Raises:
        HTTPException: 400, it is not there.
    """
    try:
        folder = (root / path).resolve()
        if folder.is_relative_to(root) and folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):  # too long; with a NUL; a link to itself
        pass
    raise HTTPException(
        400,
        f"`lora_path` must be a folder inside of the one that --loadable names, got {path[:80]!r}",
    )
