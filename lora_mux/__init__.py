"""lora_mux: a different subset of LoRA adapters for every row of a batch.

y[m] = W0 x[m] + sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),  i = index[m, j]
"""

from . import errors as errors
from ._version import __version__ as __version__
from .core import Routing as Routing
from .errors import LoraMuxError as LoraMuxError
from .layers import MuxLinear as MuxLinear
from .model import Mux as Mux
from .model import attach as attach
from .model import attach_peft as attach_peft

__all__ = [
    "LoraMuxError",
    "Mux",
    "MuxLinear",
    "Routing",
    "__version__",
    "attach",
    "attach_peft",
    "errors",
]
