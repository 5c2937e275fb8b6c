"""Launches without torch's dispatcher, where nothing looks on.

again      launches that are kept by their case, and made again
training   a layer whose adapters are trained, as one node for autograd
"""

from .again import add_now as add_now
from .again import again_for as again_for
from .again import keep as keep
from .again import kinds as kinds
from .again import plan_now as plan_now
from .again import pointers_of as pointers_of
from .again import rows_now as rows_now
from .training import TrainedHere as TrainedHere
from .training import layer as layer
