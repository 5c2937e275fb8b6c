"""Linear layers that carry adapters: which layers can, how one is split, what it stores."""

from .linear import MuxLinear as MuxLinear
from .linear import follow_materialised as follow_materialised
from .storing import check_fit as check_fit
from .storing import check_reservation as check_reservation
from .storing import check_room as check_room
from .storing import checked as checked
from .storing import scaling_from as scaling_from
from .storing import store as store
from .storing import write as write
from .swapping import swap_in as swap_in
from .swapping import swap_out as swap_out
from .targets import Target as Target
from .targets import check_linear as check_linear
from .targets import dtype_of as dtype_of
from .targets import find_targets as find_targets
