"""``glow-kernels bench``: measure, compare, draw."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glow_kernels.cli import arguments as common
from glow_kernels.errors import DataError, RegressionError, UsageError

if TYPE_CHECKING:
    from glow_kernels.bench.results import Row
    from glow_kernels.bench.suite import Selection

PARTS = ("operators", "overhead", "models")
QUICK_DIRECTIONS = ("forward", "inverse", "backward", "reversible_backward")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="how fast the operators and models are here",
        description="Measure operators against eager PyTorch, torch.compile and a copy of the same bytes.",
    )
    # The allocator as it is can only be measured before it is tuned.
    parser.set_defaults(action=measure, parts=PARTS, tune_allocator=False)
    _add_options(parser)
    actions = parser.add_subparsers(title="parts and other actions", metavar="ACTION")
    for name in PARTS:
        part = actions.add_parser(name, help=f"measure {name} only", argument_default=argparse.SUPPRESS)
        part.set_defaults(parts=(name,))
        _add_options(part)
    comparison = actions.add_parser("compare", help="what became slower between two files, or two git revisions")
    comparison.set_defaults(action=compare)
    comparison.add_argument("before", metavar="A", help="file of results, or git revision of results in --folder")
    comparison.add_argument("after", metavar="B", help="likewise")
    comparison.add_argument("--fail", action="store_true", help="exit with code 1 if there is a regression")
    _add_folder(comparison)
    report = actions.add_parser("report", help="a page and plots from a file of results")
    report.set_defaults(action=draw)
    report.add_argument("results", nargs="+", help="files of results, or git revisions of results in --folder")
    report.add_argument("--output", type=Path, default=Path("runs/report"), help="folder (default: runs/report)")
    _add_folder(report)
    document = actions.add_parser("document", help="write docs/performance.md from the results in a folder")
    document.set_defaults(action=write_document)
    document.add_argument("--output", type=Path, default=Path("docs/performance.md"), help="file (%(default)s)")
    _add_folder(document)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Do what was asked."""
    arguments.action(arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    unset = parser.argument_default  # a part's options leave what was given before it

    def add(name: str, default: object, text: str, **options: Any) -> None:
        parser.add_argument(name, default=unset or default, help=text, **options)

    add("--quick", False, "few shapes and directions, in under 3 minutes", action="store_true")
    add("--operator", None, "names, with commas between", type=_names)
    add("--direction", None, "names, with commas between", type=_names)
    add("--shape", None, "BxCxHxW, with commas between", type=_names)
    add("--dtype", ["float32"], "names, with commas between", type=_names)
    add("--memory-format", ["contiguous"], "contiguous, channels_last", type=_names)
    add("--threads", None, "numbers of threads, with commas between", type=_numbers)
    add(
        "--allocator",
        ["tuned"],
        "default, tuned: the C library's as it is or as tune_allocator() sets it",
        type=_names,
    )
    add("--backend", [], "ours to measure, with commas between; the first is compared", type=_names)
    add("--seconds", None, "time for every case", type=_seconds)
    add("--no-compile", False, "leave torch.compile out, which takes most of the time", action="store_true")
    add("--check", False, "then print the goals: reached or missed", action="store_true")
    add("--results", None, "with --check: measure nothing, look at this file", type=Path)
    add("--device", "auto", "cpu, cuda, cuda:1, ...; the default is a GPU if there is one")
    add("--output", None, "file of results (default: a file named after the device in benchmarks/results)", type=Path)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="of results (%(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    """Run the benchmarks, and check the goals if asked to."""
    from glow_kernels.bench import results

    if arguments.results is not None:
        if not arguments.check:
            raise UsageError("--results goes with --check")
        return _print_checks(results.read(arguments.results))
    rows = _measure(arguments)
    if arguments.check:
        _print_checks(rows)
    return None


def _measure(arguments: argparse.Namespace) -> list[Row]:
    from glow_kernels.bench import environment, models, overhead, results, suite

    device = common.device(arguments)
    selection = _selection(arguments, device)
    path = arguments.output or _default_output(device)
    writer = results.Writer(path, environment.record(device))
    for warning in environment.warnings(device):
        _show(f"WARNING: {warning}")
        writer.write({"kind": "warning", "text": warning})
    if "operators" in arguments.parts:
        suite.run(selection, writer, _show)
    if "overhead" in arguments.parts:
        overhead.run(device, selection.seconds, writer, _show)
    if "models" in arguments.parts:
        models.Models(device, writer, _show, quick=arguments.quick, with_compile=not arguments.no_compile).run()
    _show(f"\nresults in {path}")
    return writer.rows


def _print_checks(rows: list[Row]) -> None:
    from glow_kernels.bench import check

    _show("")
    for goal in check.checks(rows):
        _show(str(goal))


def compare(arguments: argparse.Namespace) -> None:
    """Print what changed; exit with code 1 for a regression if asked to."""
    from glow_kernels.bench import compare as comparison
    from glow_kernels.bench import results

    before, after = (results.select(name, arguments.folder) for name in (arguments.before, arguments.after))
    changes, wrong = comparison.changes(before, after), comparison.newly_wrong(before, after)
    if not changes and not wrong:
        raise DataError(f"{arguments.before} and {arguments.after} have no measured case in common")
    regressions = [change for change in changes if change.regression]
    for change in regressions:
        _show(f"slower  {change.factor:5.2f}x  {change.name}: {change.before:.2f} -> {change.after:.2f} times eager")
    for line in wrong:
        _show(f"wrong   {line}")
    _show(f"{len(changes)} cases compared, {len(regressions)} slower beyond the noise, {len(wrong)} newly wrong")
    if arguments.fail and (regressions or wrong):
        raise RegressionError(f"{len(regressions)} regressions and {len(wrong)} newly wrong cases")


def draw(arguments: argparse.Namespace) -> None:
    """Write the report."""
    from glow_kernels.bench import report, results

    rows = [row for name in arguments.results for row in results.select(name, arguments.folder)]
    for path in report.write(rows, arguments.output):
        _show(str(path))


def write_document(arguments: argparse.Namespace) -> None:
    """Write the page of performance."""
    from glow_kernels.bench import document

    text = document.markdown(sorted(arguments.folder.glob("*.jsonl")))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    _show(str(arguments.output))


def _selection(arguments: argparse.Namespace, device: torch.device) -> Selection:
    from glow_kernels.bench import operators, suite

    quick = arguments.quick
    return suite.Selection(
        operators=arguments.operator or tuple(operators.OPERATORS),
        directions=arguments.direction or (QUICK_DIRECTIONS if quick else operators.DIRECTIONS),
        shapes=[operators.parse_shape(text) for text in arguments.shape or ()]
        or (operators.QUICK_SHAPES if quick else operators.STANDARD_SHAPES),
        dtypes=arguments.dtype,
        memory_formats=arguments.memory_format,
        threads=arguments.threads or [torch.get_num_threads()],
        allocators=arguments.allocator,
        backends=arguments.backend,
        device=str(device),
        seconds=arguments.seconds or (0.3 if quick else 0.5),
        with_compile=not arguments.no_compile,
    )


def _default_output(device: torch.device) -> Path:
    from glow_kernels.bench import environment, results

    name = "".join(letter if letter.isalnum() else "-" for letter in environment.device_name(device).lower())
    return results.FOLDER / f"{name}.jsonl"


def _show(line: str) -> None:
    print(line, flush=True)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [common.positive(part) for part in _names(text)]


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 3600.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 3600, got {text!r}")
    return number
