"""Measures one case of one operator: first correctness, then the times of all candidates side by side."""

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

# Copies of the inputs to use in rotation, so that neither cached data nor a copy's address decides the times. One copy
# is enough for tensors larger than every cache.
_ROTATION = 3
ROTATED_BYTES = 16 << 20
# A copy of this many different numbers, repeated, takes as long as a copy of random ones throughout.
_DIFFERENT = 1 << 20


class Session:
    """Measures cases; compiling, checking and counting bytes, which do not depend on the allocator, are done once.

    Args:
        with_compile: compare with ``torch.compile``, which takes seconds to compile.
        backends: the backends to measure, by default all that compute on the device; the first is "ours" in the
            ratios.
    """

    def __init__(self, *, with_compile: bool = True, backends: Sequence[str] = ()) -> None:
        self._compiler = Compiler() if with_compile else None
        self._wanted = tuple(backends)
        self._checked: dict[Case, tuple[dict[str, str], dict[str, int]]] = {}
        self._times: dict[tuple[Case, str], Times] = {}

    def measure(self, case: Case, seconds: float, series: str = "") -> Row:
        """Time the copy, eager, ``torch.compile`` and our backends for ``seconds``, and return a row of results.

        If a case is measured again in the same ``series``, its row includes the rounds of all earlier visits. Checking
        and compiling take additional time. Candidates that raise an error or compute wrong results are named in
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
                times = self._times[case, series].merged(times)
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
        """The calls of eager and compiled code and of our backends, on the same inputs."""
        functions = {"eager": operator.textbook}
        if self._compiler is not None:
            functions["compile"] = self._compiler.functions(case)
        calls = {name: _prepared(function, case, copies, grads) for name, function in functions.items()}
        default = operators.backends_on(torch.device(case.device))[0]
        for backend in backends:
            # The default backend is measured without the cost of use_backend.
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
        """The problem of each wrong candidate, and the peak memory of the others."""
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
    """The figures of replayed CUDA graphs, which exclude the host's launch overhead, and the time of a plain ``call``.

    Candidates that cannot be captured are called instead, in turn with the replays.
    """
    graphs = timing.as_graphs(candidates)
    times = timing.measure({name: graphs.get(name, call) for name, call in candidates.items()}, seconds, device)
    row = _figures(times, limits, peaks, ours)
    for name, candidate in row["candidates"].items():
        candidate |= {"call": calls.spread(name).as_row(), "replayed": name in graphs}
    # Frees the graphs' private memory pools, which no other allocation can use.
    graphs.clear()
    torch.cuda.empty_cache()
    return row


def _limit(operator: Operator, case: Case) -> dict[str, Call]:
    """A copy that moves the same bytes; where the matrix products may take longer, these too."""
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
    """A call for every copy; if preparing it fails, as the forward of a backward may, a call that raises the error."""
    try:
        return [operators.call(functions, case.direction, copy, grads) for copy in copies]
    except Exception as error:
        failure = error

    def fail() -> object:
        raise failure

    return [fail]


def _bound(choose: Callable[[Function], Function], operator: Operator) -> operators.Functions:
    """The operator's functions with the backend chosen, also for what ``operators.call`` evaluates in advance."""
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
    """The results of the candidates, and the errors of those that fail.

    The compiler and our backends may raise any exception; eager PyTorch and copies must work.
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
    """What is wrong with the results of our backends, compared with the textbook in float64; empty if nothing is."""
    with threads(os.cpu_count() or 1):  # for speed only: the truth does not depend on it
        wide, wide_grads = [argument.double() for argument in arguments], [grad.double() for grad in grads]
        truth = operators.tensors(operators.call(operator.textbook, case.direction, wide, wide_grads)())
        eager = results["eager"]
        if case.dtype == "float64" and operator.products:
            # Eager PyTorch is the truth itself here; summing in reverse order shows how large its rounding errors are.
            reverse = operators.call(operator.textbook, case.direction, _reversed(wide), _reversed(wide_grads))
            eager = _reversed(operators.tensors(reverse()))
    problems = {name: inaccuracy(results[name], truth, eager) for name in backends if name in results}
    return {name: problem for name, problem in problems.items() if problem}


def _reversed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Reverse every dimension; a linear map of reversed arguments gives the reversed results."""
    return [tensor.flip(*range(tensor.dim())) for tensor in tensors]


def inaccuracy(actual: Sequence[Tensor], truth: Sequence[Tensor], eager: Sequence[Tensor]) -> str | None:
    """Apply the accuracy rule: at most twice the error of eager PyTorch plus a few units in the last place.

    The unit is that of the partial sums behind an element, since rounding errors scale with their size.
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
    """Compute with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
