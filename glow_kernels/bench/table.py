"""Results as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from glow_kernels.bench.results import Row
from glow_kernels.bench.timing import Spread

HEADER = (
    f"{'operator':18} {'direction':20} {'shape':16} {'copy':>9} {'eager':>9} {'compile':>9} {'ours':>9}  "
    f"{'eager/ours':>17} {'compile/ours':>19} {'% of limit':>11} {'GB/s':>6} {'MB extra':>8}"
)


def operator_line(row: Row) -> str:
    """One case: microseconds of the candidates, ratios with their 20th and 80th percentile."""
    case = row["case"]
    name = f"{case['operator']:18} {case['direction']:20} {'x'.join(map(str, case['shape'])):16}"
    if "candidates" not in row:
        return f"{name} WRONG: " + "; ".join(f"{backend}: {problem}" for backend, problem in row["wrong"].items())
    candidates = row["candidates"]
    columns = [_microseconds(candidates.get(column)) for column in ("copy", "eager", "compile", row["ours"])]
    ratios = [_ratio(candidates.get(column)) for column in ("eager", "compile")]
    ours = candidates[row["ours"]]
    line = (
        f"{name} {' '.join(columns)}  {ratios[0]:>17} {ratios[1]:>19} {ours['percent_of_limit']:10.0f}% "
        f"{ours['bytes_per_second'] / 1e9:6.1f} {ours['peak_extra_bytes'] / 1e6:8.1f}"
    )
    others = [other for other in candidates if other not in ("copy", "matmul", "eager", "compile", row["ours"])]
    line += "".join(f"  {other} {_microseconds(candidates[other]).strip()}" for other in others)
    if "matmul" in candidates:
        line += f"  matmul {_microseconds(candidates['matmul']).strip()}"
    return line + "".join(f"  WRONG {backend}: {problem}" for backend, problem in row.get("wrong", {}).items())


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means for every operator and direction, and how far ratios differ when measured again."""
    lines = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "candidates" in row:
            groups.setdefault((row["case"]["operator"], row["case"]["direction"]), []).append(row)
    for (operator, direction), group in groups.items():
        parts = []
        for name in ("eager", "compile"):
            ratios = [ratio(row, name) for row in group if name in row["candidates"]]
            if ratios:
                parts.append(f"{geometric_mean(ratios):.2f}x {name} (least {min(ratios):.2f}x)")
        lines.append(f"{operator:18} {direction:20} {', '.join(parts)}")
    differences = repeat_differences(rows)
    if differences:
        within = sum(difference < 0.1 for difference in differences) / len(differences)
        lines.append(f"measured twice: {100 * within:.0f}% of {len(differences)} ratios differ by less than 10%")
    return lines


def ratio(row: Row, name: str) -> float:
    """How many times longer ``name`` took than ours."""
    return float(row["candidates"][name]["ratio_to_ours"]["median"])


def repeat_differences(rows: Iterable[Row]) -> list[float]:
    """Relative differences of the ratios to eager and ``torch.compile`` between two measurements in one run."""
    found = []
    for row in rows:
        for name in ("eager", "compile"):
            if name in row.get("candidates", {}):
                first, again = ratio(row, name), row["candidates"][name]["ratio_to_ours_again"]
                found.append(abs(first / again - 1.0))
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios, at least one."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _microseconds(candidate: Row | None) -> str:
    return f"{'-':>9}" if candidate is None else f"{1e6 * candidate['seconds_median']:9.1f}"


def _ratio(candidate: Row | None) -> str:
    if candidate is None:
        return "-"
    spread = candidate["ratio_to_ours"]
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def as_row(spread: Spread) -> Row:
    """As JSON."""
    return asdict(spread)
