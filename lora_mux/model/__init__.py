"""A whole model with adapters.

attach               attach and attach_peft, which make a Mux, and detach
mux                  Mux: everything that users do with an attached model
loaded               the part of a Mux that loads and keeps adapters
given_rows           the part of a Mux that runs blocks and calls under rows
trained              the part of a Mux that trains adapters
top                  hooks of the model, between which a pass has its rows
generation           methods of the model that mean something else once it is attached
continuous_batching  a folder: requests of transformers' continuous batching, with adapters each
"""

from .attach import attach as attach
from .attach import attach_peft as attach_peft
from .attach import detach as detach
from .mux import Mux as Mux
from .trained import mean_by_adapter as mean_by_adapter
