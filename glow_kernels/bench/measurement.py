"""One case of one operator: correctness first, then the times of all candidates side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from glow_kernels import available_backends, use_backend
from glow_kernels.bench import operators, timing
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.bench.operators import LARGEST_MEMORY_BOUND_CHANNELS, Case, Operator
from glow_kernels.bench.results import Row
from glow_kernels.bench.timing import Call

# Copies of the inputs that a GPU uses in rotation.
_ROTATION = 3
_LAUNCH_BOUND_SECONDS = 50e-6


def measure(case: Case, *, seconds: float = 0.5, with_compile: bool = True, backends: Sequence[str] = ()) -> Row:
    """Time the copy, eager, ``torch.compile`` and our backends; a row of results.

    Args:
        case: what to measure.
        seconds: for timing, correctness and compilation come on top.
        with_compile: compare with ``torch.compile``, which takes seconds to compile.
        backends: those to measure, every available one unless told; the first is "ours" in the ratios.
    """
    operator = operators.operator(case.operator)
    device = torch.device(case.device)
    backends = backends or available_backends()
    torch.manual_seed(0)
    copies = [operator.arguments(case) for _ in range(_ROTATION if device.type == "cuda" else 1)]
    grads = operators.upstream(operator, case, copies[0])
    limit = _limit(operator, case)
    candidates: dict[str, list[Call]] = {
        name: [calls] if callable(calls) else list(calls) for name, calls in limit.items()
    }
    candidates["eager"] = [operators.call(operator.plain, case.direction, copy, grads) for copy in copies]
    if with_compile:
        compiled = _compiled(operator.plain)
        candidates["compile"] = [operators.call(compiled, case.direction, copy, grads) for copy in copies]
    for backend in backends:
        candidates[backend] = [
            _on(backend, operators.call(_bound(backend, operator), case.direction, copy, grads)) for copy in copies
        ]
    row: Row = {"kind": "operator", "case": case.as_dict(), "ours": backends[0]}
    wrong = _wrong(operator, case, copies[0], grads, candidates, backends)
    if wrong:
        for name in wrong:
            del candidates[name]
        row["wrong"] = wrong
    if backends[0] in wrong:
        return row
    return {**row, **_figures(case, operator, candidates, list(limit), backends, seconds)}


def _figures(
    case: Case,
    operator: Operator,
    candidates: dict[str, list[Call]],
    limits: list[str],
    backends: Sequence[str],
    seconds: float,
) -> Row:
    device = torch.device(case.device)
    ours = backends[0]
    times, again = (timing.measure(candidates, seconds / 2, device) for _ in range(2))
    limit = max(limits, key=lambda name: times.spread(name).median)
    moved = moved_bytes(operator, case)
    figures: Row = {"bytes": moved, "limit": limit, "candidates": {}}
    for name, calls in candidates.items():
        spread = times.spread(name)
        figures["candidates"][name] = {
            **{f"seconds_{field}": value for field, value in asdict(spread).items()},
            "bytes_per_second": moved / spread.median,
            "percent_of_limit": 100.0 * times.ratio(limit, name).median,
            "ratio_to_ours": asdict(times.ratio(name, ours)),
            "ratio_to_ours_again": again.ratio(name, ours).median,
            "peak_extra_bytes": peak_extra_bytes(calls[0], device),
        }
    if device.type == "cuda" and times.spread(ours).median < _LAUNCH_BOUND_SECONDS:
        graphs = timing.as_graphs(candidates)
        if ours in graphs:
            replays = timing.measure(graphs, seconds / 2, device)
            figures["graph_replays"] = {
                name: {**asdict(replays.spread(name)), "ratio_to_ours": replays.ratio(name, ours).median}
                for name in graphs
            }
    return figures


def moved_bytes(operator: Operator, case: Case) -> int:
    """What the operator must read and write, as declared."""
    return round(operator.moved[case.direction] * case.data_bytes)


def _limit(operator: Operator, case: Case) -> dict[str, Call]:
    """A copy that moves the same bytes; where matrix products may take longer, also those."""
    elements = moved_bytes(operator, case) // 2 // operators.DTYPES[case.dtype].itemsize
    source = torch.randn(elements, device=case.device).to(operators.DTYPES[case.dtype])
    limits: dict[str, Call] = {"copy": source.clone}
    channels, products = case.shape[1], operator.products.get(case.direction, 0)
    if products and channels > LARGEST_MEMORY_BOUND_CHANNELS:
        matrix = torch.randn(channels, channels, device=case.device).to(source.dtype)
        data = torch.randn(channels, math.prod(case.shape) // channels, device=case.device).to(source.dtype)
        limits["matmul"] = lambda: [matrix @ data for _ in range(products)]
    return limits


def _compiled(plain: operators.Functions) -> operators.Functions:
    torch._dynamo.reset()
    forward, inverse = (
        function and torch.compile(function, dynamic=False, fullgraph=True)
        for function in (plain.forward, plain.inverse)
    )
    return operators.Functions(forward, inverse)  # type: ignore[arg-type]


def _bound(backend: str, operator: Operator) -> operators.Functions:
    """The operator's functions with the backend chosen, for what ``operators.call`` evaluates beforehand."""

    def bind(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return function and _on(backend, function)

    ours = operator.ours
    return operators.Functions(_on(backend, ours.forward), bind(ours.inverse), bind(ours.reversible_backward))


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` computed by ``backend``; the default one without the cost of choosing."""
    if backend == available_backends()[0]:
        return function

    def chosen(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return chosen


def _wrong(
    operator: Operator,
    case: Case,
    arguments: Sequence[Tensor],
    grads: Sequence[Tensor],
    candidates: dict[str, list[Call]],
    backends: Iterable[str],
) -> dict[str, str]:
    """What is wrong with each of our backends, measured against the textbook in float64; empty if nothing is."""
    wide = [argument.double() for argument in arguments]
    truth = operators.tensors(operators.call(operator.plain, case.direction, wide, [grad.double() for grad in grads])())
    eager = operators.tensors(candidates["eager"][0]())
    wrong = {}
    for backend in backends:
        actual = operators.tensors(candidates[backend][0]())
        problem = inaccuracy(actual, truth, eager)
        if problem:
            wrong[backend] = problem
    return wrong


def inaccuracy(actual: Sequence[Tensor], truth: Sequence[Tensor], eager: Sequence[Tensor]) -> str | None:
    """Apply the accuracy rule: at most twice the error of eager PyTorch plus a few units in the last place.

    Units count at the size of the partial sums that an element is made of, as rounding errors do.
    """
    if len(actual) != len(truth):
        return f"{len(actual)} results, not {len(truth)}"
    largest = max((tensor.numel() for tensor in truth), default=1)
    for index, (result, true, naive) in enumerate(zip(actual, truth, eager, strict=True)):
        if result.shape != true.shape:
            return f"result {index} has shape {tuple(result.shape)}, not {tuple(true.shape)}"
        terms = max(1.0, largest / max(1, true.numel()))
        unit = max(1.0, true.abs().max().item()) + math.sqrt(terms)
        allowed = 2.0 * _error(naive, true) + 16 * torch.finfo(result.dtype).eps * unit
        error = _error(result, true)
        if not error <= allowed:
            return f"result {index} is off by {error:.1e}, and {allowed:.1e} is allowed"
    return None


def _error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().nan_to_num(math.inf).max().item()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
