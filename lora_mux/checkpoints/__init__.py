"""Adapters as others saved them: PEFT's folders, diffusers' files, the hub, a live PeftModel.

A checkpoint comes from strangers: everything in it is checked before it is believed.
"""

from .diffusers_file import read_diffusers as read_diffusers
from .hub import local_folder as local_folder
from .live_peft import read_live as read_live
from .live_peft import unload as unload
from .peft_folder import CONFIG as CONFIG
from .peft_folder import DIFFUSERS as DIFFUSERS
from .peft_folder import read_checkpoint as read_checkpoint
from .safetensors_file import Block as Block
from .stored_adapter import Stored as Stored
from .stored_adapter import kept as kept
