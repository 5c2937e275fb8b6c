"""Adapters as other libraries save them. They come from strangers: everything is checked.

peft_folder       PEFT's folders, adapter_config.json + adapter_model.safetensors
peft_writer       the same, written
peft_model        a PeftModel in memory
beside_factors    what else PEFT saves, in either: whole modules, biases and tokens
diffusers_file    the LoRA file of a diffusers pipeline
base_model        the model that a checkpoint is for: its layers, by which names, and its weights
opened_folder     a folder, here or on the hub, that its owner may change while it is read
safetensors_file  one file of tensors: its header, and the values that are needed
stored_adapter    an adapter that is not in the pools: in a file, or packed on the host
"""

from .base_model import BaseModel as BaseModel
from .diffusers_file import is_diffusers_folder as is_diffusers_folder
from .diffusers_file import read_diffusers_file as read_diffusers_file
from .opened_folder import local_folder as local_folder
from .peft_folder import read_peft_folder as read_peft_folder
from .peft_model import read_peft_model as read_peft_model
from .peft_model import retire_peft as retire_peft
from .peft_model import without_peft as without_peft
from .peft_writer import saved_key as saved_key
from .peft_writer import write_peft_folder as write_peft_folder
from .stored_adapter import Outline as Outline
from .stored_adapter import PackedTensors as PackedTensors
from .stored_adapter import StoredAdapter as StoredAdapter
from .stored_adapter import copy_to_host as copy_to_host
