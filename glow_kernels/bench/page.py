"""Writes the report of rows of results: one self-contained HTML file, and its plots as PNG files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from glow_kernels.bench import check, plots, table
from glow_kernels.bench.check import Check
from glow_kernels.bench.results import Row
from glow_kernels.errors import DataError

_CAPTIONS = {
    "speedups": "Speed-up by shape",
    "percent_of_limit": "Distance to the limit",
    "roofline": "Roofline and bandwidth",
    "training": "Training steps",
    "curves": "Time and memory by depth, batch and image size",
    "activations": "Activations of a deep Glow",
    "learning": "A training",
}
_EXPLAINED = {
    "speedups": "Blue is faster than the other, red slower; all candidates take turns.",
    "percent_of_limit": "The limit is a copy that reads and writes as many bytes as the operator must, or the matrix "
    "product where that takes longer.",
    "roofline": "Left: the linear map, which a copy limits for few channels and the matrix product for many.",
    "training": "Forward and backward. Peak memory is what PyTorch's allocator held beyond parameters and data.",
    "curves": "12 channels, 64 hidden channels; what does not vary is 4 steps, batch 8, 16 x 16.",
    "activations": "Counted with fake tensors, without the gradients of parameters; best published peak: 5.07 GB.",
    "learning": "32 x 32 patches of photographs, from the same seed with the same settings and for the same time; "
    "batches as medians of five, validation of averaged weights.",
}
_STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #e3e8ee; --blue: #1f5a99; }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); margin: 0; background: #f6f8fa; }
header { background: var(--blue); color: white; padding: 2rem max(1.5rem, calc(50vw - 620px)); }
header h1 { margin: 0; font-size: 2rem; } header p { margin: .3rem 0 .5rem; color: white; }
nav a { color: white; margin-right: 1.2rem; font-size: .95rem; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
section { background: white; border: 1px solid var(--line); border-radius: 8px; }
section { padding: .4rem 1.5rem 1.2rem; margin: 1.2rem 0; }
h2 { font-size: 1.3rem; } h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; } p { color: var(--soft); margin: .3rem 0; }
img { max-width: 100%; display: block; margin: .6rem auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; white-space: nowrap; margin: .4rem 0; }
th, td { padding: 3px 11px; text-align: right; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
th { background: #eef2f6; cursor: pointer; position: sticky; top: 0; } td.text, th.text { text-align: left; }
tbody tr:hover { background: #f3f7fb; } summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.counts span { display: inline-block; padding: .5rem 1.1rem; border-radius: 8px; font-weight: 600; }
.counts span { margin: .3rem .6rem .3rem 0; }
.reached { color: #1d7a3e; } .missed { color: #b3261e; } .not { color: #77828e; }
.counts .reached { background: #e3f3e8; } .counts .missed { background: #fbe6e4; } .counts .not { background: #eceff2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .4rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
"""
# A click on a column's header sorts by it, numbers by value; a second click reverses the order.
_SCRIPT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const column = [...head.parentNode.children].indexOf(head), body = head.closest("table").tBodies[0];
  const sign = head.dataset.sign = head.dataset.sign === "1" ? "-1" : "1";
  const value = row => { const text = row.children[column].textContent, number = parseFloat(text);
    return isNaN(number) ? text : number; };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    return sign * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1); })
    .forEach(row => body.append(row));
}));
"""
_CASE_HEADER = (
    *("direction", "shape", "condition", "copy us", "eager us", "compile us", "ours us", "p20 us", "p80 us"),
    *("call us", "eager / ours", "compile / ours", "MB moved", "GB/s", "% of limit", "extra MB"),
)
_MODEL_HEADER = ("implementation", "ms", "p20", "p80", "images/s", "time / ours", "peak MB", "note")


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``report.html``, which needs no other file, and its plots as PNG files; returns their paths.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        DataError: the folder cannot be written.
    """
    figures = {name: draw(rows) for name, draw in plots.PLOTS.items()}
    pictures = {name: plots.png(figure) for name, figure in figures.items() if figure is not None}
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


def _page(rows: Sequence[Row], pictures: dict[str, bytes]) -> str:
    sections = {"Goals": _goals(check.checks(rows)), "Operators": _overview(rows)}
    sections |= {_CAPTIONS[name]: _picture(name, picture) for name, picture in pictures.items()}
    sections |= {"Every case": _cases(rows), "Every model": _models(rows)}
    sections = {title: body for title, body in sections.items() if body}
    sections["Where this was measured"] = _environments(rows)
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>' for title, body in sections.items()
    )
    runs = [row for row in rows if row["kind"] == "environment"]
    devices = " · ".join(dict.fromkeys(run["device"] for run in runs))
    dates = " to ".join(dict.fromkeys((runs[0]["date"][:10], runs[-1]["date"][:10]))) if runs else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>glow_kernels benchmarks</title>'
        f"<style>{_STYLE}</style><body><header><h1>glow_kernels benchmarks</h1>"
        f"<p>{html.escape(devices)}, {dates}</p><nav>{links}</nav></header><main>{body}</main>"
        f"<script>{_SCRIPT}</script></body></html>"
    )


def _goals(found: Sequence[Check]) -> str:
    counts = [goal.verdict for goal in found]
    badges = "".join(
        f'<span class="{verdict.split()[0]}">{counts.count(verdict)} {verdict}</span>'
        for verdict in ("reached", "missed", "not measured")
    )
    parts = [f'<div class="counts">{badges}</div>']
    for group in dict.fromkeys(goal.group for goal in found):
        inside = [goal for goal in found if goal.group == group]
        lines = [
            (goal.name, goal.verdict, f"{goal.figure:.3g}" if goal.is_measured else "", goal.wanted, goal.where)
            for goal in inside
        ]
        header = ("goal", "verdict", "figure", "wanted", "where")
        parts.append(_folded(f"{group}: {check.tally(inside)}", _table(header, lines, text=(0, 1, 3, 4))))
    return "".join(parts)


def _overview(rows: Sequence[Row]) -> str:
    parts = ["<p>Geometric means over shapes, with the least of any shape.</p>"]
    header = ("operator", "direction", "x eager", "least", "x compile", "least", "% of limit", "shapes")
    found = table.overview(rows)
    for heading, means in found.items():
        lines = []
        for mean in means:
            figures = [mean.faster_than.get(name) for name in ("eager", "compile")]
            cells = [f"{value:.2f}" if figure else "" for figure in figures for value in (figure or (0, 0))[:2]]
            count = max((figure[2] for figure in figures if figure), default=0)
            lines.append((mean.operator, mean.direction, *cells, f"{mean.percent_of_limit:.0f}", str(count)))
        parts.append(_folded(heading, _table(header, lines, text=(0, 1)), is_open=len(parts) == 1))
    return "".join(parts) if found else ""


def _picture(name: str, picture: bytes) -> str:
    source = base64.b64encode(picture).decode()
    return f'<p>{_EXPLAINED[name]}</p><img alt="{_CAPTIONS[name]}" src="data:image/png;base64,{source}">'


def _cases(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in table.measured(rows):
        groups.setdefault(row["case"]["operator"], []).append(row)
    parts = ["<p>A click on the head of a column sorts by it.</p>"]
    for operator, group in groups.items():
        lines = [_case(row) for row in group]
        parts.append(_folded(f"{operator}: {len(group)} cases", _table(_CASE_HEADER, lines, text=(0, 1, 2))))
    return "".join(parts) if groups else ""


def _case(row: Row) -> list[str]:
    case, candidates = row["case"], row["candidates"]
    ours = candidates[row["ours"]]
    times = [candidates.get(name) for name in ("copy", "eager", "compile", row["ours"])]
    return [
        case["direction"],
        table.shape(case["shape"]),
        table.condition(case),
        *("" if time is None else f"{1e6 * time['seconds'][0]:.1f}" for time in times),
        *(f"{1e6 * seconds:.1f}" for seconds in ours["seconds"][1:]),
        f"{1e6 * ours['call'][0]:.1f}" if "call" in ours else "",
        *(f"{table.ratio(row, other):.2f}" if other in candidates else "" for other in ("eager", "compile")),
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['bytes'] / ours['seconds'][0] / 1e9:.1f}",
        f"{ours['percent_of_limit']:.0f}",
        f"{ours['peak_extra_bytes'] / 1e6:.2f}",
    ]


def _models(rows: Sequence[Row]) -> str:
    parts = []
    for title, group in table.models(rows).items():
        lines = []
        for row in group:
            milliseconds = [f"{1e3 * value:.2f}" for value in row["seconds"]] if "seconds" in row else [""] * 3
            lines.append([row["case"]["implementation"], *milliseconds, *table.model_cells(row)])
        parts.append(_folded(title, _table(_MODEL_HEADER, lines, text=(0, 7))))
    return "".join(parts)


def _environments(rows: Sequence[Row]) -> str:
    parts = []
    for run in (row for row in rows if row["kind"] == "environment"):
        named = {name: value for name, value in run.items() if name not in ("kind", "version", "backends") and value}
        named["commit"] = f"{run['commit']}{' with local changes' if run['dirty'] else ''}"
        named |= {f"backend {name}": reason for name, reason in run.get("backends", {}).items()}
        entries = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in named.items()
        )
        parts.append(f"<dl>{entries}</dl>")
    parts += [f"<p>Warning: {html.escape(row['text'])}</p>" for row in rows if row["kind"] == "warning"]
    return "".join(parts)


def _folded(title: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{html.escape(title)}</summary>{body}</details>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    def kind(column: int, cell: str = "") -> str:
        verdict = cell.split()[0] if cell in ("reached", "missed", "not measured") else ""
        return f' class="{" ".join(filter(None, ("text" * (column in text), verdict)))}"'

    head = "".join(f"<th{kind(column)}>{html.escape(cell)}</th>" for column, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind(column, cell)}>{html.escape(cell)}</td>" for column, cell in enumerate(line))
        + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")
