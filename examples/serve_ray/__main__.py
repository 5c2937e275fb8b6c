"""Serve a model on many replicas: python -m serve_ray MODEL ADAPTERS"""

import argparse
import os
import signal
from pathlib import Path

KEY = "LORA_MUX_API_KEY"  # not an argument, which all users of the machine can read
EXAMPLES = Path(__file__).parents[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serve_ray", description=__doc__)
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("adapters", type=Path, help="a folder of PEFT folders")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--memory", help="of a replica's adapters, such as 2GiB")
    parser.add_argument("--batch-wait", type=float, default=0.03, metavar="SECONDS")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a cluster of Ray's; without it, this machine alone")
    parser.add_argument(
        "--openai",
        action="store_true",
        help=f"OpenAI's API, for the adapters that are there now; with {KEY} in the environment, "
        "requests must have that key",
    )
    given = parser.parse_args()
    if not given.adapters.is_dir():
        parser.error(f"ADAPTERS must be a folder, got {given.adapters}")
    if given.address is None:
        from .loopback import start  # before ray

        start(given.replicas)
    else:
        import ray

        ray.init(given.address, runtime_env={"working_dir": str(EXAMPLES)})
    from ray import serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which lets answers end, as Ctrl-C
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(application(given), blocking=True)


def application(given: argparse.Namespace) -> object:
    """What Ray Serve is to run."""
    from .front import Front
    from .replicas import replicas

    model = os.path.abspath(given.model) if os.path.isdir(given.model) else given.model
    folder = given.adapters.resolve()
    how = {"count": given.replicas, "gpus": given.gpus, "memory": given.memory}
    if not given.openai:
        return Front.bind(replicas(model, str(folder), batch_wait=given.batch_wait, **how))
    from .openai_replicas import openai_replicas  # which needs transformers[serving]

    folders = {path.name: str(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    return openai_replicas(model, folders, key=os.environ.get(KEY) or None, **how)


if __name__ == "__main__":
    main()
