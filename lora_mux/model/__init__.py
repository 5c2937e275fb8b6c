"""A whole model with adapters.

attach               attach and attach_peft, which make a Mux
mux                  Mux: everything that users do with an attached model
generation           transformers' methods that run a model in batches of their own making
continuous_batching  requests of transformers' continuous batching, each with its adapters
"""

from .attach import attach as attach
from .attach import attach_peft as attach_peft
from .mux import Mux as Mux
