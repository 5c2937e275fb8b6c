"""Whose rows are whose in a model: the route in force, and the batch of the forward in progress."""

from .route import Expand as Expand
from .route import Route as Route
from .route import Rows as Rows
from .route import make_route as make_route
from .router import Router as Router
