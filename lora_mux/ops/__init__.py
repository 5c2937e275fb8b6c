"""How the adapters' part is computed: one door, and behind it the reference, the CPU and Triton.

dispatch       the door: chooses a form, and makes the plan of a forward pass
forms          the forms, and what a plan of any form can do
reference      the formula as einsums, which defines correctness
cpu            the form for the CPU: a few products, each over many rows and adapters
tiled          plans for the operators
eager          what they do without operators, where nothing looks on
operators      torch.library: plan, add_lora, add_lora_, linear, and gradients
on_triton      what they launch
operands       what they take besides their own tensors
plan_in_torch  the operators' plan where no kernel runs
tuned          tables of measured Configs
"""

from . import tuned as tuned
from .dispatch import WHOLE as WHOLE
from .dispatch import AnyPlan as AnyPlan
from .dispatch import Backend as Backend
from .dispatch import Fused as Fused
from .dispatch import Settings as Settings
from .dispatch import WholePlan as WholePlan
from .dispatch import backend_reason as backend_reason
from .dispatch import capturing as capturing
from .dispatch import like as like
from .dispatch import method as method
from .dispatch import plan as plan
from .forms import Form as Form
from .forms import Method as Method
from .forms import Plan as Plan
from .forms import dropped as dropped
from .forms import tracked as tracked
from .operands import has_changed as has_changed
from .tiled import FusedPlan as FusedPlan
