"""Results as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from glow_kernels.bench import results
from glow_kernels.bench.results import Row

# Two measurements of a ratio agree if they differ by less than this fraction.
_SAME = 0.1

HEADER = (
    f"{'operator':18} {'direction':20} {'shape':16} {'copy':>9} {'eager':>9} {'compile':>9} {'ours':>9} {'call':>9}  "
    f"{'eager/ours':>17} {'compile/ours':>19} {'% of limit':>11} {'GB/s':>6} {'MB extra':>8}"
)


def operator_line(row: Row) -> str:
    """One case: medians of the candidates in microseconds, and ratios of the fastest rounds with their range.

    On a GPU these are times of replayed CUDA graphs; an asterisk marks candidates that could not be captured. ``call``
    is the time of a plain call of ours, in which the host may take longer to launch than the device to compute.
    """
    case = row["case"]
    name = f"{case['operator']:18} {case['direction']:20} {shape(case['shape']):16}"
    if "candidates" not in row:
        return f"{name} WRONG: " + "; ".join(f"{backend}: {problem}" for backend, problem in row["wrong"].items())
    candidates = row["candidates"]
    columns = [_microseconds(candidates.get(column)) for column in ("copy", "eager", "compile", row["ours"])]
    ratios = [_ratio(candidates.get(column)) for column in ("eager", "compile")]
    ours = candidates[row["ours"]]
    line = (
        f"{name} {' '.join(columns)} {_microseconds(ours, 'call')}  {ratios[0]:>17} {ratios[1]:>19} "
        f"{ours['percent_of_limit']:10.0f}% "
        f"{row['bytes'] / ours['seconds'][0] / 1e9:6.1f} {ours['peak_extra_bytes'] / 1e6:8.1f}"
    )
    others = [other for other in candidates if other not in ("copy", "matmul", "eager", "compile", row["ours"])]
    line += "".join(f"  {other} {_microseconds(candidates[other]).strip()}" for other in others)
    if "matmul" in candidates:
        line += f"  matmul {_microseconds(candidates['matmul']).strip()}"
    return line + "".join(f"  WRONG {backend}: {problem}" for backend, problem in row.get("wrong", {}).items())


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Geometric means under every condition, and how well ratios agree when measured again."""
    for heading, means in overview(rows).items():
        yield f"\n{heading}: geometric means over shapes"
        for mean in means:
            parts = [
                f"{figure:.2f}x {name} (least {least:.2f}x)" for name, (figure, least, _) in mean.faster_than.items()
            ]
            parts.append(f"{mean.percent_of_limit:.0f}% of the limit")
            yield f"{mean.operator:18} {mean.direction:20} {', '.join(parts)}"
    yield ""
    share, count = repeatability(rows)
    if count:
        yield f"measured twice in this run: {100 * share:.0f}% of {count} ratios differ by less than 10%"


@dataclass(frozen=True)
class Mean:
    """Means over shapes: ``faster_than`` maps eager and compile to (mean, least, number of shapes)."""

    operator: str
    direction: str
    faster_than: dict[str, tuple[float, float, int]]
    percent_of_limit: float


def overview(rows: Sequence[Row]) -> dict[str, list[Mean]]:
    """Means of every operator and direction, by condition."""
    groups: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in measured(rows):
        case = row["case"]
        groups.setdefault(condition(case), {}).setdefault((case["operator"], case["direction"]), []).append(row)
    return {
        heading: [_mean(operator, direction, group) for (operator, direction), group in directions.items()]
        for heading, directions in groups.items()
    }


def _mean(operator: str, direction: str, rows: Sequence[Row]) -> Mean:
    faster_than = {}
    for name in ("eager", "compile"):
        ratios = [ratio(row, name) for row in rows if name in row["candidates"]]
        if ratios:
            faster_than[name] = geometric_mean(ratios), min(ratios), len(ratios)
    percents = [row["candidates"][row["ours"]]["percent_of_limit"] for row in rows]
    return Mean(operator, direction, faster_than, geometric_mean(percents))


def measured(rows: Sequence[Row]) -> list[Row]:
    """The last measurement of every operator case whose results were right."""
    return [row for row in results.of_kind(rows, "operator") if "candidates" in row]


def condition(case: Row) -> str:
    """The condition under which an operator is measured, as text."""
    threads = "1 thread" if case["threads"] == 1 else f"{case['threads']} threads"
    if case["device"] != "cpu":
        return f"{case['dtype']}, {case['memory_format']}"
    allocator = "tuned allocator" if case["allocator"] == "tuned" else "allocator as it is"
    return f"{threads}, {allocator}, {case['dtype']}, {case['memory_format']}"


def title(case: Row) -> str:
    """The part and the sizes of a model, as text."""
    sizes = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in case.items()
        if name not in ("part", "implementation", "device", "threads")
    )
    return f"{case['part'].replace('_', ' ')}: {sizes}"


def models(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of models by part and sizes; rows of models that failed have only a name and the reason."""
    groups: dict[str, list[Row]] = {}
    for row in results.of_kind(rows, "model"):
        groups.setdefault(title(row["case"]), []).append(row)
    return groups


def model_cells(row: Row) -> tuple[str, str, str, str]:
    """Images per second, time relative to ours if both took turns, peak in MB if it was counted, and a note."""
    images = f"{row['images_per_second']:.4g}" if "seconds" in row else ""
    ratio = f"{row['ratio_to_ours'][0]:.2f}" if "ratio_to_ours" in row else ""
    peak = f"{row['peak_extra_bytes'] / 1e6:.3g}" if "peak_extra_bytes" in row else ""
    return images, ratio, peak, row.get("failed") or row["note"]


def ratio(row: Row, name: str) -> float:
    """How many times longer ``name`` took than ours did."""
    return float(row["candidates"][name]["ratio_to_ours"][0])


def shape(sizes: Sequence[int]) -> str:
    """A shape as it is given on the command line."""
    return "x".join(map(str, sizes))


def repeatability(rows: Sequence[Row]) -> tuple[float, int]:
    """The share of ratios that differ by less than 10% when measured again, NaN if there are none, and their number."""
    differences = [
        abs(again / row["first"][name] - 1.0)
        for row in results.of_kind(rows, "repeat")
        for name, again in row["again"].items()
    ]
    share = sum(difference < _SAME for difference in differences) / len(differences) if differences else math.nan
    return share, len(differences)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of at least one positive value."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _microseconds(candidate: Row | None, what: str = "seconds") -> str:
    if candidate is None or what not in candidate:
        return f"{'-':>9}"
    mark = "*" if what == "seconds" and not candidate.get("replayed", True) else ""
    return f"{f'{1e6 * candidate[what][0]:.1f}{mark}':>9}"


def _ratio(candidate: Row | None) -> str:
    if candidate is None:
        return "-"
    return in_range(*candidate["ratio_to_ours"])


def in_range(ratio: float, low: float, high: float) -> str:
    """A ratio with its range, as :meth:`glow_kernels.bench.timing.Times.ratio` gives them."""
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"
