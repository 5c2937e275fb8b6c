"""The data: rank rows of a layer's adapters, handles of a model's adapters, routings of a batch.

Knows tensors, and nothing of models or of how anything is computed.
"""

from .pool import LoraWeights as LoraWeights
from .pool import Pool as Pool
from .pool import RankRows as RankRows
from .pool import Span as Span
from .pool import Version as Version
from .pool import is_finite as is_finite
from .pool import rank_rows as rank_rows
from .routing import NONE as NONE
from .routing import Found as Found
from .routing import Routing as Routing
from .routing import Selection as Selection
from .routing import counts as counts
from .routing import from_names as from_names
from .routing import number as number
from .routing import numbers as numbers
from .routing import readable as readable
from .routing import selection as selection
from .routing import unchecked as unchecked
from .slots import Slots as Slots
from .slots import slot_of as slot_of
