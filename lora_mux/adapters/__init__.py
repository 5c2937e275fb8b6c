"""The adapters of one attached model: names, handles and rank rows, changed from any thread.

resident         Adapters: all of them are in the pools, which grow
training         those that are trained, and when their values reach the pools
trained_adapter  the parameters of one of them, and the steps of optimizers
writing          how pools are written while others read them, and what is trained into them
changes          changes that an interrupt may end at any line
bounded          BoundedAdapters: pools of a fixed size; the other adapters wait on the host
placement        which adapters make room for others, and which move
memory           how many rank rows a number of bytes buys, and how much the adapters take
"""

from .bounded import BoundedAdapters as BoundedAdapters
from .changes import Prepared as Prepared
from .changes import Promise as Promise
from .memory import MemoryReport as MemoryReport
from .memory import parse_size as parse_size
from .resident import Adapters as Adapters
from .resident import AnyRoute as AnyRoute
from .trained_adapter import TrainedAdapter as TrainedAdapter
