"""python examples/serve_openai MODEL NAME=FOLDER ..."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a folder; modules find one another as those of a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import uvicorn

from lora_mux.errors import LoraMuxError
from serve_openai.app import build
from serve_openai.models import Models, check_name

KEY = "LORA_MUX_API_KEY"  # not an argument, which all users of the machine can read
PATIENCE = 30  # seconds in which answers may end after a SIGTERM or SIGINT


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="serve_openai",
        description="An OpenAI-compatible server in which every request names its adapters.",
        epilog=f"With {KEY} in the environment, requests to /v1/ must have that key.",
    )
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER", help="PEFT's folders")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1: this machine alone")
    parser.add_argument("--port", type=whole(0, 65535), default=8000)
    parser.add_argument("--device", default="auto", help="such as cuda:0 or cpu")
    parser.add_argument(
        "--memory", help="of the adapters on the device, such as 2GiB; without it all are there"
    )
    parser.add_argument(
        "--loadable", type=Path, metavar="FOLDER", help="adapters in it may be loaded by request"
    )
    parser.add_argument(
        "--cache-tokens", type=whole(1), default=32768, help="of all requests in progress"
    )
    parser.add_argument("--most-requests", type=whole(1), default=256, help="that are in progress")
    given = parser.parse_args()
    folders: dict[str, str] = {}
    for item in given.adapters:
        name, _, folder = item.partition("=")
        if not (name and folder):
            parser.error(f"an adapter must be NAME=FOLDER, got {item!r}")
        if name in folders:
            parser.error(f"an adapter's NAME must be given once, got {name!r} twice")
        try:
            check_name(name)
        except LoraMuxError as error:
            parser.error(f"an adapter must be NAME=FOLDER, got {item!r}: {error}")
        folders[name] = folder
    key = os.environ.get(KEY) or None
    if given.loadable and not (key and given.loadable.is_dir()):
        parser.error(f"--loadable needs a folder, and a key in the environment as {KEY}")
    try:
        models = Models(
            given.model,
            folders,
            device=given.device,
            memory=given.memory,
            cache_tokens=given.cache_tokens,
            most_requests=given.most_requests,
        )
    except (LoraMuxError, ImportError, OSError) as error:  # OSError: of a model that is not there
        sys.exit(f"serve_openai: {error}")
    app = build(
        models,
        key=key,
        loadable=given.loadable,
        local=given.host in ("127.0.0.1", "localhost"),
    )
    try:
        uvicorn.run(
            app,
            host=given.host,
            port=given.port,
            timeout_graceful_shutdown=PATIENCE,
        )
    finally:  # a second signal ends uvicorn without the end of the application
        models.shutdown()


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` to `most`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            end = "" if most == math.inf else f" to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}{end}")
        return int(text)

    return number


if __name__ == "__main__":
    main()
