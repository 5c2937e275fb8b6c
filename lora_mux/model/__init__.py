"""A whole model with adapters: attach, the Mux that it returns, and generation."""

from .attach import attach as attach
from .attach import attach_peft as attach_peft
from .mux import Mux as Mux
