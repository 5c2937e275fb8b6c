"""Whether the triton that is installed can compile the kernels.

Answered once, when this file is imported: torch.compile traces what asks for the answer, and warns
of a function with a cache.
"""

import importlib.util

OLDEST = "3.6"  # that the kernels were compiled and checked with; 3.2 lacks tl.gather


def problem() -> str:
    """What is needed, and what is there instead; "" when it can."""
    needed = f"{OLDEST} or newer, "
    if importlib.util.find_spec("triton") is None:
        return needed + "which is not installed"
    import triton

    installed: str = triton.__version__
    numbers = [int(number) for number in installed.split(".")[:2]]
    oldest = [int(number) for number in OLDEST.split(".")]
    return f"{needed}got {installed}" if numbers < oldest else ""


PROBLEM = problem()
