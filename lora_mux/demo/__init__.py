"""`lora-mux demo`: one batch of a real model whose rows choose their own adapters.

all-MiniLM-L6-v2 searches Python's standard library, and four adapters, which PEFT trained, change
how it reads a query. They lie in adapters/. An application: it uses nothing but the public API.
"""

from .command import add_arguments as add_arguments
from .command import run as run
