"""Whose rows are whose in a model: what passes are given, and the batch of each.

route           a routing, and what one of its rows stands for in a batch
scopes          blocks and calls, inside which passes have rows of their own
threads         threads that were started inside a block
passes          passes in progress, and those whose backward may still come
plans           the plans that the layers of a pass share
graphs          what CUDA graphs read of the rows in force
compiled        what compiled models read of them
towers          layers whose batch is not the routed one
router          the one object of a model that all its layers ask
"""

from .passes import is_running as is_running
from .route import Expand as Expand
from .route import Route as Route
from .route import Rows as Rows
from .route import UniformRoutes as UniformRoutes
from .route import make_route as make_route
from .router import Router as Router
from .scopes import Kind as Kind
from .scopes import Scope as Scope
from .towers import MEDIA_ARGUMENT as MEDIA_ARGUMENT
from .towers import TEXT_ARGUMENTS as TEXT_ARGUMENTS
from .towers import Layout as Layout
from .towers import Place as Place
