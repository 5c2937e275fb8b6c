"""One batch, a different mix of LoRA adapters in every row.

    y[m] = W0 x[m] + bias + sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),  i = index[m, j]

`attach` lets the rows of a whole model's batches choose their own adapters, and returns a `Mux`.
`MuxLinear` does it for a single layer, with a `Routing` for each batch. `mean_by_adapter` is for
training many adapters in one batch. `parse_row` reads "sql+0.4*french", the text of a row, and
`compose` makes one PEFT folder of a row, for engines that take one adapter per request.
"""

from . import errors as errors
from ._version import __version__ as __version__
from .core import Routing as Routing
from .errors import LoraMuxError as LoraMuxError
from .layers import MuxLinear as MuxLinear
from .mixes import compose as compose
from .mixes import format_row as format_row
from .mixes import parse_row as parse_row
from .model import Mux as Mux
from .model import attach as attach
from .model import attach_peft as attach_peft
from .model import detach as detach
from .model import mean_by_adapter as mean_by_adapter

__all__ = [
    "LoraMuxError",
    "Mux",
    "MuxLinear",
    "Routing",
    "__version__",
    "attach",
    "attach_peft",
    "compose",
    "detach",
    "errors",
    "format_row",
    "mean_by_adapter",
    "parse_row",
]
