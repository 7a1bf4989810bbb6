"""Selects the operator cases that a run measures, and makes tasks of them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glow_kernels.allocator import tune_allocator
from glow_kernels.backends import backend_status
from glow_kernels.bench import compilation, operators, table
from glow_kernels.bench.measurement import ROTATED_BYTES, Session
from glow_kernels.bench.operators import DIRECTIONS, DTYPES, MEMORY_FORMATS, OPERATORS, STANDARD_SHAPES, Case, Shape
from glow_kernels.bench.plan import Show, Task
from glow_kernels.bench.results import Row, Writer
from glow_kernels.errors import BackendUnavailableError, UsageError

ALLOCATORS = ("default", "tuned")
# On a CPU every case is visited several times, some minutes apart, because the load from other programs and virtual
# machines changes, and because every visit has its tensors at other addresses. On a busy machine, eight visits of three
# rounds give reproducible ratios, and four visits of twelve rounds do not. Tensors larger than every cache take seconds
# per visit and vary least, so they are visited less often.
_VISITS, _VISITS_OF_LARGE, _VISITS_ON_GPU = 8, 2, 1
# One case in _REPEAT_EVERY, and at least _MIN_REPEATED, is measured a second time independently, to prove that ratios
# are reproducible.
_REPEAT_EVERY, _MIN_REPEATED, _REPEATED_ON_GPU = 6, 16, 6
_COMPILE_SECONDS = 3.2
_CHECK_SECONDS = 0.05
# The bandwidth of the slowest candidates; used only for planning.
_SLOW_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class Selection:
    """The cases to measure: the product of these choices. ``seconds`` is the time for a small case."""

    operators: Sequence[str] = tuple(OPERATORS)
    directions: Sequence[str] = DIRECTIONS
    shapes: Sequence[Shape] = STANDARD_SHAPES
    dtypes: Sequence[str] = ("float32",)
    memory_formats: Sequence[str] = ("contiguous",)
    threads: Sequence[int] = (1,)
    allocators: Sequence[str] = ("tuned",)
    device: str = "cpu"
    seconds: float = 0.8

    def __post_init__(self) -> None:
        for name in self.operators:
            operators.operator(name)
        for what, values, choices in (
            ("direction", self.directions, DIRECTIONS),
            ("dtype", self.dtypes, DTYPES),
            ("memory format", self.memory_formats, MEMORY_FORMATS),
            ("allocator", self.allocators, ALLOCATORS),
        ):
            for value in values:
                if value not in choices:
                    raise UsageError(f"{what} must be one of {', '.join(choices)}, got {value!r}")

    def cases(self) -> Iterator[Case]:
        """The cases that can be measured; not every operator has every direction."""
        options = (self.allocators, self.threads, self.dtypes, self.memory_formats, self.operators, self.directions)
        for allocator, threads, dtype, memory_format, name, direction in itertools.product(*options):
            for shape in self.shapes:
                case = Case(name, direction, shape, dtype, memory_format, threads, allocator, self.device)
                if operators.is_measured(case):
                    yield case


def require(backends: Sequence[str]) -> None:
    """Check that all ``backends`` can be measured.

    Raises:
        UsageError: there is no such backend.
        BackendUnavailableError: a backend cannot run here.
    """
    for backend in backends:
        status = backend_status(backend)
        if not status.available:
            raise BackendUnavailableError(f"backend {backend!r} is not available: {status.reason}; {status.remedy}")


class Suite:
    """Measures cases, writes the results to one file and shows each when it is done.

    Args:
        with_compile: compare with ``torch.compile``.
        backends: the backends to measure, by default all available ones; the first is "ours" in the ratios.
    """

    def __init__(self, writer: Writer, show: Show, *, with_compile: bool = True, backends: Sequence[str] = ()) -> None:
        self._writer, self._show, self._with_compile = writer, show, with_compile
        self._session = Session(with_compile=with_compile, backends=backends)

    def tasks(self, selections: Sequence[Selection]) -> list[Task]:
        """The tasks of all cases; those with the default allocator come first, since tuning cannot be undone."""
        seconds = {case: selection.seconds for selection in selections for case in selection.cases()}
        cases = sorted(seconds, key=lambda case: ALLOCATORS.index(case.allocator))
        tasks = []
        units = {compilation.unit(case) for case in cases}
        if self._with_compile and len(units) > 8:
            duration = 20.0 + _COMPILE_SECONDS * len(units) / (os.cpu_count() or 1)
            tasks.append(Task("torch.compile of all cases", duration, lambda _: self._compile(cases)))
        again = _cases_to_repeat(cases)
        # Cases with the default allocator cannot be visited again after tuning, so each allocator has its own visits.
        for _, group in itertools.groupby(cases, key=lambda case: case.allocator):
            grouped = list(group)
            for visit in range(max(map(_visits, grouped))):
                visited = [case for case in grouped if visit < _visits(case)]
                for heading, some in itertools.groupby(visited, key=_heading):
                    tasks.append(Task(heading, 0.0, functools.partial(self._begin, heading, visit)))
                    share = {case: seconds[case] / _visits(case) for case in some}
                    tasks += [self._task(case, share[case]) for case in share]
                    tasks += [self._task(case, share[case], again=True) for case in share if case in again]
        return tasks

    def _compile(self, cases: Sequence[Case]) -> None:
        self._show("\ncompiling the textbook's operators with torch.compile")
        compilation.warm_up(cases)

    def _begin(self, heading: str, visit: int, _: float) -> None:
        once_more = ", once more, counting all until now" if visit else ""
        self._show(f"\n{heading}{once_more}; times in us")
        self._show(table.HEADER)

    def _task(self, case: Case, seconds: float, again: bool = False) -> Task:
        """A visit to a case, planned to take ``seconds``, or more if its tensors are large, and the time for checks."""
        # At least three rounds of four candidates are measured.
        least = 3 * 4 * operators.moved_bytes(case) / _SLOW_BYTES_PER_SECOND / case.threads
        measuring = max(seconds, least)
        others = _CHECK_SECONDS + least / 3
        action = self._measure_again if again else self._measure

        def run(allowed: float) -> None:
            if case.allocator == "tuned":
                tune_allocator()
            action(case, allowed * measuring / (measuring + others))

        return Task(f"{case.operator} {case.direction} {table.shape(case.shape)}", measuring + others, run)

    def _measure(self, case: Case, seconds: float) -> None:
        row = self._session.measure(case, seconds)
        self._writer.write(row)
        self._show(table.operator_line(row))

    def _measure_again(self, case: Case, seconds: float) -> None:
        first, again = self._row(case), self._session.measure(case, seconds, "again")
        if "candidates" in first and "candidates" in again:
            names = [name for name in ("eager", "compile") if name in again["candidates"]]
            ratios = {
                key: {name: table.ratio(row, name) for name in names}
                for key, row in (("first", first), ("again", again))
            }
            self._writer.write({"kind": "repeat", "case": case.as_dict(), **ratios})

    def _row(self, case: Case) -> Row:
        """The last measurement of the case."""
        named = case.as_dict()
        return next(row for row in reversed(self._writer.rows) if row["kind"] == "operator" and row["case"] == named)


def _visits(case: Case) -> int:
    if case.device != "cpu":
        return _VISITS_ON_GPU
    return _VISITS_OF_LARGE if case.data_bytes > ROTATED_BYTES else _VISITS


def _cases_to_repeat(cases: Sequence[Case]) -> set[Case]:
    """The cases to measure a second time, evenly spread, but not so evenly that all have the same shape."""
    on_cpu = bool(cases) and cases[0].device == "cpu"
    count = max(_MIN_REPEATED, len(cases) // _REPEAT_EVERY) if on_cpu else _REPEATED_ON_GPU
    count = min(count, len(cases))
    return {cases[index * len(cases) // count] for index in range(count)}


def _heading(case: Case) -> str:
    return table.condition(case.as_dict())
