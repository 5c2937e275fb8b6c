"""Microseconds of a function on a GPU: CUDA-graph replay, L2 cold, medians of interleaved runs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[int], object]  # does its work on the n-th set of buffers


def microseconds(
    calls: Mapping[str, Call], sets: int, device: torch.device, runs: int = 100
) -> dict[str, dict[str, float]]:
    """name -> {"p20", "p50", "p80"} of one call, each over `sets` sets of buffers in turn.

    The runs of all calls are interleaved in changing order, so that clocks and neighbours hit all
    of them alike. Without a GPU the clock on the wall is read: to try a script, not to publish.
    """
    cuda = device.type == "cuda"
    timers = {name: (_graph if cuda else _wall)(call, sets) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs if cuda else 3):
        names = list(timers)
        for name in names[run % len(names) :] + names[: run % len(names)]:
            samples[name].append(timers[name]() / sets)
    return {name: _percentiles(values) for name, values in samples.items()}


def sets_for_cold_l2(bytes_of_a_call: int, device: torch.device) -> int:
    """How many sets of buffers make sure that none is still in L2: four times its size."""
    if device.type != "cuda":
        return 1
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-4 * l2 // max(bytes_of_a_call, 1))))


def _graph(call: Call, sets: int) -> Callable[[], float]:
    """A timer of one replay over all sets."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for n in range(sets):
            call(n)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(sets):
            call(n)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return 1e3 * elapsed

    timed()
    return timed


def _wall(call: Call, sets: int) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        for n in range(sets):
            call(n)
        return 1e6 * (time.perf_counter() - start)

    return timed


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    p20, p40, p60, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(values), "p80": p80}
