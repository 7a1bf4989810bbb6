"""Plots made from rows of results only."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from glow_kernels.bench import results, table
from glow_kernels.bench.operators import OPERATORS
from glow_kernels.bench.results import Row
from glow_kernels.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f5a99", "#d9822b", "#3d8f5f", "#9a4f96", "#7a7a7a", "#b8433c", "#4aa5b5", "#a58a1e")
_OTHERS = {"eager": "#d9822b", "compile": "#3d8f5f"}
_OURS = "#1f5a99"


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that most plots show: operators under the first condition measured with a tuned allocator."""
    chosen = table.measured(rows)
    tuned = [row for row in chosen if row["case"]["allocator"] == "tuned"] or chosen
    if not tuned:
        return []
    condition = table.condition(tuned[0]["case"])
    return [row for row in tuned if table.condition(row["case"]) == condition]


def speedups(rows: Sequence[Row]) -> Figure | None:
    """Heat maps: how many times faster than eager and than compiled code, by shape and direction."""
    measured = main_rows(rows)
    names = [name for name in _OTHERS if any(name in row["candidates"] for row in measured)]
    if not names:
        return None
    columns = list(dict.fromkeys(_shape(row) for row in measured))
    lines = list(dict.fromkeys(_line(row) for row in measured))
    figure, axes = _subplots(len(names), 1, 1.3 + 0.3 * len(lines), min(15.0, 0.85 * len(columns) + 3.5))
    for axis, name in zip(axes, names, strict=True):
        values = [[math.nan] * len(columns) for _ in lines]
        for row in measured:
            if name in row["candidates"]:
                values[lines.index(_line(row))][columns.index(_shape(row))] = table.ratio(row, name)
        _heat_map(axis, values)
        axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
        axis.set_yticks(range(len(lines)), lines)
        axis.set_title(f"times faster than {name}", fontsize=11)
        axis.set_xlabel("shape B x C x H x W")
    figure.suptitle(table.condition(measured[0]["case"]), fontsize=11)
    return figure


def percent_of_limit(rows: Sequence[Row]) -> Figure | None:
    """Bars: how close our, eager and compiled code come to the limit."""
    measured = main_rows(rows)
    if not measured:
        return None
    groups: dict[str, list[Row]] = {}
    for row in measured:
        groups.setdefault(_line(row), []).append(row)
    figure, axes = _subplots(len(groups), 2, 3.1, 14.0)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        names = [name for name in (*_OTHERS, group[0]["ours"]) if name in group[0]["candidates"]]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [row["candidates"].get(name, {}).get("percent_of_limit", 0.0) for row in group]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(group))]
            axis.bar(places, heights, width, label=name, color=_OTHERS.get(name, _OURS))
        axis.set_xticks(range(len(group)), [_shape(row) for row in group], rotation=35, ha="right")
        axis.axhline(100.0, color="#444", linewidth=0.8, linestyle="--")
        axis.set_title(title, fontsize=11)
        axis.set_ylabel("% of the limit")
    axes[0].legend(fontsize=9)
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Scatter plots: the roofline of the linear map, and the bandwidth of every operator by size."""
    measured = main_rows(rows)
    if not measured:
        return None
    linear = [row for row in measured if OPERATORS[row["case"]["operator"]].products]
    figure, (*left, axis) = _subplots(1 + bool(linear), 1 + bool(linear), 5.0, 14.0)
    for place in left:
        _roofs(place, linear)
    for index, operator in enumerate(dict.fromkeys(row["case"]["operator"] for row in measured)):
        group = [row for row in measured if row["case"]["operator"] == operator]
        sizes = [row["bytes"] / 1e6 for row in group]
        rates = [row["bytes"] / row["candidates"][row["ours"]]["seconds"][0] / 1e9 for row in group]
        axis.scatter(sizes, rates, s=20, color=_COLORS[index % len(_COLORS)], label=operator)
    copies: dict[float, list[float]] = {}
    for row in measured:
        copies.setdefault(row["bytes"] / 1e6, []).append(row["bytes"] / row["candidates"]["copy"]["seconds"][0] / 1e9)
    line = sorted((size, max(rates)) for size, rates in copies.items())
    axis.plot(*zip(*line, strict=True), color="#444", linewidth=1, linestyle="--", label="copy of the same bytes")
    axis.set(xscale="log", yscale="log", xlabel="MB that must be moved", ylabel="GB/s")
    _plain_numbers(axis)
    axis.set_title("bandwidth by size, every direction, ours", fontsize=11)
    axis.legend(fontsize=9)
    return figure


def _roofs(axis: Any, rows: Sequence[Row]) -> None:
    bandwidth = max(row["bytes"] / row["candidates"]["copy"]["seconds"][0] for row in rows)
    peak = max(
        (_operations(row) / row["candidates"]["matmul"]["seconds"][0] for row in rows if "matmul" in row["candidates"]),
        default=math.inf,
    )
    for name in (*_OTHERS, None):
        chosen = [row for row in rows if (name or row["ours"]) in row["candidates"]]
        intensities = [_operations(row) / row["bytes"] for row in chosen]
        rates = [_operations(row) / row["candidates"][name or row["ours"]]["seconds"][0] / 1e9 for row in chosen]
        color = _OTHERS[name] if name else _OURS
        axis.scatter(intensities, rates, s=20, marker="x" if name else "o", color=color, label=name or "ours")
    most = 2.0 * max(_operations(row) / row["bytes"] for row in rows)
    least = 0.5 * min(_operations(row) / row["bytes"] for row in rows)
    xs = [least * (most / least) ** (step / 20) for step in range(21)]
    roof = [min(bandwidth * x, peak) / 1e9 for x in xs]
    label = f"roofs: fastest copy {bandwidth / 1e9:.0f} GB/s"
    label += f", matrix product {peak / 1e9:.0f} Gflop/s" if peak < math.inf else ""
    axis.plot(xs, roof, color="#444", linewidth=1, linestyle="--", label=label)
    axis.set(xscale="log", yscale="log", xlabel="flop per byte that must be moved", ylabel="Gflop/s")
    _plain_numbers(axis)
    axis.set_title("roofline of the linear map, every direction and shape", fontsize=11)
    axis.legend(fontsize=9)


def training(rows: Sequence[Row]) -> Figure | None:
    """Bars: time and peak memory of a training step of a Glow, and of the same chain in other packages."""
    parts = ("training_step", "chain")
    measured = [row for row in results.of_kind(rows, "model") if "seconds" in row and row["case"]["part"] in parts]
    groups = table.models(measured)
    if not groups:
        return None
    figure, axes = _subplots(2 * len(groups), 2, 3.0, 14.0)
    for index, (title, group) in enumerate(groups.items()):
        names = [row["case"]["implementation"] for row in group]
        times = [1e3 * row["seconds"][0] for row in group]
        peaks = [row.get("peak_extra_bytes", 0) / 1e6 for row in group]  # rows of replayed graphs have no peak
        for axis, values, unit in zip(
            axes[2 * index :], (times, peaks), ("milliseconds", "peak memory, MB"), strict=False
        ):
            bars = axis.barh(names, values, color=[_OURS if name in _ours(group) else "#9db4cc" for name in names])
            axis.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], padding=3, fontsize=9)
            axis.margins(x=0.12)
            axis.invert_yaxis()
            axis.set_xlabel(unit)
            axis.set_title(title, fontsize=10)
    return figure


def curves(rows: Sequence[Row]) -> Figure | None:
    """Lines: memory and time of a training step by depth, batch and image size."""
    parts = {"steps": "depth K", "batch": "batch", "image_size": "height and width of the images"}
    found = {
        variable: [row for row in results.of_kind(rows, "model") if row["case"]["part"] == f"curve by {variable}"]
        for variable in parts
    }
    found = {variable: group for variable, group in found.items() if group}
    if not found:
        return None
    figure, axes = _subplots(2 * len(found), len(found), 3.8, max(7.0, 4.8 * len(found)))
    for place, (variable, group) in enumerate(found.items()):
        for index, name in enumerate(dict.fromkeys(row["case"]["implementation"] for row in group)):
            line = sorted(
                (row["case"][variable], row["peak_extra_bytes"] / 1e6, 1e3 * row["seconds"][0])
                for row in group
                if row["case"]["implementation"] == name
            )
            values, peaks, times = zip(*line, strict=True)
            options: dict[str, Any] = {
                "marker": "o",
                "markersize": 4,
                "label": name,
                "color": _COLORS[index % len(_COLORS)],
            }
            axes[place].plot(values, peaks, **options)
            axes[place + len(found)].plot(values, times, **options)
        for axis, label in ((axes[place], "peak memory, MB"), (axes[place + len(found)], "milliseconds")):
            axis.set(xscale="log", yscale="log", xlabel=parts[variable], ylabel=label)
            axis.grid(alpha=0.3)
            _plain_numbers(axis)
    figure.suptitle("a training step of the same chain by every package", fontsize=11)
    axes[0].legend(fontsize=8)
    return figure


def learning(rows: Sequence[Row]) -> Figure | None:
    """Lines: bits/dim of a training run by seconds and by steps."""
    measured = list(results.of_kind(rows, "curve"))
    if not measured:
        return None
    figure, axes = _subplots(2, 2, 4.2, 12.0)
    begun = []
    for index, row in enumerate(measured):
        name, color = row["case"]["implementation"], _COLORS[index]
        train, validation = _medians(row["train"]), [_numbers(point) for point in row["validation"]]
        begun += [bits for *_, bits in [*train[1:], *validation] if math.isfinite(bits)]
        for column, axis in ((1, axes[0]), (0, axes[1])):
            for points, style, what in ((train, "-", "batches"), (validation, "o--", "validation")):
                xs, ys = [point[column] for point in points], [point[2] for point in points]
                axis.plot(xs, ys, style, color=color, markersize=4, label=f"{name}: {what}")
    for axis, unit in zip(axes, ("seconds since the run began", "steps"), strict=True):
        axis.set(xscale="log", xlabel=unit, ylabel="bits/dim")
        if begun:  # without the first batches, which are far above all others
            axis.set_ylim(min(begun) - 0.1, max(begun) + 0.1)
        axis.grid(alpha=0.3)
        _plain_numbers(axis)
    axes[0].legend(fontsize=8)
    return figure


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _medians(points: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """The median of every five points, to smooth the differences between batches."""
    fives = [[_numbers(point) for point in points[first : first + 5]] for first in range(0, len(points), 5)]
    return [[statistics.median(values) for values in zip(*five, strict=True)] for five in fives]


def activations(rows: Sequence[Row]) -> Figure | None:
    """Lines: peak and kept bytes of activations by depth, at the sizes of the published benchmark."""
    measured = list(results.of_kind(rows, "memory"))
    if not measured:
        return None
    figure, (axis,) = _subplots(1, 1, 4.0, 9.0)
    for index, policy in enumerate(dict.fromkeys(row["case"]["policy"] for row in measured)):
        group = sorted(
            (row["case"]["steps"], row["peak_bytes"] / 1e9, row["kept_bytes"] / 1e9)
            for row in measured
            if row["case"]["policy"] == policy
        )
        steps, peaks, kept = zip(*group, strict=True)
        axis.plot(steps, peaks, "o-", color=_COLORS[index], label=f"{policy}: peak")
        axis.plot(steps, kept, "s:", color=_COLORS[index], label=f"{policy}: kept after forward")
    axis.set(xlabel="steps of flow per level, K", ylabel="GB", yscale="log")
    axis.set_title("activations of a training step at 256x256, batch 8, 256 hidden channels, 3 levels", fontsize=11)
    axis.legend(fontsize=8)
    return figure


PLOTS: dict[str, Callable[[Sequence[Row]], Any]] = {
    "speedups": speedups,
    "percent_of_limit": percent_of_limit,
    "roofline": roofline,
    "training": training,
    "curves": curves,
    "activations": activations,
    "learning": learning,
}


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _operations(row: Row) -> float:
    """The number of floating-point operations in the matrix products."""
    case = row["case"]
    products = OPERATORS[case["operator"]].products[case["direction"]]
    return 2.0 * products * float(case["shape"][1] * math.prod(case["shape"]))


def _ours(group: Sequence[Row]) -> list[str]:
    ours = group[0]["ours"]
    return [name for row in group if (name := row["case"]["implementation"]).startswith(ours)]


def _heat_map(axis: Any, values: list[list[float]]) -> None:
    import matplotlib.colors

    axis.set_facecolor("#d8d8d8")  # gray for cells without a measurement, since white means equal times
    axis.imshow(values, cmap="RdBu", norm=matplotlib.colors.LogNorm(1 / 8, 8), aspect="auto")
    for line, entries in enumerate(values):
        for column, value in enumerate(entries):
            if value == value:  # not NaN, which means not measured
                color = "white" if value > 4 or value < 1 / 4 else "black"
                axis.text(column, line, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)


def _plain_numbers(axis: Any) -> None:
    """Label logarithmic axes with 40 instead of 4 x 10^1."""
    from matplotlib.ticker import LogLocator

    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(lambda value, _: f"{value:g}")
        one.set_minor_locator(LogLocator(base=10, subs=()))


def _subplots(count: int, columns: int, height: float, width: float) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'glow_kernels[train]'") from error
    lines = -(-count // columns)
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _line(row: Row) -> str:
    return f"{row['case']['operator']} {row['case']['direction']}"


def _shape(row: Row) -> str:
    return table.shape(row["case"]["shape"])
