"""Adapters that come and go while the server runs: the two endpoints that vLLM has for it."""

from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

import lora_mux

from .models import check_name


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


def add_loading(app: FastAPI, mux: lora_mux.Mux, root: Path) -> None:
    """Let whoever has the key load folders inside of `root`, and remove adapters."""
    root = root.resolve(strict=True)

    # Not async: they run in threads, and files are read beside the forward passes.
    @app.post("/v1/load_lora_adapter")
    def load(asked: Load) -> PlainTextResponse:
        check_name(asked.lora_name)
        folder = _folder(root, asked.lora_path)
        mux.load(asked.lora_name, folder, replace=asked.load_inplace)
        return PlainTextResponse(f"Success: adapter {asked.lora_name!r} is loaded.")

    @app.post("/v1/unload_lora_adapter")
    def unload(asked: Unload) -> PlainTextResponse:
        """The name is gone at once; requests that have the adapter end with it."""
        mux.remove(asked.lora_name)
        return PlainTextResponse(f"Success: adapter {asked.lora_name!r} is removed.")


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
