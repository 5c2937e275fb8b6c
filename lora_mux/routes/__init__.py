"""Whose rows are whose in a model: the route in force, and the batch of the forward in progress.

route           a routing, and what one of its rows stands for in a batch
uniform_routes  the routes of set_adapter: the same adapters for all rows
passes          forward passes whose backward may still come
plans           the plans that the layers of a pass share
graphs          what CUDA graphs and compiled models read of the route in force
router          the one object of a model that all its layers ask
"""

from .route import Expand as Expand
from .route import Route as Route
from .route import Rows as Rows
from .route import make_route as make_route
from .router import Router as Router
from .uniform_routes import UniformRoutes as UniformRoutes
