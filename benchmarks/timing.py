"""Timing of candidates side by side, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable


def interleaved(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Run the candidates in turn, A B C A B C, for so many seconds and at least seven rounds; seconds of every call."""
    for candidate in candidates.values():
        candidate()
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 7:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of how many times longer ``slow`` took."""
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def busy_cores() -> float:
    """How many cores are busy now, apart from this process."""
    return max(0.0, os.getloadavg()[0] - 1.0)
