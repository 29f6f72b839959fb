"""The timer of every benchmark: the contestants of a row take turns, and their medians are compared.

A machine's clock frequency drifts by more than the differences of interest.  Contestants are therefore never timed one
after the other: each round samples every contestant once, and each round starts with a different one.  A contestant
measures its own work, so that host calls, loops in C and device work between events can all take part.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """`measure(repeats)` does the work `repeats` times and returns the seconds; `terms` is the work per repeat."""

    name: str
    terms: float
    measure: Callable[[int], float]


@dataclass(frozen=True)
class Timing:
    """Median seconds per repeat; `spread` is half the interquartile range divided by the median."""

    seconds: float
    spread: float
    samples: int


def wall_clock(call: Callable[[], object]) -> Callable[[int], float]:
    """Measures a synchronous call."""

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
        budget: seconds in total.  A contestant that has used up its equal share sits out once it has `least` samples.
        sample: minimum seconds per sample; shorter work is repeated within a sample.
        least, most: samples per contestant.

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
                # counts untimed preparation too, such as flushing caches
                used[c.name] += max(elapsed, time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    return Timing(median, (high - low) / 2 / median, len(seconds))
