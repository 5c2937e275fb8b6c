"""Layers that carry adapters.

linear     MuxLinear
kinds      embeddings and convolutions, which are linear maps of other rows
swapping   how a layer of a model becomes one in place, and is changed back
handed_in  a Routing that is handed to a layer without a model; what a backward still needs
gains      DoRA: what rescales the base's own output, and how it follows from the base's weight
storing    how an adapter gets into the pools of its layers
targets    which layers of a model can carry adapters
sharding   layers that tensor parallelism has split
saved_modules  layers that an adapter saved as a whole, as what they are more than the base's
"""

from .gains import with_gain as with_gain
from .kinds import CONVOLUTIONS as CONVOLUTIONS
from .kinds import own_class as own_class
from .linear import MuxLinear as MuxLinear
from .linear import follow_materialised as follow_materialised
from .saved_modules import difference as difference
from .saved_modules import with_rows as with_rows
from .sharding import is_dtensor as is_dtensor
from .storing import check_reservation as check_reservation
from .storing import check_room as check_room
from .storing import cut_and_check as cut_and_check
from .storing import cut_and_check_shapes as cut_and_check_shapes
from .storing import weights_from_pairs as weights_from_pairs
from .storing import write as write
from .swapping import has_its_sizes as has_its_sizes
from .swapping import swap_in as swap_in
from .swapping import swap_out as swap_out
from .targets import Target as Target
from .targets import as_targets as as_targets
from .targets import bypassed as bypassed
from .targets import check_target as check_target
from .targets import common_dtype as common_dtype
from .targets import device_of as device_of
from .targets import dtype_of as dtype_of
from .targets import find_heads as find_heads
from .targets import find_others as find_others
from .targets import find_targets as find_targets
from .targets import in_features as in_features
from .targets import input_embedding as input_embedding
from .targets import token_embeddings as token_embeddings
