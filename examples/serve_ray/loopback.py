"""Ray on this machine alone. Ray reads these variables when it is imported: import this first."""

import os

# Ray turns 127.0.0.1 into the machine's own address, and whoever reaches a port of Ray's can run
# code. With this it stays.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from pathlib import Path
from typing import Any

import ray
from ray._common import tls_utils

EXAMPLES = Path(__file__).parents[1]


def stay_here() -> None:
    """Let the replicas of this process listen on 127.0.0.1.

    Ray 2.60 lets them listen on [::], whatever the node's address is, and has no setting for it.
    """
    bind = tls_utils.add_port_to_grpc_server
    tls_utils.add_port_to_grpc_server = lambda server, address: bind(
        server, address.replace("[::]", "127.0.0.1")
    )


def start(cpus: int, **options: Any) -> None:
    """Start Ray, whose processes all listen on 127.0.0.1, without a dashboard.

    Args:
        cpus: how many replicas may run, of one CPU each.
        **options: of ray.init.

    Raises:
        RuntimeError: Ray has another address, as if it was imported before this module.
    """
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        runtime_env={"working_dir": str(EXAMPLES), "worker_process_setup_hook": stay_here},
        **options,
    )
    addresses = [node["NodeManagerAddress"] for node in ray.nodes()]
    if addresses != ["127.0.0.1"]:
        ray.shutdown()
        raise RuntimeError(
            f"Ray must listen on 127.0.0.1 alone, got {addresses}; import serve_ray.loopback "
            "before ray"
        )
