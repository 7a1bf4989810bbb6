"""Which cases of the operators a run measures, as tasks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glow_kernels.allocator import tune_allocator
from glow_kernels.backends import backend_status
from glow_kernels.bench import compilation, operators, table
from glow_kernels.bench.measurement import Session
from glow_kernels.bench.operators import DIRECTIONS, DTYPES, MEMORY_FORMATS, OPERATORS, STANDARD_SHAPES, Case, Shape
from glow_kernels.bench.plan import Show, Task
from glow_kernels.bench.results import Row, Writer
from glow_kernels.errors import BackendUnavailableError, UsageError

ALLOCATORS = ("default", "tuned")
# On a CPU every case is visited more than once, some minutes apart, since other programs and virtual machines come and
# go; twice as often with several threads, which wait for each other and so for whatever disturbs one of them.
_VISITS, _VISITS_OF_THREADS, _VISITS_ON_GPU = 2, 4, 1
# So many cases of a condition are measured a second time for themselves, as a proof.
_AGAIN, _AGAIN_ON_GPU = 16, 6
_COMPILE_SECONDS = 1.6
_CHECK_SECONDS = 0.1
# What the slowest candidates reach, for planning only.
_SLOW_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class Selection:
    """What to measure: every choice is a product of these. ``seconds`` is the time for a small case."""

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
        """All of them that are measured: an operator has not every direction."""
        options = (self.allocators, self.threads, self.dtypes, self.memory_formats, self.operators, self.directions)
        for allocator, threads, dtype, memory_format, name, direction in itertools.product(*options):
            for shape in self.shapes:
                case = Case(name, direction, shape, dtype, memory_format, threads, allocator, self.device)
                if operators.is_measured(case):
                    yield case


def require(backends: Sequence[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: there is no such backend.
        BackendUnavailableError: it cannot run here.
    """
    for backend in backends:
        status = backend_status(backend)
        if not status.available:
            raise BackendUnavailableError(f"backend {backend!r} is not available: {status.reason}; {status.remedy}")


class Suite:
    """Measures cases into one file, showing each when it is done.

    Args:
        with_compile: compare with ``torch.compile``.
        backends: those to measure, every available one unless told; the first is compared.
    """

    def __init__(self, writer: Writer, show: Show, *, with_compile: bool = True, backends: Sequence[str] = ()) -> None:
        self._writer, self._show, self._with_compile = writer, show, with_compile
        self._session = Session(with_compile=with_compile, backends=backends)

    def tasks(self, selections: Sequence[Selection]) -> list[Task]:
        """For every case one; the allocator as it is comes first, since tuning cannot be undone."""
        seconds = {case: selection.seconds for selection in selections for case in selection.cases()}
        cases = sorted(seconds, key=lambda case: ALLOCATORS.index(case.allocator))
        tasks = []
        units = {compilation.unit(case) for case in cases}
        if self._with_compile and len(units) > 8:
            duration = 20.0 + _COMPILE_SECONDS * len(units) / (os.cpu_count() or 1)
            tasks.append(Task("torch.compile of all cases", duration, lambda _: self._compile(cases)))
        for heading, grouped in itertools.groupby(cases, key=_heading):
            group = list(grouped)
            tasks.append(Task(heading, 0.0, lambda _, heading=heading: self._begin(heading)))  # type: ignore[misc]
            on_cpu = group[0].device == "cpu"
            count = min(len(group), _AGAIN if on_cpu else _AGAIN_ON_GPU)
            # Spread out, but not so evenly that all have the same shape.
            some = [group[index * len(group) // count] for index in range(count)]
            visits = _visits(group[0])
            for visit in range(visits):
                if visit:
                    tasks.append(Task(heading, 0.0, lambda _: self._show("\nonce more; what follows counts all")))
                tasks += [self._task(case, seconds[case] / visits) for case in group]
                tasks += [self._task(case, seconds[case] / visits, again=True) for case in some]
        return tasks

    def _compile(self, cases: Sequence[Case]) -> None:
        self._show("\ncompiling the textbook's operators with torch.compile")
        compilation.warm_up(cases)

    def _begin(self, heading: str) -> None:
        self._show(f"\n{heading}; times in us")
        self._show(table.HEADER)

    def _task(self, case: Case, seconds: float, again: bool = False) -> Task:
        """A case; ``seconds`` more than its measuring takes where its tensors are large."""
        # Five rounds of four candidates.
        least = 5 * 4 * operators.moved_bytes(case) / _SLOW_BYTES_PER_SECOND / case.threads
        measuring = max(seconds, least)
        others = _CHECK_SECONDS + least / 5
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
        """The last measurement."""
        named = case.as_dict()
        return next(row for row in reversed(self._writer.rows) if row["kind"] == "operator" and row["case"] == named)


def _visits(case: Case) -> int:
    if case.device != "cpu":
        return _VISITS_ON_GPU
    return _VISITS if case.threads == 1 else _VISITS_OF_THREADS


def _heading(case: Case) -> str:
    return table.condition(case.as_dict())
