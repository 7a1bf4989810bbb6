"""``glow-kernels bench``: measure, compare, draw."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glow_kernels.cli import arguments as common

if TYPE_CHECKING:
    from glow_kernels.bench.suite import Selection


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="how fast the operators and models are here",
        description="Measure operators against eager PyTorch, torch.compile and a copy of the same bytes.",
    )
    # The allocator as it is can only be measured before it is tuned.
    parser.set_defaults(action=measure, tune_allocator=False)
    _add_options(parser)
    actions = parser.add_subparsers(title="parts", metavar="PART")
    part = actions.add_parser("operators", help="only the operators", argument_default=argparse.SUPPRESS)
    _add_options(part)
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
    add("--device", "auto", "cpu, cuda, cuda:1, ...; the default is a GPU if there is one")
    add("--output", None, "file of results (default: a file named after the device in benchmarks/results)", type=Path)


def measure(arguments: argparse.Namespace) -> None:
    """Run the benchmarks."""
    from glow_kernels.bench import environment, results, suite

    device = common.device(arguments)
    selection = _selection(arguments, device)
    writer = results.Writer(arguments.output or _default_output(device), environment.record(device))
    for warning in environment.warnings(device):
        print(f"WARNING: {warning}", flush=True)
    suite.run(selection, writer, _show)


def _selection(arguments: argparse.Namespace, device: torch.device) -> Selection:
    from glow_kernels.bench import operators, suite

    quick = arguments.quick
    return suite.Selection(
        operators=arguments.operator or tuple(operators.OPERATORS),
        directions=arguments.direction or operators.DIRECTIONS,
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
