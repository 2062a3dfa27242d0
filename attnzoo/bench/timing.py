"""Times of functions beside one another, such that equal ones come out equal.

A GPU lowers its clock with the power that it drew in the last moments: who follows a frugal kernel is faster by 5 to
10 % than who follows a hungry one. So each function is timed in many short turns, every turn in another random order,
after some that do not count, and the median of the turns is its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from statistics import median

import torch

TURNS = 12  # at least
MOST = 40
SECONDS = 1.0  # that turns go on for, if there are fewer than MOST
WARM = 0.4  # seconds of turns that do not count
CALLS = 4  # timed in each turn, after one that is not
FLUSHED = 256 << 20  # bytes that are written before each call, to leave nothing of it in the L2 cache
WAIT = 2_000_000  # clock cycles, a millisecond: more than any host needs for a call

Clock = Callable[[Callable[[], object]], Callable[[], float]]


def in_turns(functions: Sequence[Callable[[], object]], clock: Clock | None = None) -> list[list[float]]:
    """Milliseconds of one call of each function, a number for each turn.

    Args:
        functions: what is timed; launches on the current stream, for one.
        clock: starts a function some times, and returns what later gives the milliseconds of one; by default CUDA
            events around calls with a cold L2 cache.
    """
    clock = clock or _gpu_clock()
    random = Random(0)
    taken: list[list[float]] = [[] for _ in functions]
    counts, started = False, time.perf_counter()
    while True:
        order = random.sample(range(len(functions)), len(functions))
        found = [(at, clock(functions[at])) for at in order]
        for at, read in found:  # only here, so that the host launches a turn ahead of the GPU
            milliseconds = read()
            if counts:
                taken[at].append(milliseconds)
        passed = time.perf_counter() - started
        if not counts and passed >= WARM:
            counts, started = True, time.perf_counter()
        elif not functions or (len(taken[0]) >= TURNS and (passed >= SECONDS or len(taken[0]) >= MOST)):
            return taken


def one_call(function: Callable[[], object], calls: int = 50) -> tuple[float, float]:
    """Median milliseconds of a call with a cold L2 cache, on the device and on the host.

    The device waits before each call until all of it has been launched, so that a busy host makes no kernel look slow.
    """
    cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    events, host = [], []
    for number in range(calls + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(WAIT)
        begin.record()
        started = time.perf_counter()
        function()
        host.append((time.perf_counter() - started) * 1e3)
        end.record()
        events.append((begin, end))
        if number % 8 == 7:
            torch.cuda.synchronize()  # a full queue would keep the host waiting
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events[5:]), median(host[5:])


def spread(taken: Sequence[float]) -> float:
    """How far the middle half of the turns lies apart, over their median."""
    ordered = sorted(taken)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / median(ordered)


def _gpu_clock() -> Clock:
    cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")

    def run(function: Callable[[], object]) -> Callable[[], float]:
        function()
        events = []
        for _ in range(CALLS):
            cache.zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            function()
            events[-1][1].record()

        def read() -> float:
            events[-1][1].synchronize()
            return median(begin.elapsed_time(end) for begin, end in events)

        return read

    return run
