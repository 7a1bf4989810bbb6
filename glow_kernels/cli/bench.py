"""``glow-kernels bench``: measure, compare, draw."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glow_kernels.cli import arguments as common
from glow_kernels.errors import DataError, RegressionError, UsageError

if TYPE_CHECKING:
    from glow_kernels.bench.plan import Task
    from glow_kernels.bench.results import Row, Writer
    from glow_kernels.bench.suite import Selection

PARTS = ("operators", "overhead", "models", "reversible")
QUICK_DIRECTIONS = ("forward", "inverse", "backward", "reversible_backward")
# Planned seconds of a run; below the goals of 3 and 20 minutes, since large cases and noise take more than planned.
QUICK_LIMIT, FULL_LIMIT = 140.0, 950.0
# For each small case with several threads, whose times vary more than those of one thread.
MULTITHREADED_SECONDS = 1.0
PAGE, DOCUMENT = Path("runs/report"), Path("docs/performance.md")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure how fast the operators and models are here",
        description="Measure operators against eager PyTorch, torch.compile and a copy of the same bytes, and models "
        "against each other.",
    )
    # Tuning cannot be undone, and the default allocator is measured too.
    parser.set_defaults(action=measure, parts=PARTS, tune_allocator=False)
    _add_options(parser)
    actions = parser.add_subparsers(title="parts and other actions", metavar="ACTION")
    for name in PARTS:
        part = actions.add_parser(name, help=f"measure {name} only", argument_default=argparse.SUPPRESS)
        part.set_defaults(parts=(name,))
        _add_options(part)
    comparison = actions.add_parser("compare", help="what became slower between two files, or two git revisions")
    comparison.set_defaults(action=compare)
    comparison.add_argument(
        "before", metavar="A", help="file of results, or git revision: what was committed in --folder then"
    )
    comparison.add_argument("after", metavar="B", help="what to compare it with, likewise")
    comparison.add_argument("--fail", action="store_true", help="exit with code 1 if there is a regression")
    _add_folder(comparison)
    report = actions.add_parser("report", help="a page and plots from files of results, for every device")
    report.set_defaults(action=draw)
    report.add_argument("results", nargs="*", help="files of results, or git revisions; by default all in --folder")
    report.add_argument("--markdown", action="store_true", help=f"write {DOCUMENT} from the files in --folder instead")
    report.add_argument("--output", type=Path, help=f"folder, or with --markdown file (default: {PAGE}, {DOCUMENT})")
    _add_folder(report)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the chosen action."""
    arguments.action(arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    unset = parser.argument_default  # SUPPRESS for a part, whose defaults must not override options given before it

    def add(name: str, default: object, text: str, **options: Any) -> None:
        parser.add_argument(name, default=unset or default, help=text, **options)

    add("--quick", False, "few shapes and directions, in under 3 minutes instead of 20", action="store_true")
    add("--minutes", None, "time for the whole run, divided among its measurements", type=_positive)
    add("--operator", None, "names, comma-separated; an unknown one lists them all", type=_names)
    add("--direction", None, "names, comma-separated; an unknown one lists them all", type=_names)
    add("--shape", None, "BxCxHxW, comma-separated", type=_names)
    add("--dtype", None, "names, comma-separated; an unknown one lists them all", type=_names)
    add("--memory-format", None, "contiguous, channels_last or both, comma-separated", type=_names)
    add("--threads", None, "numbers of threads, comma-separated", type=_numbers)
    add("--allocator", None, "default, tuned or both: the C library's own, or set by tune_allocator()", type=_names)
    add("--backend", [], "our backends to measure, comma-separated; the first is compared with eager", type=_names)
    add("--seconds", None, "seconds for every case of an operator", type=_positive)
    add("--no-compile", False, "skip torch.compile, which takes most of the time", action="store_true")
    add("--check", False, "afterwards print which goals are reached", action="store_true")
    add("--results", None, "with --check: check this file instead of measuring", type=Path)
    add("--device", "auto", "cpu, cuda, cuda:1, ...; the default is a GPU if there is one")
    add("--output", None, "file of results (default: a file named after the device in benchmarks/results)", type=Path)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    default = Path("benchmarks/results")
    parser.add_argument("--folder", type=Path, default=default, help="folder of results (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> None:
    """Run the benchmarks; with ``--check``, also print which goals are reached."""
    from glow_kernels.bench import results

    if arguments.results is not None:
        if not arguments.check:
            raise UsageError("--results needs --check")
        with _warnings_as_lines():
            rows = results.read(arguments.results)
        return _print_checks(rows)
    rows = _measure(arguments)
    if arguments.check:
        _print_checks(rows)
    return None


def _measure(arguments: argparse.Namespace) -> list[Row]:
    from glow_kernels.bench import environment, plan, results, suite, table

    device = common.device(arguments)
    # Wrong choices are refused before anything is written.
    cores, most = os.cpu_count() or 1, max(arguments.threads or [1])
    if most > cores:
        raise UsageError(f"threads must be at most {cores}, the cores of this machine, got {most}")
    selections = _selections(arguments, device)
    suite.require(arguments.backend)
    if "operators" in arguments.parts and not any(case for selection in selections for case in selection.cases()):
        raise UsageError(
            "nothing to measure: none of these operators has such a direction and a backend for it on this device"
        )
    path = arguments.output or _default_output(device)
    writer = results.Writer(path, environment.record(device))
    for warning in environment.warnings(device):
        _show(f"WARNING: {warning}")
        writer.write({"kind": "warning", "text": warning})
    limit = 60.0 * arguments.minutes if arguments.minutes else QUICK_LIMIT if arguments.quick else FULL_LIMIT
    try:
        # A limit in minutes is strict on a GPU, which may be rented; on a CPU every case is measured at least briefly.
        strict = device.type == "cuda" and arguments.minutes is not None
        plan.run(_tasks(arguments, selections, device, writer), limit, _show, strict=strict)
    except KeyboardInterrupt:
        _show(f"the results so far are in {path}")
        raise
    writer.finish()
    for line in table.summary(writer.rows):
        _show(line)
    _show(f"\nresults in {path}")
    return writer.rows


def _tasks(
    arguments: argparse.Namespace, selections: list[Selection], device: torch.device, writer: Writer
) -> list[Task]:
    from glow_kernels.bench import models, overhead, reversible, suite

    quick, with_compile = arguments.quick, not arguments.no_compile
    tasks: list[Task] = []
    for part in arguments.parts:
        if part == "operators":
            measured = suite.Suite(writer, _show, with_compile=with_compile, backends=arguments.backend)
            tasks += measured.tasks(selections)
        elif part == "overhead":
            tasks += overhead.tasks(device, writer, _show)
        elif part == "models":
            tasks += models.Models(device, writer, _show, with_compile=with_compile).tasks(quick=quick)
        else:
            tasks += reversible.Reversible(device, writer, _show).tasks(quick=quick)
    return tasks


def _selections(arguments: argparse.Namespace, device: torch.device) -> list[Selection]:
    """The requested cases; in a full run also a few with other dtypes, memory formats and allocators."""
    from glow_kernels.bench import operators, suite

    full_on_cpu = device.type == "cpu" and not arguments.quick
    usual = suite.Selection(
        operators=arguments.operator or tuple(operators.OPERATORS),
        directions=arguments.direction or (QUICK_DIRECTIONS if arguments.quick else operators.DIRECTIONS),
        shapes=[operators.parse_shape(text) for text in arguments.shape or ()]
        or (operators.QUICK_SHAPES if arguments.quick else operators.STANDARD_SHAPES),
        dtypes=arguments.dtype or ["float32"],
        memory_formats=arguments.memory_format or ["contiguous"],
        threads=arguments.threads or [1 if full_on_cpu else torch.get_num_threads()],
        allocators=arguments.allocator or ["tuned"],
        device=str(device),
        seconds=arguments.seconds or (0.8 if arguments.quick else 0.6),
    )
    if arguments.quick or arguments.dtype or arguments.memory_format:
        return [usual]
    few = dataclasses.replace(
        usual,
        directions=arguments.direction or QUICK_DIRECTIONS,
        shapes=usual.shapes if arguments.shape else operators.QUICK_SHAPES[1:2],
        threads=usual.threads[:1],
        allocators=["tuned"],
    )
    others = [dataclasses.replace(few, dtypes=[dtype]) for dtype in ("bfloat16", "float64")]
    others.append(dataclasses.replace(few, memory_formats=["channels_last"]))
    if not full_on_cpu:
        return [usual, *others]
    main = [usual]
    if not arguments.direction:
        # Without an autograd graph the same kernels run, so few shapes suffice, except for operators with only no_grad.
        main = [dataclasses.replace(usual, directions=[name for name in usual.directions if name != "no_grad"])]
        alone = [name for name in usual.operators if set(operators.OPERATORS[name].traffic) == {"no_grad"}]
        main.append(dataclasses.replace(usual, directions=["no_grad"], operators=alone))
        others.append(
            dataclasses.replace(
                usual, directions=["no_grad"], shapes=usual.shapes if arguments.shape else operators.QUICK_SHAPES
            )
        )
    if not arguments.threads and (os.cpu_count() or 1) > 1:
        main += [_with_two_threads(arguments, selection) for selection in main]
    if not arguments.allocator:
        # Newly mapped memory costs most for the largest tensors.
        largest = usual.shapes if arguments.shape else operators.BANDWIDTH_SHAPES[:1]
        there_and_back = arguments.direction or ("forward", "inverse")
        others.append(dataclasses.replace(few, directions=there_and_back, shapes=largest, allocators=["default"]))
    return [*main, *others]


def _with_two_threads(arguments: argparse.Namespace, selection: Selection) -> Selection:
    """``selection`` for two threads, without the operator that has no goals and the sum of forward and backward."""
    return dataclasses.replace(
        selection,
        threads=[2],
        operators=[name for name in selection.operators if arguments.operator or name != "folded_conv1x1"],
        directions=arguments.direction or [name for name in selection.directions if name != "forward_backward"],
        seconds=arguments.seconds or MULTITHREADED_SECONDS,
    )


def _print_checks(rows: list[Row]) -> None:
    from glow_kernels.bench import check

    for line in check.lines(check.checks(rows)):
        _show(line)


def compare(arguments: argparse.Namespace) -> None:
    """Print what changed; with ``--fail``, exit with code 1 if there is a regression."""
    from glow_kernels.bench import compare as comparison
    from glow_kernels.bench import results

    with _warnings_as_lines():
        before, after = (results.select(name, arguments.folder) for name in (arguments.before, arguments.after))
    changes, wrong = comparison.by_device(before, after)
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
    """Write the page with its plots, or with ``--markdown`` the page of the documentation."""
    from glow_kernels.bench import document, page, results

    files = sorted(arguments.folder.glob("*.jsonl"))
    if not files and not arguments.results:
        raise DataError(f"there are no results in {arguments.folder}; run 'glow-kernels bench' first")
    if arguments.markdown:
        if arguments.results:
            raise UsageError("--markdown takes the files of --folder only: leave out the names of files")
        path = arguments.output or DOCUMENT
        with _warnings_as_lines():
            document.write(files, path)
        return _show(str(path))
    names = arguments.results or [str(path) for path in files]
    with _warnings_as_lines():
        rows = [row for name in names for row in results.select(name, arguments.folder)]
    folder, devices = arguments.output or PAGE, results.by_device(rows)
    for device, measured in devices.items():
        for path in page.write(measured, folder if len(devices) == 1 else folder / _file_name(device)):
            _show(str(path))
    return None


def _default_output(device: torch.device) -> Path:
    from glow_kernels.bench import environment, results

    return results.FOLDER / f"{_file_name(environment.device_name(device))}.jsonl"


def _file_name(device_name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in device_name.lower())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print warnings raised inside as one line each, without the source file and line that Python adds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    # One file may be read more than once.
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {text}", file=sys.stderr)


def _show(line: str) -> None:
    try:
        from tqdm import tqdm
    except ImportError:
        print(line, flush=True)
    else:
        tqdm.write(line)  # above the progress bar


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [common.positive(part) for part in _names(text)]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 3600.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 3600, got {text!r}")
    return number
