"""Times of candidates side by side, so that whatever disturbs the machine disturbs all of them alike.

On a CPU a *probe*, a small fixed computation with the same number of threads, is timed before and after every round.
A round counts as calm if both took at most a fifth longer than the fastest probe of this process: clocks that move,
other programs, and other virtual machines on the same cores show in it. Only calm rounds are kept, unless there are
too few of them. Python's garbage collector is off meanwhile, and a single thread stays on one core.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

Call = Callable[[], object]

# A sample shorter than this is several calls: the clock and its own cost do not show.
_SHORTEST_SAMPLE = 1e-4
_FEWEST_ROUNDS = 5
_MOST_ROUNDS = 1000
# A GPU's times hardly vary.
_MOST_CUDA_ROUNDS = 20
_CALM = 1.2
# Enough is measured when a ratio's median is known to this standard error.
_PRECISE = 0.004


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        return cls(statistics.median(ordered), low, high)

    def as_row(self) -> list[float]:
        """As JSON: median, 20th, 80th percentile."""
        return list(astuple(self))


class Times:
    """Seconds of every candidate in every round that counts: ``rounds[name][i]``.

    Args:
        rounds: as they were measured.
        calm: which of them are; all unless told. Fewer than five do not make a measurement, and then all count.
    """

    def __init__(self, rounds: Mapping[str, Sequence[float]], calm: Sequence[bool] | None = None) -> None:
        count = len(next(iter(rounds.values())))
        calm = calm if calm is not None else [True] * count
        self.calm_share = sum(calm) / count
        self.is_calm = sum(calm) >= min(count, _FEWEST_ROUNDS)
        kept = calm if self.is_calm else [True] * count
        self.rounds = {
            name: [value for value, keep in zip(values, kept, strict=True) if keep] for name, values in rounds.items()
        }

    def spread(self, name: str) -> Spread:
        """Seconds of one candidate."""
        return Spread.of(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times longer ``slow`` took than ``fast``, round by round."""
        return Spread.of([one / other for one, other in zip(self.rounds[slow], self.rounds[fast], strict=True)])

    def error(self, slow: str, fast: str) -> float:
        """Relative standard error of the median of their ratio, as for a normal distribution."""
        ratio = self.ratio(slow, fast)
        deviation = (ratio.high - ratio.low) / (2 * statistics.NormalDist().inv_cdf(0.8))
        return math.sqrt(math.pi / 2 / len(self.rounds[slow])) * deviation / ratio.median


def measure(
    candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device, ours: str | None = None
) -> Times:
    """Run the candidates in turn, A B C A B C.

    Args:
        candidates: for every name the same computation on one or more copies of its inputs, used in rotation, so that
            a cache does not hold what the next call reads.
        seconds: for all candidates together, but at least five rounds are measured. A CPU that is calm needs half, and
            of a GPU at most 20 rounds are.
        device: where they compute.
        ours: on a CPU, measure no longer than it takes to know all ratios to this one.
    """
    if device.type == "cuda":
        return _measure_cuda(candidates, seconds, device)
    with _undisturbed():
        return _measure_cpu(candidates, seconds, ours)


def _measure_cpu(candidates: Mapping[str, Sequence[Call]], seconds: float, ours: str | None) -> Times:
    repeats = {name: _repeats(calls) for name, calls in candidates.items()}
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    probes = [_probe()]
    start = time.perf_counter()
    while True:
        index = len(probes) - 1
        for name, calls in candidates.items():
            call, count = calls[index % len(calls)], repeats[name]
            begin = time.perf_counter()
            for _ in range(count):
                call()
            rounds[name].append((time.perf_counter() - begin) / count)
        probes.append(_probe())
        limit = _CALM * _fastest_probe[torch.get_num_threads()]
        calm = [max(pair) <= limit for pair in itertools.pairwise(probes)]
        elapsed = time.perf_counter() - start
        if index + 1 >= _FEWEST_ROUNDS and (
            elapsed > (seconds / 2 if sum(calm) >= _FEWEST_ROUNDS else seconds) or index + 1 == _MOST_ROUNDS
        ):
            return Times(rounds, calm)
        # A power of two, so that looking takes no time beside measuring.
        if ours is not None and index + 1 >= 16 and (index + 1) & index == 0 and sum(calm) >= 16:
            times = Times(rounds, calm)
            if all(times.error(name, ours) < _PRECISE for name in candidates if name != ours):
                return times


_fastest_probe: dict[int, float] = {}
_probe_data = torch.zeros(1 << 17)


def _probe() -> float:
    """Seconds of the fixed computation, which also go into the fastest of this number of threads."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        torch.exp(_probe_data)
        times.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    _fastest_probe[threads] = min(_fastest_probe.get(threads, math.inf), *times)
    return min(times)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection, and a single thread on a single core, as far as the system can do that."""
    collects = gc.isenabled()
    gc.disable()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if cores and torch.get_num_threads() == 1:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        if collects:
            gc.enable()


def _repeats(calls: Sequence[Call]) -> int:
    """Warm up, and find how many calls make a sample."""
    for call in calls:
        call()
    start = time.perf_counter()
    calls[0]()
    elapsed = time.perf_counter() - start
    return max(1, math.ceil(_SHORTEST_SAMPLE / max(elapsed, 1e-7)))


def _measure_cuda(candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> Times:
    with torch.cuda.device(device):
        flush = _flush_buffer(device)
        for rotated in candidates.values():
            for call in rotated:  # compiles, tunes, fills the allocator's cache
                call()
        one_round = min(_round(candidates, flush) for _ in range(2))
        count = min(_MOST_CUDA_ROUNDS, max(_FEWEST_ROUNDS, int(seconds / one_round)))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
        for index in range(count):
            for name, rotated in candidates.items():
                # The flush also keeps the device busy while the host queues the call, so no launch gap is timed
                # unless the call itself waits or takes longer to queue, as operators of many launches do.
                flush.zero_()
                pair = _event(), _event()
                pair[0].record()
                rotated[index % len(rotated)]()
                pair[1].record()
                events[name].append(pair)
        torch.cuda.synchronize()
        return Times(
            {name: [first.elapsed_time(last) * 1e-3 for first, last in pairs] for name, pairs in events.items()}
        )


def _round(candidates: Mapping[str, Sequence[Call]], flush: torch.Tensor) -> float:
    """Seconds of the host for one round."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for rotated in candidates.values():
        flush.zero_()
        rotated[0]()
    torch.cuda.synchronize()
    return max(time.perf_counter() - start, 1e-6)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Writing it leaves nothing else in the L2 cache, and takes longer than the host needs to queue a call."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(2 * cache, 1 << 29), dtype=torch.uint8, device=device)


@contextlib.contextmanager
def capturable(device: torch.device) -> Iterator[None]:
    """On a GPU, work on a stream that a CUDA graph can capture: a backward runs where its forward ran."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def as_graphs(candidates: Mapping[str, Sequence[Call]]) -> dict[str, list[Call]]:
    """Every candidate as the replay of a CUDA graph, without launch costs; those that cannot be captured are left out.

    A candidate that waits for the device, as ``torch.inverse`` may, cannot be captured. The graphs of one candidate
    share their memory, so what one returned is lost with the next. To be called inside :func:`capturable`, where all
    candidates have run before.
    """
    graphs: dict[str, list[Call]] = {}
    for name, calls in candidates.items():
        pool = torch.cuda.graph_pool_handle()
        try:
            graphs[name] = [capture(call, pool) for call in calls]
        except RuntimeError:
            torch.cuda.synchronize()
    return graphs


def capture(call: Call, pool: Any = None) -> Call:
    """Replays of a CUDA graph of a call that has run before, inside :func:`capturable`; graphs may share a ``pool``.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which collects garbage and empties the allocator's cache, for a tenth of a second each.
    torch.cuda.synchronize()
    graph.capture_begin(pool)
    try:
        call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # that the capture is invalid
            graph.capture_end()
        raise
    graph.capture_end()
    return graph.replay
