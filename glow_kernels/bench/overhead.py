"""What a call costs on next to no data: one image of 8x8, against one elementwise operation of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glow_kernels import available_backends
from glow_kernels.bench import operators, table, timing
from glow_kernels.bench.operators import OPERATORS, Case
from glow_kernels.bench.results import Row, Writer
from glow_kernels.bench.timing import Spread

SHAPE = (1, 12, 8, 8)


def run(device: torch.device, seconds: float, writer: Writer, show: Callable[[str], None]) -> list[Row]:
    """Measure every operator and direction that runs without a graph."""
    show(f"\ncall overhead, shape {'x'.join(map(str, SHAPE))}: times one elementwise operation")
    rows = []
    for operator in OPERATORS.values():
        for direction in ("no_grad", "inverse"):
            if direction in operator.moved:
                row = _measure(Case(operator.name, direction, SHAPE, device=str(device)), seconds, device)
                writer.write(row)
                rows.append(row)
                ratio = Spread(**row["ratio"])
                show(f"{operator.name:18} {direction:20} {ratio.median:5.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
    return rows


def _measure(case: Case, seconds: float, device: torch.device) -> Row:
    operator = OPERATORS[case.operator]
    arguments = operator.arguments(case)
    grads = operators.upstream(operator, case, arguments)
    x = torch.randn(SHAPE, device=device)
    candidates = {
        "elementwise": [lambda: x + 1.0],
        "eager": [operators.call(operator.plain, case.direction, arguments, grads)],
        "ours": [operators.call(operator.ours, case.direction, arguments, grads)],
    }
    times = timing.measure(candidates, seconds, device)
    return {
        "kind": "overhead",
        "case": case.as_dict(),
        "ours": available_backends()[0],
        "ratio": table.as_row(times.ratio("ours", "elementwise")),
        "seconds": {name: table.as_row(times.spread(name)) for name in candidates},
    }
