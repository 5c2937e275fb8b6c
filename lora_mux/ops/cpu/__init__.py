"""The form for the CPU: a few products, each over many rows and adapters.

plan      what the rows of a batch select, and how that is added to y
groups    which rows and slots share a product
training  the gradients of adapters that are trained
"""

from .plan import Plan as Plan
from .training import TrainingPlan as TrainingPlan
