"""On a real GPU: adapters come and go on one stream while passes with others run on another."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.measure.timing import no_syncs

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
NAMES = "abcdef"
WIDTH, RANK = 512, 16
CYCLES = 100_000_000  # of the GPU's clock: about 50 ms, in which the host is far ahead


def model_of_layers() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    return nn.Sequential(*layers).to(CUDA).requires_grad_(False)


def factors(seed: int, layers: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        str(i): (
            torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5,
            torch.randn(WIDTH, RANK, generator=generator) / RANK**0.5,
        )
        for i in range(layers)
    }


def attached(adapters_at_once: int | None) -> tuple[nn.Module, lora_mux.Mux]:
    """A model with adapters a to f, and room for so many of them; None = for all."""
    model = model_of_layers()
    row = 4 * (4 * 2 * WIDTH + 1)
    memory = None if adapters_at_once is None else adapters_at_once * RANK * row
    mux = lora_mux.attach(model, memory=memory)
    for seed, name in enumerate(NAMES):
        mux.add_adapter(name, factors(seed, len(model)), alpha=RANK)  # type: ignore[arg-type]
    return model, mux


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The answer of each adapter, by pools that hold all."""
    model, mux = attached(None)
    x = torch.linspace(-1, 1, 3 * WIDTH, device=CUDA).reshape(3, WIDTH)
    answers = {}
    with torch.no_grad():
        for name in NAMES:
            with mux.route([name] * 3):
                answers[name] = model(x)
    torch.cuda.synchronize()
    return answers


@pytest.mark.parametrize("entered", ["inside", "outside"])
def test_adapters_swapped_under_passes_on_a_side_stream(
    expected: dict[str, Tensor], entered: str
) -> None:
    """A long kernel comes first, so that all copies are given before the passes have begun."""
    model, mux = attached(2)
    x = torch.linspace(-1, 1, 3 * WIDTH, device=CUDA).reshape(3, WIDTH)
    compute: Any = torch.cuda.Stream()
    got: list[tuple[str, Tensor]] = []

    def step(name: str) -> None:
        with torch.cuda.stream(compute), torch.no_grad():
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
            got.append((name, model(x)))

    torch.cuda.synchronize()
    for i in range(18):
        name = NAMES[i * i % len(NAMES)] if i % 3 else NAMES[i % len(NAMES)]
        if entered == "inside":  # as transformers' continuous batching
            mux.call([name] * 3)(step, name)
        else:
            with torch.cuda.stream(compute), mux.route([name] * 3):
                step(name)
        mux.prefetch([NAMES[(i + 1) % len(NAMES)]])
    torch.cuda.synchronize()
    for name, y in got:
        torch.testing.assert_close(y, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_prefetch_travels_while_a_pass_computes(expected: dict[str, Tensor]) -> None:
    """Neither the host nor the pass waits for it, and it does not wait for the pass."""
    model, mux = attached(2)
    x = torch.linspace(-1, 1, 3 * WIDTH, device=CUDA).reshape(3, WIDTH)
    with torch.no_grad():
        for name in "ba":  # b goes first
            with mux.route([name] * 3):
                model(x)
        mux.prefetch(["c"])  # pinned memory is there from now on
        mux.prefetch(["a", "b"])
        with mux.route(["b"] * 3):
            model(x)
        torch.cuda.synchronize()
        ended: Any = torch.cuda.Event()
        with no_syncs():
            torch.cuda._sleep(20 * CYCLES)  # type: ignore[no-untyped-call]
            with mux.route(["b"] * 3):
                y = model(x)
            ended.record()
            mux.prefetch(["c"])  # in the place of a
        side: Any = torch.cuda.Stream()
        (copies,) = mux._adapters._streams.values()  # type: ignore[attr-defined]
        side.wait_stream(copies)
        side.synchronize()  # c is there
        assert not ended.query(), "the copy has waited for the pass"
        with mux.route(["c"] * 3):
            z = model(x)
    for answer, name in ((y, "b"), (z, "c")):
        torch.testing.assert_close(answer, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_route_for_each_step_does_not_stop_the_host(expected: dict[str, Tensor]) -> None:
    model, mux = attached(None)
    x = torch.linspace(-1, 1, 3 * WIDTH, device=CUDA).reshape(3, WIDTH)
    rows = [[NAMES[(i + j) % len(NAMES)] for j in range(3)] for i in range(8)]
    with torch.no_grad():
        with mux.route(["a", "b", "c"]):
            model(x)
        torch.cuda.synchronize()
        answers = []
        with no_syncs():
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
            for names in rows:
                mux.set_route(names)
                answers.append(model(x))
                with mux.route(names):
                    answers.append(model(x))
                mux.set_adapter(None)
                answers.append(model(x, adapter_names=names))
    for i, y in enumerate(answers):
        names = rows[i // 3]
        want = torch.stack([expected[name][j] for j, name in enumerate(names)])
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_adapters_come_and_go_between_replays(expected: dict[str, Tensor]) -> None:
    model, mux = attached(2)
    x = torch.linspace(-1, 1, 3 * WIDTH, device=CUDA).reshape(3, WIDTH)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), mux.route(["a"] * 3):
        model(x)
        with torch.cuda.graph(graph):
            y = model(x)
    got = []
    for name in "bcdefa" * 2:
        with mux.route([name] * 3):
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
            graph.replay()
            got.append((name, y.clone()))
    for name, answer in got:
        torch.testing.assert_close(answer, expected[name], rtol=1e-4, atol=1e-4)
