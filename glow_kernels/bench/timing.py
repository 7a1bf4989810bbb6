"""Times of candidates side by side, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# A sample shorter than this is several calls: the clock and its own cost do not show.
_SHORTEST_SAMPLE = 1e-4
_FEWEST_ROUNDS = 5
_MOST_ROUNDS = 1000


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


class Times:
    """Seconds of every candidate in every round: ``rounds[name][i]``."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        self.rounds = rounds

    def spread(self, name: str) -> Spread:
        """Seconds of one candidate."""
        return Spread.of(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times longer ``slow`` took than ``fast``, round by round."""
        return Spread.of([one / other for one, other in zip(self.rounds[slow], self.rounds[fast], strict=True)])


def measure(candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> Times:
    """Run the candidates in turn, A B C A B C, for about so many seconds.

    Args:
        candidates: for every name the same computation on one or more copies of its inputs, used in rotation, so that
            a cache does not hold what the next call reads.
        seconds: for all candidates together; at least five rounds are measured.
        device: where they compute.
    """
    if device.type == "cuda":
        return _measure_cuda(candidates, seconds, device)
    return _measure_cpu(candidates, seconds)


def _measure_cpu(candidates: Mapping[str, Sequence[Call]], seconds: float) -> Times:
    repeats = {name: _repeats(calls[0]) for name, calls in candidates.items()}
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    index = 0
    while index < _FEWEST_ROUNDS or (time.perf_counter() < end and index < _MOST_ROUNDS):
        for name, calls in candidates.items():
            call, count = calls[index % len(calls)], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            rounds[name].append((time.perf_counter() - start) / count)
        index += 1
    return Times(rounds)


def _repeats(call: Call) -> int:
    """Warm up, and find how many calls make a sample."""
    call()
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return max(1, math.ceil(_SHORTEST_SAMPLE / max(elapsed, 1e-7)))


def _measure_cuda(candidates: Mapping[str, Sequence[Call]], seconds: float, device: torch.device) -> Times:
    with torch.cuda.device(device):
        flush = _flush_buffer(device)
        calls = [call for rotated in candidates.values() for call in rotated]
        for call in calls:  # compiles, tunes, fills the allocator's cache
            call()
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for rotated in candidates.values():
            flush.zero_()
            rotated[0]()
        torch.cuda.synchronize()
        one_round = max(time.perf_counter() - start, 1e-6)
        count = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(seconds / one_round)))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
        for index in range(count):
            for name, rotated in candidates.items():
                # The flush also keeps the device busy while the host queues the call, so no launch gap is timed
                # unless the call itself waits.
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


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Writing it leaves nothing else in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * max(cache, 32 << 20), dtype=torch.uint8, device=device)


def as_graphs(candidates: Mapping[str, Sequence[Call]]) -> dict[str, list[Call]]:
    """Every candidate as the replay of a CUDA graph, without launch costs; those that cannot be captured are left out.

    A candidate that waits for the device, as ``torch.inverse`` may, cannot be captured.
    """
    graphs: dict[str, list[Call]] = {}
    for name, calls in candidates.items():
        try:
            graphs[name] = [_capture(call) for call in calls]
        except RuntimeError:
            torch.cuda.synchronize()
    return graphs


def _capture(call: Call) -> Call:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
