"""The adapters of one attached model: all of them resident, or as many as the memory holds."""

from .bounded import BoundedAdapters as BoundedAdapters
from .memory_budget import bytes_of as bytes_of
from .memory_report import Memory as Memory
from .resident import Adapters as Adapters
