"""How long things take on this machine: the commands `lora-mux bench` and `lora-mux tune`.

`bench` times a layer of the user's sizes with and without adapters; `tune` looks for the kernels'
best tiles on a GPU. Both measure by `timing`, and `provenance` says where a figure comes from. The
scripts in bench/ use those two as well.
"""

from . import bench as bench
from . import provenance as provenance
from . import timing as timing
from . import tune as tune
