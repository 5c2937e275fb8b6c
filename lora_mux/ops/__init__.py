"""How the adapters' part is computed: one door, and behind it the reference, the CPU and Triton.

`dispatch` is the door: it chooses a form and makes the plan of a forward pass, and the plan adds
the adapters to each layer. Other rooms use only what is handed out here.
"""

from . import tuned as tuned
from .dispatch import AnyPlan as AnyPlan
from .dispatch import Backend as Backend
from .dispatch import Fused as Fused
from .dispatch import Settings as Settings
from .dispatch import backend_reason as backend_reason
from .dispatch import capturing as capturing
from .dispatch import method as method
from .dispatch import plan as plan
from .forms import Form as Form
from .forms import Method as Method
from .forms import Plan as Plan
from .forms import tracked as tracked
from .tiled import FusedPlan as FusedPlan
