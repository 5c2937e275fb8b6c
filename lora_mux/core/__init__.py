"""The data: what is stored of a layer's adapters, and what is asked for by a batch's rows.

    weights     one adapter's part of one layer, and what is trained of it
    pool        the rank rows of one layer's adapters, and where each adapter's are
    free_runs   which of those rank rows are free
    slots       the adapters of a model: name <-> handle <-> slot
    routing     Routing, the index and weight of a batch
    selections  names -> a Routing; and what comes with adapters into a row
    arguments   checks of the numbers and names that users give
    methods     what methods are wrapped in: a lock, and values that are computed once
    streams     what waits for what, where a device works on several streams

This room knows tensors. It knows nothing of models, and nothing of how a result is computed.
"""

from .arguments import check_counts as check_counts
from .arguments import check_names as check_names
from .arguments import check_number as check_number
from .free_runs import FreeRuns as FreeRuns
from .free_runs import Span as Span
from .methods import computed_once as computed_once
from .methods import holding as holding
from .methods import synchronized as synchronized
from .pool import BUFFERS as BUFFERS
from .pool import TABLES as TABLES
from .pool import AnyPool as AnyPool
from .pool import Gains as Gains
from .pool import Pool as Pool
from .pool import RankRows as RankRows
from .pool import Version as Version
from .routing import BASE as BASE
from .routing import NONE as NONE
from .routing import LastPass as LastPass
from .routing import Routing as Routing
from .routing import host_may_read as host_may_read
from .routing import unchecked_routing as unchecked_routing
from .routing import value_of as value_of
from .selections import Selection as Selection
from .selections import flattened as flattened
from .selections import routing_from_names as routing_from_names
from .selections import selected_adapters as selected_adapters
from .selections import weighted_adapters as weighted_adapters
from .slots import Slots as Slots
from .slots import slot_of as slot_of
from .streams import Made as Made
from .streams import Site as Site
from .streams import SomeSlots as SomeSlots
from .streams import Stream as Stream
from .streams import StreamOrder as StreamOrder
from .streams import has_streams as has_streams
from .streams import is_capturing as is_capturing
from .streams import note_stream as note_stream
from .streams import reading as reading
from .streams import site_on as site_on
from .streams import to_device as to_device
from .streams import wait_for as wait_for
from .weights import LoraWeights as LoraWeights
from .weights import Masters as Masters
from .weights import check_shape as check_shape
from .weights import is_finite as is_finite
from .weights import on_diagonal as on_diagonal
from .weights import rank_of as rank_of
from .weights import rank_rows as rank_rows
