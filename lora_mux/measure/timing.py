"""How long calls take: interleaved runs, on a GPU as CUDA graphs with a cold L2 cache.

On a GPU each call is captured over several sets of buffers, so that L2 no longer holds a set when
its turn comes again, and then replayed; the median counts. On a CPU the minimum by the wall clock
counts: beside other processes minima stay within a few percent, while medians double.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

SECONDS = 3.0  # for the runs of all calls together, on a CPU

Call = Callable[[int], object]  # does its work on the n-th set of buffers
Times = dict[str, float]  # "min", "p20", "p50", "p80" in microseconds, and "runs": how many


def microseconds(
    calls: Mapping[str, Call],
    sets: int,
    device: torch.device,
    runs: int = 100,
    *,
    seconds: float = SECONDS,
    least: int = 3,
) -> dict[str, Times]:
    """name -> times of one call, over runs that go through all sets of buffers.

    The runs of all calls are interleaved, so that clocks and neighbours hit all of them alike, and
    shuffled: always after the one that empties the caches, a call of 0.3 ms takes 10 % longer.

    Args:
        calls: The calls by name.
        sets: How many sets of buffers there are.
        device: Where the calls do their work: a CUDA or ROCm GPU, or a CPU.
        runs: Of each call; on a CPU the most.
        seconds: On a CPU, when to stop: after this long for all calls together.
        least: On a CPU, the fewest runs of each call, however long they take.
    """
    cuda = device.type == "cuda"
    timers = {name: (graph if cuda else _wall)(call, sets) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(runs) if cuda else _while_seconds(seconds, at_least=least, at_most=runs):
        for name in shuffled.sample(list(timers), len(timers)):
            samples[name].append(timers[name]() / sets)
    return {name: _summary(values) for name, values in samples.items()}


def sets_for_cold_l2(bytes_of_a_call: int, device: torch.device) -> int:
    """How many sets of buffers it takes to fill L2 four times: then none is still in it."""
    if device.type != "cuda":
        return 1
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, -(-4 * l2 // max(bytes_of_a_call, 1))))


def graph(call: Call, sets: int) -> Callable[[], float]:
    """A timer of one replay over all sets, in microseconds."""
    # One stream throughout: SGLang keys its scratch by stream, and may not allocate in a capture.
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(2):
            for n in range(sets):
                call(n)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for n in range(sets):
            call(n)
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        # Keep the queue busy: on an idle stream the gap before the launch would be timed as well.
        torch.cuda._sleep(20_000)  # type: ignore[no-untyped-call]
        start.record()
        captured.replay()
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


def _while_seconds(seconds: float, at_least: int, at_most: int) -> Iterator[int]:
    end = time.perf_counter() + seconds
    for run in range(at_most):
        if run >= at_least and time.perf_counter() > end:
            return
        yield run


def _summary(values: Sequence[float]) -> Times:
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    middle = statistics.median(values)
    return {"min": min(values), "p20": p20, "p50": middle, "p80": p80, "runs": len(values)}
