"""One timer for every benchmark: the contestants of a row take turns, and each is judged by its median.

The clock of a machine wanders by more than the differences of interest, so contestants are never timed one after the
other: every round samples each of them once, starting with another one.  A contestant says itself how long its work
took, so that calls on the host, loops in C and work on a device that needs events all take part.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """`measure(repeats)` does the work `repeats` times and returns the seconds; `terms` is the work of one time."""

    name: str
    terms: float
    measure: Callable[[int], float]


@dataclass(frozen=True)
class Timing:
    """Median seconds of one time; `spread` is half the distance between the quartiles over the median."""

    seconds: float
    spread: float
    samples: int


def wall_clock(call: Callable[[], object]) -> Callable[[int], float]:
    """Measures a call that has ended when it returns."""

    def measure(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    return measure


def take_turns(
    contestants: Sequence[Contestant], budget: float, sample: float = 0.004, least: int = 3, most: int = 25
) -> dict[str, Timing]:
    """Times the contestants in alternating rounds and returns {name: Timing}.

    Args:
        budget: seconds in all; a contestant that has used up its even share of it sits out once it has `least` samples.
        sample: seconds that a sample lasts at least; shorter work is repeated within it.
        least, most: samples of a contestant.

    >>> timings = take_turns([Contestant("sum", 1e5, wall_clock(lambda: sum(range(100_000))))], budget=0.1)
    >>> timings["sum"].samples >= 3 and timings["sum"].seconds > 0
    True
    """
    repeats, used = {}, {}
    for c in contestants:
        first = c.measure(1)  # allocations, caches, code paths
        again = c.measure(1) if first < sample else first
        repeats[c.name] = max(1, math.ceil(sample / max(again, 1e-9)))
        used[c.name] = first
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        share = budget / len(contestants)
        for turn in range(most):
            shift = turn % len(contestants)
            playing = [
                c
                for c in (*contestants[shift:], *contestants[:shift])
                if len(seconds[c.name]) < least or used[c.name] < share
            ]
            if not playing:
                break
            for c in playing:
                start = time.perf_counter()
                elapsed = c.measure(repeats[c.name])
                seconds[c.name].append(elapsed / repeats[c.name])
                # a contestant may prepare each time, off its own clock: caches to flush, say
                used[c.name] += max(elapsed, time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    return Timing(median, (high - low) / 2 / median, len(seconds))
