"""A page and plots from a file of results, and nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glow_kernels.bench import check, results, table
from glow_kernels.bench.results import Row
from glow_kernels.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f5a99", "#d9822b", "#3d8f5f", "#9a4f96", "#7a7a7a", "#b8433c")
_TIMES = ("copy us", "eager us", "compile us", "ours us")
_CASE_HEADER = ("case", *_TIMES, "eager/ours", "compile/ours", "% of limit", "GB/s")
_MODEL_HEADER = ("case", "images/s", "times ours", "peak MB", "note")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #eee; } th { background: #f6f6f6; }
td:first-child, th:first-child { text-align: left; }
.reached { color: #1d7a3e; } .missed { color: #b3261e; font-weight: 600; } .not { color: #777; }
"""


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``report.html``, which needs no other file, and its plots as PNG.

    Raises:
        MissingDependencyError: there is no matplotlib.
        DataError: the folder cannot be written.
    """
    figures = {name: draw(rows) for name, draw in PLOTS.items()}
    pictures = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.png" for name in pictures]
        for path, picture in zip(paths, pictures.values(), strict=True):
            path.write_bytes(picture)
        page = folder / "report.html"
        page.write_text(_page(rows, pictures))
    except OSError as error:
        raise DataError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return [page, *paths]


def percent_of_limit(rows: Sequence[Row]) -> Figure | None:
    """Bars: how close ours, eager and compiled code come to a copy of the same bytes."""
    measured = _operators(rows)
    if not measured:
        return None
    groups = _grouped(measured)
    figure, axes = _subplots(len(groups), 2, 3.2)
    for axis, ((operator, direction), group) in zip(axes, groups.items(), strict=False):
        names = [name for name in ("eager", "compile", group[0]["ours"]) if name in group[0]["candidates"]]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [row["candidates"].get(name, {}).get("percent_of_limit", 0.0) for row in group]
            axis.bar(
                [place + index * width for place in range(len(group))], heights, width, label=name, color=_COLORS[index]
            )
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(group))])
        axis.set_xticklabels([_shape(row) for row in group], rotation=60, ha="right", fontsize=7)
        axis.axhline(100.0, color="#444", linewidth=0.8, linestyle="--")
        axis.set_title(f"{operator}, {direction}", fontsize=9)
        axis.set_ylabel("% of the limit", fontsize=8)
    axes[0].legend(fontsize=8)
    return figure


def speedups(rows: Sequence[Row]) -> Figure | None:
    """Heat maps: how many times faster than eager and than compiled code, by shape and direction."""
    measured = [row for row in _operators(rows) if "eager" in row["candidates"]]
    if not measured:
        return None
    columns = list(dict.fromkeys(_shape(row) for row in measured))
    lines = list(_grouped(measured))
    names = [name for name in ("eager", "compile") if any(name in row["candidates"] for row in measured)]
    figure, axes = _subplots(len(names), 1, 0.9 + 0.32 * len(lines), 0.75 * len(columns) + 3.0)
    for axis, name in zip(axes, names, strict=False):
        values = [[float("nan")] * len(columns) for _ in lines]
        for row in measured:
            if name in row["candidates"]:
                line = lines.index((row["case"]["operator"], row["case"]["direction"]))
                values[line][columns.index(_shape(row))] = table.ratio(row, name)
        _heat_map(axis, values)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(lines)), [" ".join(line) for line in lines], fontsize=8)
        axis.set_title(f"times faster than {name}: red is slower, blue is faster", fontsize=10)
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Points: bandwidth by size of the data, and that of the copy."""
    measured = _operators(rows)
    if not measured:
        return None
    figure, (axis,) = _subplots(1, 1, 4.5)
    for index, operator in enumerate(dict.fromkeys(row["case"]["operator"] for row in measured)):
        group = [row for row in measured if row["case"]["operator"] == operator]
        for name, marker in ((None, "o"), ("eager", "x")):
            chosen = [row for row in group if (name or row["ours"]) in row["candidates"]]
            rates = [row["candidates"][name or row["ours"]]["bytes_per_second"] / 1e9 for row in chosen]
            sizes = [row["bytes"] / 1e6 for row in chosen]
            label = f"{operator}, {name or 'ours'}"
            axis.scatter(sizes, rates, s=18, marker=marker, color=_COLORS[index % len(_COLORS)], label=label)
    copies = sorted((row["bytes"] / 1e6, row["candidates"]["copy"]["bytes_per_second"] / 1e9) for row in measured)
    axis.plot(*zip(*copies, strict=True), color="#444", linewidth=0.8, linestyle="--", label="copy")
    axis.set(xscale="log", yscale="log", xlabel="MB moved", ylabel="GB/s")
    axis.legend(fontsize=7, ncols=2)
    axis.set_title("bandwidth by size, every direction", fontsize=10)
    return figure


def depth(rows: Sequence[Row]) -> Figure | None:
    """Lines: memory and time of a training step by depth."""
    measured = [row for row in results.of_kind(list(rows), "model") if row["case"]["part"] == "depth"]
    if not measured:
        return None
    figure, axes = _subplots(2, 2, 3.6)
    for index, name in enumerate(dict.fromkeys(row["case"]["implementation"] for row in measured)):
        group = sorted(
            (row for row in measured if row["case"]["implementation"] == name), key=lambda row: row["case"]["steps"]
        )
        steps = [row["case"]["steps"] for row in group]
        options = {"marker": "o", "label": name, "color": _COLORS[index % len(_COLORS)]}
        axes[0].plot(steps, [row["peak_extra_bytes"] / 1e6 for row in group], **options)
        axes[1].plot(steps, [1e3 * row["seconds"]["median"] for row in group], **options)
    for axis, label in zip(axes, ("peak memory, MB", "milliseconds"), strict=True):
        axis.set(xlabel="steps K", ylabel=label)
        axis.set_title(f"training step: {label.partition(',')[0]} by depth", fontsize=10)
    axes[0].legend(fontsize=8)
    return figure


PLOTS: dict[str, Callable[[Sequence[Row]], Any]] = {
    "speedups": speedups,
    "percent_of_limit": percent_of_limit,
    "roofline": roofline,
    "depth": depth,
}


def _heat_map(axis: Any, values: list[list[float]]) -> None:
    import matplotlib.colors

    axis.set_facecolor("#d8d8d8")  # what was not measured, unlike the white of equal times
    axis.imshow(values, cmap="RdBu", norm=matplotlib.colors.LogNorm(1 / 16, 16), aspect="auto")
    for line, entries in enumerate(values):
        for column, value in enumerate(entries):
            if value == value:  # not NaN, which nothing measured
                color = "white" if value > 6 or value < 1 / 6 else "black"
                axis.text(column, line, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)


def _subplots(count: int, columns: int, height: float, width: float = 12.0) -> tuple[Figure, list[Any]]:
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
        axis.tick_params(labelsize=8)
    return figure, axes[:count]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _page(rows: Sequence[Row], pictures: dict[str, bytes]) -> str:
    sections = [f"<h1>Benchmarks of glow_kernels</h1>{''.join(_environment(row) for row in _environments(rows))}"]
    sections.append("<h2>Goals</h2>" + _table(("goal", "verdict", "figure", "wanted", "where"), _goals(rows)))
    for name, picture in pictures.items():
        source = base64.b64encode(picture).decode()
        title = name.replace("_", " ")
        sections.append(f'<h2>{title.capitalize()}</h2><img alt="{title}" src="data:image/png;base64,{source}">')
    header = (
        "case",
        "copy us",
        "eager us",
        "compile us",
        "ours us",
        "eager/ours",
        "compile/ours",
        "% of limit",
        "GB/s",
    )
    sections.append("<h2>Every case</h2>" + _table(header, [_cells(row) for row in _operators(rows)]))
    models = list(results.of_kind(list(rows), "model"))
    if models:
        sections.append("<h2>Models</h2>" + _table(_MODEL_HEADER, [_model_cells(row) for row in models]))
    body = "\n".join(sections)
    title = "<title>glow_kernels benchmarks</title>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{_STYLE}</style><body>{body}</body></html>'
    )


def _environment(row: Row) -> str:
    dirty = " with local changes" if row["dirty"] else ""
    parts = (row["date"], row["device"], f"torch {row['torch']}", f"commit {str(row['commit'])[:12]}{dirty}")
    return f"<p>{html.escape(' · '.join(parts))}</p>"


def _environments(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "environment"]


def _goals(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for goal in check.checks(rows):
        figure = "" if goal.verdict == "not measured" else f"{goal.figure:.2f}"
        wanted = f"{'at least' if goal.at_least else 'at most'} {goal.goal}"
        lines.append([goal.name, goal.verdict, figure, wanted, goal.where])
    return lines


def _cells(row: Row) -> list[str]:
    case, candidates = row["case"], row["candidates"]
    name = (
        f"{case['operator']} {case['direction']} {_shape(row)} {case['dtype']} {case['threads']}t {case['allocator']}"
    )
    times = [candidates.get(column) for column in ("copy", "eager", "compile", row["ours"])]
    ratios = [f"{table.ratio(row, other):.2f}" if other in candidates else "" for other in ("eager", "compile")]
    ours = candidates[row["ours"]]
    return [
        name,
        *("" if time is None else f"{1e6 * time['seconds_median']:.1f}" for time in times),
        *ratios,
        f"{ours['percent_of_limit']:.0f}",
        f"{ours['bytes_per_second'] / 1e9:.1f}",
    ]


def _model_cells(row: Row) -> list[str]:
    name = " ".join(f"{key}={value}" for key, value in row["case"].items())
    ratio, peak = row["ratio_to_ours"]["median"], row["peak_extra_bytes"] / 1e6
    return [name, f"{row['images_per_second']:.1f}", f"{ratio:.2f}", f"{peak:.1f}", row["note"]]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    name = text.split()[0] if text in ("reached", "missed", "not measured") else ""
    return f'<td class="{name}">{html.escape(text)}</td>' if name else f"<td>{html.escape(text)}</td>"


def _operators(rows: Sequence[Row]) -> list[Row]:
    return [row for row in results.of_kind(list(rows), "operator") if "candidates" in row]


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"]["operator"], row["case"]["direction"]), []).append(row)
    return groups


def _shape(row: Row) -> str:
    return "x".join(map(str, row["case"]["shape"]))
