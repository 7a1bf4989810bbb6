"""Times candidates in turn, so that whatever disturbs the machine disturbs all of them alike.

Other programs, virtual machines on the same cores and changing clocks only ever make a computation slower. So ratios
are taken of the fastest rounds of each candidate, which are reproducible where medians are not. On a CPU, Python's
garbage collector is off meanwhile, and a single thread stays on one core.
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

# Shorter calls are repeated until a sample takes this many seconds. Otherwise what the previous candidate has left in
# the caches would affect the time of a short call more than the call itself.
_SHORTEST_SAMPLE = 2e-3
# If the first calls take longer than this, warm or not, one call is a sample, and no second call is needed to know.
_LONG_CALL = 5e-2
_MIN_ROUNDS = 3
_MAX_ROUNDS = 1000
# Fewer rounds suffice on a GPU, whose times hardly vary.
_MIN_CUDA_ROUNDS, _MAX_CUDA_ROUNDS = 5, 20
# The fraction of all rounds that count as the fastest, and their least number. With fewer, they could all be from the
# one visit in which the addresses of a candidate's tensors happened to be best.
_FASTEST_FRACTION, _MIN_FASTEST = 0.2, 3


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        return cls(statistics.median(ordered), low, high)

    def as_row(self) -> list[float]:
        """Values for JSON: median, 20th, 80th percentile."""
        return list(astuple(self))


class Times:
    """Seconds of every candidate in every round: ``rounds[name][i]``."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        self.rounds = rounds

    def merged(self, others: Times) -> Times:
        """These times and those of another measurement of the same candidates."""
        return Times({name: [*values, *others.rounds[name]] for name, values in self.rounds.items()})

    def spread(self, name: str) -> Spread:
        """The spread of the seconds of one candidate."""
        return Spread.of(self.rounds[name])

    def fastest(self, name: str) -> float:
        """Undisturbed seconds of one candidate: the mean of the fastest fifth of its rounds, at least three."""
        rounds = sorted(self.rounds[name])
        return statistics.fmean(rounds[: max(_MIN_FASTEST, round(_FASTEST_FRACTION * len(rounds)))])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times longer ``slow`` takes than ``fast``, from their fastest rounds, and a range for this ratio.

        The range is from the 20th to the 80th percentile of the ratios round by round, widened to include the ratio.
        """
        ratio = self.fastest(slow) / self.fastest(fast)
        by_round = Spread.of([one / other for one, other in zip(self.rounds[slow], self.rounds[fast], strict=True)])
        return ratio, min(ratio, by_round.low), max(ratio, by_round.high)


def measure(candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> Times:
    """Run the candidates in turn: A A A B B B C C C A A A B B B C C C; on a GPU, A B C A B C.

    Args:
        candidates: for every name, the same computation on one or more copies of its inputs, which are used in
            rotation, so that the caches do not hold what the next call reads.
        seconds: time for all candidates together; at least three rounds are measured, on a GPU 5 to 20.
        device: the device on which they compute.
    """
    if device.type == "cuda":
        return _measure_cuda(candidates, seconds, device)
    with _undisturbed():
        return _measure_cpu(candidates, seconds)


def _measure_cpu(candidates: Mapping[str, Sequence[Call]], seconds: float) -> Times:
    repeats = {name: _repeats(calls) for name, calls in candidates.items()}
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for index in range(_MAX_ROUNDS):
        for name, calls in candidates.items():
            rounds[name].append(_sample(calls, index, repeats[name]))
        if index + 1 >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
    return Times(rounds)


def _sample(calls: Sequence[Call], index: int, count: int) -> float:
    """Seconds per call, the mean of ``count`` in a row; if ``count`` exceeds 1, after one call that is not timed."""
    turns = itertools.islice(itertools.cycle(calls), index % len(calls), None)
    if count > 1:
        next(turns)()
    begin = time.perf_counter()
    for call in itertools.islice(turns, count):
        call()
    return (time.perf_counter() - begin) / count


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection inside, and a single thread pinned to one core on systems that support it."""
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
    """Warm up, and find the number of calls per sample."""
    elapsed = min(_seconds(call) for call in calls)
    if elapsed < _LONG_CALL:
        elapsed = _seconds(calls[0])
    return max(1, math.ceil(_SHORTEST_SAMPLE / max(elapsed, 1e-7)))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure_cuda(candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> Times:
    with torch.cuda.device(device):
        flush = _flush_buffer(device)
        for rotated in candidates.values():
            for call in rotated:  # compiles, tunes, fills the allocator's cache
                call()
        one_round = min(_round(candidates, flush) for _ in range(2))
        count = min(_MAX_CUDA_ROUNDS, max(_MIN_CUDA_ROUNDS, int(seconds / one_round)))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
        for index in range(count):
            for name, rotated in candidates.items():
                # The flush also keeps the device busy while the host queues the call, so no launch gap is timed, except
                # if the call waits for the device or takes longer to queue, as operators of many launches do.
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
    """Wall-clock seconds of one round."""
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
    """A buffer so large that writing it evicts the L2 cache and takes longer than the host needs to queue a call."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(2 * cache, 1 << 29), dtype=torch.uint8, device=device)


@contextlib.contextmanager
def capturable(device: torch.device) -> Iterator[None]:
    """On a GPU, work on a side stream, so that CUDA graphs can be captured: backward runs on its forward's stream."""
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
    """Every candidate as the replay of a CUDA graph, without launch overhead, except those that cannot be captured.

    A candidate that waits for the device, as ``torch.inverse`` may, cannot be captured. The graphs of one candidate
    share memory, so a replay overwrites the results of the one before. Call this inside :func:`capturable`, after all
    candidates have run there.
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
    """Capture ``call``, which has run before inside :func:`capturable`, as a CUDA graph, and return its replay.

    Graphs may share a memory ``pool``.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which collects garbage and empties the allocator's cache, a tenth of a second each time.
    torch.cuda.synchronize()
    graph.capture_begin(pool)
    try:
        call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # says that the capture is invalid
            graph.capture_end()
        raise
    graph.capture_end()
    return graph.replay
