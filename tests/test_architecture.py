"""Who may import whom: the table of rooms, read from the sources, and shown to catch a breach."""

import ast
import sys
from pathlib import Path

import pytest

from mutation import all_mutations
from paths import ROOT

PACKAGE, KERNELS = ROOT / "lora_mux", ROOT / "kernels" / "src"

# From the ground up: a folder may import the files at the root that it names, and folders that
# stand above it in this table.
ROOMS = {
    "kernels": set(),  # kernels/src, torch and triton alone
    "core": {"errors"},
    "ops": {"core", "errors", "kernels"},
    "routes": {"core", "errors", "ops"},
    "layers": {"core", "errors", "ops", "routes"},
    "configs": {"errors"},
    "checkpoints": {"configs", "core", "errors", "layers"},
    "mixes": {"checkpoints", "core", "errors"},
    "adapters": {"checkpoints", "core", "errors", "layers", "routes"},
    "model": {
        *("adapters", "checkpoints", "configs", "core", "errors"),
        *("layers", "ops", "progress", "routes"),
    },
    "measure": {"__init__", "core", "errors", "kernels", "layers", "ops", "progress"},
    "integrations": {"__init__", "core", "errors"},
    "demo": {"__init__"},  # an application: the public API only
}
# The files at the root, likewise.
FILES = {
    "errors": set(),
    "progress": set(),
    "_version": set(),
    "__init__": {"_version", "core", "errors", "layers", "mixes", "model"},
    "cli": {"__init__", "demo", "errors", "measure", "ops"},
    "__main__": {"cli"},
}
ALLOWED = ROOMS | FILES
STDLIB = set(sys.stdlib_module_names)
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "core": {"torch", "numpy"},
    "ops": {"torch", "numpy", "triton"},  # triton inside a function, to ask for its version
    "checkpoints": {"torch"},
    "progress": {"rich"},
    "integrations": {"torch", "vllm"},
    "demo": {"torch"},  # transformers, peft and rich come in when it runs, by importlib
}
# What may be imported inside a function only, so that `import lora_mux` goes without it.
LAZY = {"kernels", "triton", "vllm"}
# The one file of kernels that goes without Triton, so that it may be imported anywhere.
TENSORS = "lora_mux.kernels.tensors"
# Applications name the modules of their own rooms, and kernels are modules of jitted functions:
# their rooms hand out nothing.
MODULES = {"kernels"}
# The reference defines correctness: it shares nothing with what is judged by it.
WITHIN = {"ops/reference.py": {"core"}}
MOST_FILES, MOST_AT_ROOT, MOST_LINES = 10, 6, 400
MOST_OF_A_FUNCTION, MOST_OF_A_KERNEL = 75, 110


def sources() -> dict[str, ast.Module]:
    """Each file as a wheel has it, core/pool.py or errors.py -> its syntax tree."""
    found = {f.relative_to(PACKAGE).as_posix(): f for f in sorted(PACKAGE.rglob("*.py"))}
    found |= {f"kernels/{f.name}": f for f in sorted(KERNELS.glob("*.py"))}
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in found.items()}


def room_of(file: str) -> str:
    """The folder of a file, or the name of one at the root."""
    first, _, rest = file.partition("/")
    return first if rest else first.removesuffix(".py")


def breaches(file: str, tree: ast.Module) -> list[str]:
    """What a file imports against the table, or past what a room hands out."""
    found = []
    room, at_top = room_of(file), set(tree.body)
    for node in ast.walk(tree):
        for target in _imported(node, file):
            package, *inside = target.split(".")
            if package != "lora_mux":
                if package not in STDLIB | LIBRARIES.get(room, {"torch"}):
                    found.append(f"{file} imports {package}")
                if package in LAZY and room not in LAZY and node in at_top:
                    found.append(f"{file} imports {package} outside a function")
                continue
            other = inside[0] if inside and inside[0] in ALLOWED else "__init__"
            if other == room:
                continue
            if other not in WITHIN.get(file, ALLOWED[room]):
                found.append(f"{file} imports {other}")
            elif other in LAZY and node in at_top and not target.startswith(TENSORS):
                found.append(f"{file} imports {other} outside a function")
            elif other in ROOMS and other not in MODULES and len(inside) > 2:
                found.append(f"{file} reaches into {other}")
            elif inside and inside[-1].startswith("_") and inside[-1] != "__version__":
                found.append(f"{file} imports the private {inside[-1]} of {other}")
    return found


def _imported(node: ast.AST, file: str) -> list[str]:
    """The full names of what a statement imports: lora_mux.core.Pool, lora_mux.errors, torch."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        folders = ["lora_mux", *file.split("/")[:-1]]
        module = ".".join([*folders[: len(folders) - node.level + 1], module]).rstrip(".")
    elif module.partition(".")[0] != "lora_mux":
        return [module]
    return [f"{module}.{alias.name}" for alias in node.names]


def test_every_room_and_file_is_in_the_table() -> None:
    assert {room_of(file) for file in sources()} == ALLOWED.keys()


def test_imports_follow_the_table() -> None:
    assert not [breach for file, tree in sources().items() for breach in breaches(file, tree)]


def test_rooms_import_downwards() -> None:
    built: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed & ROOMS.keys() <= built, room
        built.add(room)


def test_files_of_a_room_import_one_another_in_no_circle() -> None:
    files = sources()
    for room in ROOMS:
        own = {Path(f).stem: tree for f, tree in files.items() if f.startswith(f"{room}/")}
        left = {
            name: {
                parts[2]
                for node in ast.walk(tree)
                for parts in [target.split(".") for target in _imported(node, f"{room}/{name}.py")]
                if parts[:2] == ["lora_mux", room] and len(parts) > 2 and parts[2] in own
            }
            - {name}
            for name, tree in own.items()
            if name != "__init__"
        }
        while left:
            free = {name for name, needed in left.items() if not needed & left.keys()}
            assert free, f"a circle in {room} among {sorted(left)}"
            left = {name: needed for name, needed in left.items() if name not in free}


PLANTED = {
    "core/pool.py imports layers": "from ..layers import MuxLinear",
    "core/pool.py imports __init__": "import lora_mux",
    "core/pool.py imports safetensors": "from safetensors import safe_open",
    "core/pool.py imports routes": "def f():\n    from lora_mux.routes import Route",
    "routes/route.py imports layers": "from .. import layers",
    "ops/reference.py imports kernels": "def f():\n    from ..kernels import shrink",
    "ops/reference.py imports errors": "from ..errors import LoraMuxError",
    "kernels/plan.py imports errors": "from ..errors import LoraMuxError",
    "demo/batch.py imports model": "from ..model import Mux",
    "model/mux.py imports peft": "def f():\n    import peft",
    "ops/dispatch.py imports kernels outside a function": "from .. import kernels",
    "ops/dispatch.py imports triton outside a function": "import triton",
    "integrations/vllm.py imports vllm outside a function": "from vllm.lora import resolver",
    "adapters/bounded.py reaches into core": "from ..core.pool import Pool",
    "adapters/bounded.py imports the private _nobody of core": "from ..core import _nobody",
    "errors.py imports core": "from .core import Pool",
}


@pytest.mark.parametrize("message", PLANTED)
def test_a_planted_breach_is_caught(message: str) -> None:
    assert breaches(message.split(" ", 1)[0], ast.parse(PLANTED[message])) == [message]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/dispatch.py", "def f():\n    from ..kernels import shrink"),
        ("ops/operators.py", "from ..kernels.tensors import Plan"),
        ("demo/batch.py", "from .encoder import Encoder\nimport lora_mux"),
        ("adapters/bounded.py", "from ..core import Pool\nfrom .resident import Adapters"),
    ],
)
def test_what_is_allowed_is_not_caught(file: str, source: str) -> None:
    assert not breaches(file, ast.parse(source))


def test_sizes() -> None:
    """A folder that a stranger can take in, files of one purpose, functions of one screen."""
    for folder in {f.parent for f in PACKAGE.rglob("*.py")}:
        most = MOST_AT_ROOT if folder == PACKAGE else MOST_FILES
        assert len(list(folder.glob("*.py"))) <= most, folder.name
    for file in [*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, file.name
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                most = MOST_OF_A_KERNEL if node.name.endswith("_kernel") else MOST_OF_A_FUNCTION
                assert node.end_lineno and node.end_lineno - node.lineno < most, (name, node.name)


def test_every_room_says_what_lives_there() -> None:
    for name, tree in sources().items():
        assert ast.get_docstring(tree), name


def test_tensors_need_neither_triton_nor_torch() -> None:
    """codegen.py compiles the kernels where torch is missing, `import lora_mux` where Triton is."""
    imported = [
        target
        for node in sources()["kernels/tensors.py"].body
        for target in _imported(node, "kernels/tensors.py")
    ]
    assert {target.partition(".")[0] for target in imported} <= STDLIB


def test_kernels_is_no_package() -> None:
    """transformers imports Hugging Face's `kernels`, and would find ours from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_mirror_the_rooms() -> None:
    folders = {f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and f.name[0] not in "._"}
    assert folders >= ROOMS.keys() and folders - ROOMS.keys() <= {"bench", "examples", "support"}


def test_mutations_are_of_lines_that_exist() -> None:
    """tests/mutate.py takes too long for every run; that it can run is cheap to see."""
    for name, mutation in all_mutations().items():
        folder = ROOT / "lora_mux"
        if mutation.file.startswith("kernels/"):
            folder = ROOT / "kernels" / "src"
        source = (folder / mutation.file.removeprefix("kernels/")).read_text(encoding="utf-8")
        assert mutation.old in source, f"{name}: {mutation.file} does not hold {mutation.old!r}"
        assert all((ROOT / "tests" / test).is_file() for test in mutation.tests), name
