"""The adapters of one attached model: names, handles and rank rows, changed from any thread.

resident       Adapters: all of them are in the pools, which grow
training       those that are trained: their parameters, and how values reach the pools
writing        how pools are written while others read them
changes        changes that an interrupt may end at any line
bounded        BoundedAdapters: pools of a fixed size; the other adapters wait on the host
placement      which adapters make room for others, and which move
memory_budget  how many rank rows a number of bytes buys
memory_report  how much memory the adapters take
"""

from .bounded import BoundedAdapters as BoundedAdapters
from .changes import Prepared as Prepared
from .changes import Promise as Promise
from .memory_budget import parse_size as parse_size
from .memory_report import MemoryReport as MemoryReport
from .resident import Adapters as Adapters
from .resident import AnyRoute as AnyRoute
from .training import TrainedAdapter as TrainedAdapter
