"""How the adapters' part is computed: one door, and behind it the reference, the CPU and Triton.

`dispatch` is the door; what it hands out is all that other rooms use.
"""

from . import tuned as tuned
from .cpu import HostPlan as HostPlan
from .dispatch import Backend as Backend
from .dispatch import Fused as Fused
from .dispatch import Method as Method
from .dispatch import Plan as Plan
from .dispatch import Settings as Settings
from .dispatch import TiledPlan as TiledPlan
from .dispatch import add_lora as add_lora
from .dispatch import backend_reason as backend_reason
from .dispatch import capturing as capturing
from .dispatch import linear as linear
from .dispatch import method as method
from .dispatch import plan as plan
from .dispatch import tracked as tracked
