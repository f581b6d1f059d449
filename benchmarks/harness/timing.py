"""Times of calls: CUDA-graph replays measured by events, alternatives taken in turn; host clocks on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

#: A graph is filled with calls until it lasts this long: its launch must not show.
GRAPH_US = 250.0
MOST_CALLS = 64


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of one call: percentiles over the repeats, each of which is a mean over the calls of a graph."""

    p20: float
    p50: float
    p80: float
    repeats: int
    calls: int
    timer: str


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(values: Sequence[float], calls: int, timer: str) -> Times:
    """Percentiles of the microseconds of single calls."""
    p20, p50, p80 = (percentile(values, share) for share in (0.2, 0.5, 0.8))
    return Times(p20, p50, p80, len(values), calls, timer)


@dataclasses.dataclass
class Timed:
    """A call made ready to be timed: ``run`` does it ``calls`` times over its sets of operands."""

    run: Callable[[], object]
    calls: int
    timer: str
    once_us: float  # an estimate
    call: object = None  # kept alive: a graph knows addresses only, and other captures give freed memory back


def prepare(call: Callable[[int], object], sets: int, device: torch.device) -> Timed:
    """Warm a call up and capture it; ``call(i)`` runs on the i-th set of operands.

    On CUDA the calls of one graph go round the sets. Their results are kept until each set has had its turn, so that
    they lie in memory of their own. Where a capture fails the plain calls are timed, and ``timer`` says so.
    """
    for i in range(3):
        call(i % sets)
    if device.type != "cuda":
        start = time.perf_counter()
        call(0)
        return Timed(lambda: call(0), 1, "host clock", 1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize(device)
    try:
        graph = _capture(call, sets, sets)
        once = _estimate(graph.replay) / sets
        calls = min(max(sets, math.ceil(GRAPH_US / once)), max(sets, MOST_CALLS))
        if calls > sets:
            graph = _capture(call, sets, calls)
        return Timed(graph.replay, calls, "graph", once, call)
    except Exception as error:  # operations that synchronise, or that refuse to be captured
        torch.cuda.synchronize(device)  # raises where the device is lost
        once = _estimate(lambda: call(0))
        calls = max(1, min(MOST_CALLS, math.ceil(GRAPH_US / once)))

        def run() -> None:
            for i in range(calls):
                call(i % sets)

        return Timed(run, calls, f"events, capture failed: {type(error).__name__}", once)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all captures: cuBLAS keeps a workspace for every stream


def _capture(call: Callable[[int], object], sets: int, calls: int) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), _side_stream()
    results: list[object] = [None] * sets
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # handles and autograd's streams exist before the capture begins
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            results[i % sets] = call(i % sets)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _estimate(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return max(1e3 * start.elapsed_time(end), 0.1)


def take_turns(
    timed: Sequence[Timed], device: torch.device, seconds: float, least: int = 20, most: int = 60
) -> list[Times]:
    """Time all of them in turn, so that a change of the clocks meets all alike.

    Args:
        timed: what to time.
        device: where.
        seconds: how long it may take, at least ``least`` repeats being made.
        least: repeats of each at least.
        most: repeats of each at most.
    """
    if not timed:
        return []
    one_turn = 1e-6 * sum(t.once_us * t.calls for t in timed)
    repeats = max(least, min(most, int(seconds / max(one_turn, 1e-9))))
    if device.type != "cuda":
        found: list[list[float]] = [[] for _ in timed]
        for _ in range(repeats):
            for values, t in zip(found, timed, strict=True):
                start = time.perf_counter()
                t.run()
                values.append(1e6 * (time.perf_counter() - start) / t.calls)
        return [summary(v, t.calls, t.timer) for v, t in zip(found, timed, strict=True)]
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in timed] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for turn in events:
        # The host runs ahead while the device waits: no gap between an event and the launch that follows it.
        torch.cuda._sleep(500_000)
        for (start, end), t in zip(turn, timed, strict=True):
            start.record()
            t.run()
            end.record()
        torch.cuda.synchronize(device)
    return [
        summary([1e3 * turn[i][0].elapsed_time(turn[i][1]) / t.calls for turn in events], t.calls, t.timer)
        for i, t in enumerate(timed)
    ]


def eager_us(call: Callable[[int], object], sets: int, device: torch.device, calls: int = 50) -> float:
    """Microseconds of a plain call in a row of calls, host work included, by the host's clock."""
    for i in range(5):
        call(i % sets)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for i in range(calls):
        call(i % sets)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - start) / calls
