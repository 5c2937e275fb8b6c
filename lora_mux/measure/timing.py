"""How long calls take: interleaved runs, on a GPU as CUDA graphs with a cold L2 cache.

On a GPU each call is captured over several sets of buffers, so that L2 no longer holds a set when
its turn comes again, and then replayed; the median counts. A call that syncs cannot be captured: it
is timed as it is, its host's share included. On a CPU the minimum by the wall clock counts: beside
other processes minima stay within a few percent, while medians double.
"""

import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

SECONDS = 3.0  # for the runs of all calls together, on a CPU
# Cycles that the GPU sleeps before a timed replay, about 0.3 ms: launching a graph takes the host
# 10 to 100 us, and on a queue that ran dry the gap would be timed as well.
SLEEP = 500_000
MOST_SETS = 64  # of buffers; making them takes time and memory too

Call = Callable[[int], object]  # does its work on the n-th set of buffers
# "min", "p20", "p50", "p80" in microseconds; "runs": how many; on a GPU "syncs": 1 = the call makes
# the host wait, so that it was timed without a graph.
Times = dict[str, float]
Timer = Callable[[], float]  # one run through all sets of buffers, in microseconds


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
    timer = _on_gpu if cuda else _wall
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    with torch.cuda.device(device) if cuda else nullcontext():  # streams are of the current one
        made = {name: timer(call, sets) for name, call in calls.items()}
        timers = {name: run for name, (run, _) in made.items()}
        for _ in range(runs) if cuda else _while_seconds(seconds, at_least=least, at_most=runs):
            for name in shuffled.sample(list(timers), len(timers)):
                samples[name].append(timers[name]() / sets)
    return {name: _summary(values) | made[name][1] for name, values in samples.items()}


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_for_cold_l2(bytes_of_a_call: int, device: torch.device) -> int:
    """How many sets of buffers it takes to fill L2 twice: then none is still in it.

    Args:
        bytes_of_a_call: That each call must read or write; what it does not touch keeps nothing
            cold, and does not count.
    """
    if device.type != "cuda":
        return 1
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, -(-2 * l2 // max(bytes_of_a_call, 1))))


def syncs(call: Callable[[], object]) -> bool:
    """Whether a call, made before, makes the host wait for the GPU: then no graph can hold it.

    Asked of torch, not found by capturing: a capture that fails corrupts the allocator of torch
    2.11, and leaves its stream current.
    """
    try:
        with no_syncs():
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    return False


@contextmanager
def no_syncs() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode(mode)


def _on_gpu(call: Call, sets: int) -> tuple[Timer, Times]:
    """A timer, of a graph's replay if one can be, and whether the call syncs."""
    # One stream throughout: SGLang keys its scratch by stream, and may not allocate in a capture.
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # that made the buffers

    def through_all_sets() -> None:
        for n in range(sets):
            call(n)

    with torch.cuda.stream(stream):
        for _ in range(2):
            through_all_sets()
        torch.cuda.synchronize()
        waits = syncs(lambda: call(0))
        run = through_all_sets if waits else _graph(through_all_sets, stream)
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return 1e3 * elapsed

    timed()
    return timed, {"syncs": waits}


def _graph(call: Callable[[], None], stream: Any) -> Callable[[], None]:
    """The replay of a call, captured on that stream."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        call()
    replay: Callable[[], None] = captured.replay
    return replay


def _wall(call: Call, sets: int) -> tuple[Timer, Times]:
    def timed() -> float:
        start = time.perf_counter()
        for n in range(sets):
            call(n)
        return 1e6 * (time.perf_counter() - start)

    return timed, {}


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
