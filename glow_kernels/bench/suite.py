"""Which cases a run measures, and the run itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from glow_kernels.allocator import tune_allocator
from glow_kernels.backends import backend_status
from glow_kernels.bench import measurement, table
from glow_kernels.bench.operators import (
    DIRECTIONS,
    DTYPES,
    MEMORY_FORMATS,
    OPERATORS,
    STANDARD_SHAPES,
    Case,
    Shape,
    operator,
)
from glow_kernels.bench.results import Row, Writer
from glow_kernels.errors import BackendUnavailableError, UsageError

ALLOCATORS = ("default", "tuned")


@dataclass(frozen=True)
class Selection:
    """What a run of the operators measures; every choice is a product of these."""

    operators: Sequence[str] = tuple(OPERATORS)
    directions: Sequence[str] = DIRECTIONS
    shapes: Sequence[Shape] = STANDARD_SHAPES
    dtypes: Sequence[str] = ("float32",)
    memory_formats: Sequence[str] = ("contiguous",)
    threads: Sequence[int] = (1,)
    allocators: Sequence[str] = ("tuned",)
    backends: Sequence[str] = ()
    device: str = "cpu"
    seconds: float = 0.5
    with_compile: bool = True

    def __post_init__(self) -> None:
        for name in self.operators:
            operator(name)
        for what, values, choices in (
            ("direction", self.directions, DIRECTIONS),
            ("dtype", self.dtypes, DTYPES),
            ("memory format", self.memory_formats, MEMORY_FORMATS),
            ("allocator", self.allocators, ALLOCATORS),
        ):
            for value in values:
                if value not in choices:
                    raise UsageError(f"{what} must be one of {', '.join(choices)}, got {value!r}")
        for backend in self.backends:
            status = backend_status(backend)
            if not status.available:
                raise BackendUnavailableError(f"backend {backend!r} is not available: {status.reason}; {status.remedy}")

    def cases(self) -> Iterator[Case]:
        """The default allocator first, since tuning cannot be undone."""
        allocators = sorted(self.allocators, key=ALLOCATORS.index)
        options = (allocators, self.threads, self.dtypes, self.memory_formats, self.operators, self.directions)
        for allocator, threads, dtype, memory_format, name, direction in itertools.product(*options):
            if direction in OPERATORS[name].moved:
                for shape in self.shapes:
                    yield Case(name, direction, shape, dtype, memory_format, threads, allocator, self.device)


def run(selection: Selection, writer: Writer, show: Callable[[str], None]) -> list[Row]:
    """Measure all cases, writing and showing each when it is done."""
    rows: list[Row] = []
    group: tuple[object, ...] | None = None
    for case in selection.cases():
        heading = (case.threads, case.allocator, case.dtype, case.memory_format)
        if heading != group:
            group = heading
            show(
                f"\n{case.threads} threads, allocator {case.allocator}, {case.dtype}, {case.memory_format}; times in us"
            )
            show(table.HEADER)
        if case.allocator == "tuned":
            tune_allocator()
        with measurement.threads(case.threads):
            row = measurement.measure(
                case, seconds=selection.seconds, with_compile=selection.with_compile, backends=selection.backends
            )
        torch.compiler.reset()
        writer.write(row)
        rows.append(row)
        show(table.operator_line(row))
    show("")
    for line in table.summary(rows):
        show(line)
    return rows
