"""One door to the backends: plan once per forward pass, then add the adapters to each layer's y.

"reference" runs everywhere. "triton" is where `lora_mux.kernels` plugs in; it holds no kernels
yet, so asking for it is an error, and "auto" means the reference on every device.
"""

from typing import Literal, TypeAlias

from torch import Tensor

from . import reference
from .errors import BackendError
from .pool import Pool
from .routing import Routing
from .slots import Slots

Backend: TypeAlias = Literal["auto", "triton", "reference"]
Plan: TypeAlias = reference.Plan


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist, or that this version can not run."""
    if backend not in ("auto", "triton", "reference"):
        raise BackendError(f"`backend` must be 'auto', 'triton' or 'reference', got {backend!r}")
    if backend == "triton":
        raise BackendError(
            "`backend` 'triton': this version of lora_mux holds no Triton kernels yet; "
            "use 'auto' or 'reference'"
        )


def backend_reason() -> str:
    """The backend that "auto" means here, and why."""
    return "reference (this version of lora_mux holds no Triton kernels yet)"


def plan(routing: Routing, slots: Slots) -> Plan | None:
    """The plan of a routing with one row per row of x; None when no row selects an adapter.

    Raises:
        UnknownAdapterError: the index holds a handle whose adapter is not there.
    """
    resolved = slots.resolve(routing.index)
    made = reference.plan(resolved, routing.weight)
    return made if len(made.slots) else None


def add_lora(y: Tensor, x: Tensor, pool: Pool, plan: Plan) -> Tensor:
    """y [..., N] plus the adapters' part for x [..., K]; y itself when no adapter is here."""
    rows = reference.add_lora(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), pool, plan)
    return rows.reshape(y.shape)
