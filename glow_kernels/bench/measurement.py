"""One case of one operator: correctness first, then the times of all candidates side by side."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glow_kernels import use_backend
from glow_kernels.bench import operators, timing
from glow_kernels.bench.compilation import Compiler
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.bench.operators import LARGEST_MEMORY_BOUND_CHANNELS, Case, Function, Operator
from glow_kernels.bench.results import Row
from glow_kernels.bench.timing import Call, Times
from glow_kernels.errors import in_brief

# Copies of the inputs that are used in rotation, so that neither what a cache holds nor where a copy happens to lie
# decides. Of tensors beyond every cache one is enough.
_ROTATION = 3
ROTATED_BYTES = 16 << 20
# So many different numbers are as good to copy as any.
_DIFFERENT = 1 << 20


class Session:
    """Measures cases; what does not depend on the allocator is done once: compiling, checking, counting bytes.

    Args:
        with_compile: compare with ``torch.compile``, which takes seconds to compile.
        backends: those to measure, unless told every one that computes on the device; the first is "ours" in the
            ratios.
    """

    def __init__(self, *, with_compile: bool = True, backends: Sequence[str] = ()) -> None:
        self._compiler = Compiler() if with_compile else None
        self._wanted = tuple(backends)
        self._checked: dict[Case, tuple[dict[str, str], dict[str, int]]] = {}
        self._times: dict[tuple[Case, str], Times] = {}

    def measure(self, case: Case, seconds: float, series: str = "") -> Row:
        """Time the copy, eager, ``torch.compile`` and our backends for so many seconds: a row of results.

        A case that is measured more than once has all its rounds in the later rows, those of every ``series`` for
        themselves. Checking and compiling come on top. What raises an error or computes something wrong is named in
        ``wrong`` and not timed.
        """
        operator = operators.operator(case.operator)
        device = torch.device(case.device)
        backends = self._wanted or operators.backends_on(device)
        ours = backends[0]
        with threads(case.threads), timing.capturable(device):
            torch.manual_seed(0)
            rotated = device.type == "cuda" or case.data_bytes <= ROTATED_BYTES
            copies = [operator.arguments(case) for _ in range(_ROTATION if rotated else 1)]
            grads = operators.upstream(operator, case, copies[0])
            limits = _limit(operator, case)
            candidates = {name: [call] for name, call in limits.items()}
            candidates |= self._contenders(case, operator, copies, grads, backends)
            wrong, peaks = self._check(case, copies[0], grads, candidates, backends)
            row: Row = {"kind": "operator", "case": case.as_dict(), "ours": ours}
            if wrong:
                row["wrong"] = wrong
                candidates = {name: calls for name, calls in candidates.items() if name not in wrong}
            if ours in wrong:
                return row
            times = timing.measure(candidates, seconds, device)
            if (case, series) in self._times:
                times = self._times[case, series].joined(times)
            self._times[case, series] = times
            row["bytes"] = operators.moved_bytes(case)
            if device.type == "cuda":
                row |= _replays(candidates, times, seconds, device, list(limits), peaks, ours)
            else:
                row |= _figures(times, list(limits), peaks, ours)
        return row

    def _contenders(
        self,
        case: Case,
        operator: Operator,
        copies: Sequence[list[Tensor]],
        grads: Sequence[Tensor],
        backends: Sequence[str],
    ) -> dict[str, list[Call]]:
        """Eager, compiled and our backends, on the same inputs."""
        functions = {"eager": operator.plain}
        if self._compiler is not None:
            functions["compile"] = self._compiler.functions(case)
        calls = {name: _prepared(function, case, copies, grads) for name, function in functions.items()}
        default = operators.backends_on(torch.device(case.device))[0]
        for backend in backends:
            # The default one is measured without the cost of choosing.
            choose = _default if backend == default else functools.partial(_on, backend)
            bound = _bound(choose, operator)
            calls[backend] = [choose(call) for call in _prepared(bound, case, copies, grads)]
        return calls

    def _check(
        self,
        case: Case,
        arguments: Sequence[Tensor],
        grads: Sequence[Tensor],
        candidates: Mapping[str, Sequence[Call]],
        backends: Sequence[str],
    ) -> tuple[dict[str, str], dict[str, int]]:
        """What is wrong with which candidates, and the peak memory of the others."""
        key = replace(case, allocator="tuned")
        if key not in self._checked:
            results, failed = _results(candidates)
            wrong = failed | _wrong(operators.operator(case.operator), case, arguments, grads, results, backends)
            del results
            device = torch.device(case.device)
            peaks = {
                name: peak_extra_bytes(calls[0], device, keeps=False)
                for name, calls in candidates.items()
                if name not in wrong
            }
            self._checked[key] = wrong, peaks
        return self._checked[key]


def _figures(times: Times, limits: Sequence[str], peaks: dict[str, int], ours: str) -> Row:
    limit = max(limits, key=times.fastest)
    return {
        "limit": limit,
        "candidates": {
            name: {
                "seconds": times.spread(name).as_row(),
                "ratio_to_ours": list(times.ratio(name, ours)),
                "percent_of_limit": 100.0 * times.ratio(limit, name)[0],
                "peak_extra_bytes": peaks[name],
            }
            for name in times.rounds
        },
    }


def _replays(
    candidates: Mapping[str, Sequence[Call]],
    calls: Times,
    seconds: float,
    device: torch.device,
    limits: Sequence[str],
    peaks: dict[str, int],
    ours: str,
) -> Row:
    """The figures of CUDA graphs, which the host's cost of launching is not in, with the time of a ``call`` beside.

    What cannot be captured is called among the replays.
    """
    graphs = timing.as_graphs(candidates)
    times = timing.measure({name: graphs.get(name, call) for name, call in candidates.items()}, seconds, device)
    row = _figures(times, limits, peaks, ours)
    for name, candidate in row["candidates"].items():
        candidate |= {"call": calls.spread(name).as_row(), "replayed": name in graphs}
    # The graphs' memory, which no other allocation can have.
    graphs.clear()
    torch.cuda.empty_cache()
    return row


def _limit(operator: Operator, case: Case) -> dict[str, Call]:
    """A copy that moves the same bytes; where matrix products may take longer, also those."""
    elements = operators.moved_bytes(case) // 2 // operators.DTYPES[case.dtype].itemsize
    few = torch.randn(min(elements, _DIFFERENT), device=case.device).to(operators.DTYPES[case.dtype])
    source = few.repeat(-(-elements // len(few)))[:elements]
    limits: dict[str, Call] = {"copy": source.clone}
    channels, products = case.shape[1], operator.products.get(case.direction, 0)
    if products and channels > LARGEST_MEMORY_BOUND_CHANNELS:
        matrix = torch.randn(channels, channels, device=case.device).to(source.dtype)
        data = torch.randn(channels, math.prod(case.shape) // channels, device=case.device).to(source.dtype)
        limits["matmul"] = lambda: [matrix @ data for _ in range(products)]
    return limits


def _prepared(
    functions: operators.Functions, case: Case, copies: Sequence[list[Tensor]], grads: Sequence[Tensor]
) -> list[Call]:
    """A call for every copy; if what leads to it fails, as the forward of a backward, one that fails likewise."""
    try:
        return [operators.call(functions, case.direction, copy, grads) for copy in copies]
    except Exception as error:
        failure = error

    def fail() -> object:
        raise failure

    return [fail]


def _bound(choose: Callable[[Function], Function], operator: Operator) -> operators.Functions:
    """The operator's functions with the backend chosen, for what ``operators.call`` evaluates beforehand."""
    ours = operator.ours
    return operators.Functions(
        choose(ours.forward),
        ours.inverse and choose(ours.inverse),
        ours.reversible_backward and choose(ours.reversible_backward),
    )


def _default(function: Function) -> Function:
    return function


def _on(backend: str, function: Function) -> Function:
    """``function`` computed by ``backend``."""

    def chosen(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return chosen


def _results(candidates: Mapping[str, Sequence[Call]]) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """What the candidates compute, and what is wrong with those that raise an error.

    The compiler and our backends may raise whatever they want; eager PyTorch and copies have to work.
    """
    results, failed = {}, {}
    for name, calls in candidates.items():
        try:
            results[name] = operators.tensors(calls[0]())
        except Exception as error:
            if name in ("copy", "matmul", "eager"):
                raise
            failed[name] = in_brief(error)
    return results, failed


def _wrong(
    operator: Operator,
    case: Case,
    arguments: Sequence[Tensor],
    grads: Sequence[Tensor],
    results: Mapping[str, Sequence[Tensor]],
    backends: Iterable[str],
) -> dict[str, str]:
    """What is wrong with the results of our backends, measured against the textbook in float64; empty if nothing is."""
    with threads(os.cpu_count() or 1):  # on which the truth does not depend
        wide, wide_grads = [argument.double() for argument in arguments], [grad.double() for grad in grads]
        truth = operators.tensors(operators.call(operator.plain, case.direction, wide, wide_grads)())
        eager = results["eager"]
        if case.dtype == "float64" and operator.products:
            # Eager PyTorch is the truth itself; what its sums are worth shows when they are taken in the reverse order.
            reverse = operators.call(operator.plain, case.direction, _reversed(wide), _reversed(wide_grads))
            eager = _reversed(operators.tensors(reverse()))
    problems = {name: inaccuracy(results[name], truth, eager) for name in backends if name in results}
    return {name: problem for name, problem in problems.items() if problem}


def _reversed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Samples, channels and positions in reverse order: of all arguments, a linear map has its results so."""
    return [tensor.flip(*range(tensor.dim())) for tensor in tensors]


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
