"""Who may import whom: the table of DESIGN, read from the sources, and shown to catch a breach."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"lora_mux": ROOT / "lora_mux", "lora_mux.kernels": ROOT / "kernels" / "src"}

# Each module, and what of the package it may import. Arrows point one way: no module is above
# itself, which `test_the_table_has_no_cycle` checks.
ALLOWED = {
    "errors": set(),
    "routing": {"errors"},
    "runs": set(),
    "pool": {"errors", "runs"},
    "targets": {"errors", "sharding"},
    "intake": {"errors", "pool", "routing", "sharding", "slots"},
    "slots": {"errors", "routing"},
    "reference": {"pool"},
    "grouped": {"pool", "reference"},
    "tiles": set(),
    "kernels": set(),
    "tuned": {"errors", "kernels"},
    "operators": {"kernels", "pool", "reference", "tiles", "tuned"},
    "ops": {
        *("errors", "grouped", "kernels", "operators"),
        *("pool", "reference", "routing", "slots", "tiles", "tuned"),
    },
    "sharding": {"errors", "grouped", "ops", "pool"},
    "route": {"errors", "routing", "slots"},
    "graphs": {"route", "routing"},
    "passes": {"route"},
    "router": {"errors", "graphs", "ops", "passes", "pool", "route", "routing", "slots"},
    "continuous": {"errors", "route", "router", "routing"},
    "generation": {"continuous", "router"},
    "linear": {
        *("errors", "grouped", "intake", "ops", "pool"),
        *("router", "routing", "sharding", "slots", "targets"),
    },
    "peft_config": {"errors"},
    "tensorfile": {"errors"},
    "stored": {"pool", "tensorfile"},
    "checkpoint": {"errors", "peft_config", "pool", "stored", "tensorfile"},
    "diffusers_file": {"checkpoint", "errors", "peft_config", "pool", "tensorfile"},
    "hub": {"checkpoint", "errors"},
    "live_peft": {"checkpoint", "errors", "peft_config", "pool", "targets"},
    "budget": {"errors", "pool"},
    "memory": set(),
    "lane": {"tensorfile"},
    "placing": {"errors", "pool", "slots"},
    "adapters": {
        *("errors", "intake", "linear", "memory", "pool", "route", "router", "slots", "stored"),
    },
    "residency": {
        *("adapters", "budget", "errors", "intake", "lane", "linear", "placing", "pool"),
        *("router", "slots", "stored", "tensorfile"),
    },
    "progress": set(),
    "mux": {
        *(
            "adapters",
            "checkpoint",
            "diffusers_file",
            "errors",
            "generation",
            "hub",
            "intake",
            "linear",
            "memory",
        ),
        *("ops", "pool", "progress", "residency", "route", "router", "routing", "slots"),
        "targets",
    },
    "attach": {"budget", "errors", "linear", "live_peft", "mux", "ops", "targets"},
    "_version": set(),
    "__init__": {"_version", "attach", "errors", "linear", "mux", "routing"},
    "demo": {"__init__"},  # an application: the public API only
    "measure": {"__init__", "errors", "kernels", "linear", "progress", "routing", "tuned"},
    "cli": {"__init__", "demo", "errors", "measure", "ops"},
    "__main__": {"cli"},
}
STDLIB = set(sys.stdlib_module_names)
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "routing": {"torch", "numpy"},
    "slots": {"torch", "numpy"},
    "grouped": {"torch", "numpy"},
    "ops": {"torch", "triton"},  # triton inside a function, to ask for its version
    "diffusers_file": {"torch"},
    "tensorfile": {"torch", "safetensors"},
    "progress": {"rich"},
    "demo": {"torch"},  # transformers, peft and rich come in when it runs, by importlib
}
# What may be imported inside a function only, so that `import lora_mux` goes without it.
LAZY = {"kernels"}


def modules() -> dict[str, list[ast.Module]]:
    """Each module of the table -> its syntax trees (a subpackage is one module)."""
    found: dict[str, list[ast.Module]] = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            name = inside.parts[0] if len(inside.parts) > 1 else inside.stem
            name = "kernels" if package == "lora_mux.kernels" else name
            found.setdefault(name, []).append(ast.parse(file.read_text(encoding="utf-8")))
    return found


def breaches(name: str, tree: ast.Module, depth: int = 1) -> list[str]:
    """What `tree`, a file `depth` packages below the root, imports against the table."""
    found = []
    at_top = set(tree.body)
    for node in ast.walk(tree):
        for module in _imported(node, depth):
            root, _, rest = module.partition(".")
            if root != "lora_mux":
                if root not in STDLIB | LIBRARIES.get(name, {"torch"}):
                    found.append(f"{name} imports {root}")
                continue
            inner = rest.partition(".")[0] or "__init__"
            if inner == name:
                continue
            if inner not in ALLOWED[name]:
                found.append(f"{name} imports {inner}")
            elif inner in LAZY and node in at_top:
                found.append(f"{name} imports {inner} outside a function")
    return found


def _imported(node: ast.AST, depth: int) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        if node.module != "lora_mux":
            return [node.module or ""]
    elif node.level < depth:
        return []  # inside the subpackage
    elif node.module:
        return [f"lora_mux.{node.module}"]
    # from lora_mux import x: a module when there is one of that name
    return [f"lora_mux.{a.name}" if a.name in ALLOWED else "lora_mux" for a in node.names]


def depth_of(name: str) -> int:
    return 2 if name in ("demo", "kernels", "measure") else 1


def test_every_module_is_in_the_table() -> None:
    assert modules().keys() == ALLOWED.keys()


def test_imports_follow_the_table() -> None:
    found = [
        b
        for name, trees in modules().items()
        for t in trees
        for b in breaches(name, t, depth_of(name))
    ]
    assert not found


def test_the_table_has_no_cycle() -> None:
    left = {name: set(allowed) for name, allowed in ALLOWED.items()}
    while left:
        free = {name for name, allowed in left.items() if not allowed & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: allowed for name, allowed in left.items() if name not in free}


def test_breaches_are_caught() -> None:
    planted = {
        "reference imports kernels": ("reference", "def f():\n    from .kernels import shrink"),
        "reference imports ops": ("reference", "from . import ops"),
        "pool imports linear": ("pool", "from .linear import MuxLinear"),
        "pool imports __init__": ("pool", "import lora_mux"),
        "routing imports slots": ("routing", "from lora_mux.slots import Slots"),
        "kernels imports errors": ("kernels", "from ..errors import LoraMuxError"),
        "demo imports mux": ("demo", "from ..mux import Mux"),
        "mux imports peft": ("mux", "def f():\n    import peft"),
        "pool imports safetensors": ("pool", "from safetensors import safe_open"),
        "ops imports kernels outside a function": ("ops", "from . import kernels"),
    }
    for message, (name, source) in planted.items():
        assert breaches(name, ast.parse(source), depth_of(name)) == [message]
    allowed = {"ops": "def f():\n    from .kernels import shrink", "demo": "from .batch import Row"}
    for name, source in allowed.items():
        assert not breaches(name, ast.parse(source), depth_of(name))


def test_kernels_is_no_package() -> None:
    """transformers imports Hugging Face's `kernels`, and would find ours from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_mutations_are_of_lines_that_exist() -> None:
    """tests/mutate.py takes too long for every run; that it can run is cheap to see."""
    import mutate

    for name, mutation in mutate.MUTATIONS.items():
        folder = mutate.ROOT / "lora_mux"
        if mutation.file.startswith("kernels/"):
            folder = mutate.ROOT / "kernels" / "src"
        source = (folder / mutation.file.removeprefix("kernels/")).read_text(encoding="utf-8")
        assert mutation.old in source, f"{name}: {mutation.file} does not hold {mutation.old!r}"
