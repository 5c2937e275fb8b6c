"""What all tests share: no network, one seed, and Triton's interpreter where there is no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two workers of pytest-xdist on two cores: threads of both would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Read when triton is imported. On a GPU machine the same tests run with TRITON_INTERPRET=1 given
# from outside; without it the tests marked gpu do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` looks into files that have such tests: others want packages that may be missing."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from lora_mux.kernels.installed import PROBLEM  # imports triton

    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a long sweep: run with --slow"))
        if "gpu" in item.keywords and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, without TRITON_INTERPRET"))
        if "interpreter" in item.keywords and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
        if "interpreter" in item.keywords and PROBLEM:
            item.add_marker(pytest.mark.skip(reason=f"needs triton {PROBLEM}"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter in a third of the time."""
    from lora_mux.kernels.installed import PROBLEM

    if not INTERPRETED or PROBLEM:
        yield
        return
    from quick_interpreter import without_repetitions

    with without_repetitions():
        yield


@pytest.fixture
def no_old_graphs() -> Iterator[None]:
    """torch.compile knows nothing of earlier tests, nor have they been counted."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", "reference"])
def each_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """The two forms on the CPU: the reference runs where autograd follows the base's weight."""
    with torch.set_grad_enabled(request.param == "reference"):
        yield


@pytest.fixture(scope="module")
def mended() -> Iterator[None]:
    """The interpreter's bf16, put right."""
    from interpreter import mend_bf16

    with mend_bf16():
        yield


@pytest.fixture
def quiet() -> Iterator[None]:
    """Infinities are what some tests are about; numpy would warn, as a GPU does not."""
    with np.errstate(all="ignore"):
        yield


GARBAGE = 0x3FFFFFF0  # a slot, a place or a length that no tensor holds


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate holds NaN and garbage until a kernel writes it."""
    new_empty = Tensor.new_empty

    def new_poisoned(self: Tensor, *size: Any, **how: Any) -> Tensor:
        made = new_empty(self, *size, **how)
        if "device" in how:  # the interpreter's own
            return made
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(min(GARBAGE, torch.iinfo(made.dtype).max - 15))

    monkeypatch.setattr(Tensor, "new_empty", new_poisoned)
