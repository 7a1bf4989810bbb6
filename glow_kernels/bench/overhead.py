"""Measures the overhead of a call: its time on one 8x8 image, relative to one elementwise operation of PyTorch."""

from __future__ import annotations

import functools

import torch

from glow_kernels import tune_allocator
from glow_kernels.bench import operators, table, timing
from glow_kernels.bench.measurement import threads
from glow_kernels.bench.operators import OPERATORS, Case
from glow_kernels.bench.plan import Show, Task
from glow_kernels.bench.results import Row, Writer

SHAPE = (1, 12, 8, 8)


def tasks(device: torch.device, writer: Writer, show: Show) -> list[Task]:
    """A task for every operator and direction that runs without an autograd graph."""

    def measure(case: Case, seconds: float) -> None:
        row = _measure(case, seconds, device)
        writer.write(row)
        show(f"{case.operator:18} {case.direction:20} {table.in_range(*row['ratio'])}")

    title = f"call overhead, shape {table.shape(SHAPE)}: times one elementwise operation"
    found = [Task("call overhead", 0.0, lambda _: show(f"\n{title}"))]
    for name in OPERATORS:
        for direction in ("no_grad", "inverse"):
            case = Case(name, direction, SHAPE, device=str(device))
            if operators.is_measured(case):
                found.append(Task(f"call overhead of {name}", 0.4, functools.partial(measure, case)))
    return found


def _measure(case: Case, seconds: float, device: torch.device) -> Row:
    operator = OPERATORS[case.operator]
    arguments = operator.arguments(case)
    x = torch.randn(SHAPE, device=device)
    candidates: dict[str, list[operators.Function]] = {
        "elementwise": [lambda: x + 1.0],
        "eager": [operators.without_graph(operator.textbook, case.direction, arguments)],
        "ours": [operators.without_graph(operator.ours, case.direction, arguments)],
    }
    tune_allocator()
    with threads(case.threads), torch.no_grad():  # outside the timing: entering it takes half as long as a call
        times = timing.measure(candidates, seconds, device)
    return {
        "kind": "overhead",
        "case": case.as_dict(),
        "ours": operators.backends_on(device)[0],
        "ratio": list(times.ratio("ours", "elementwise")),
        "seconds": {name: times.spread(name).as_row() for name in candidates},
    }
