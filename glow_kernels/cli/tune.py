"""``glow-kernels tune``: measure the launch parameters of the Triton kernels on this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from glow_kernels.tuning import tune


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure launch parameters of the Triton kernels on this GPU",
        description="Measure the launch parameters of the Triton kernels on this GPU and write the table that the "
        "package reads from then on, a few minutes. Without one, rules that hold everywhere are used.",
    )
    parser.add_argument("--output", type=Path, help="folder to write to (default: the package's own)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measure, write and print the table."""
    path, table = tune(arguments.output)
    for family, parameters in table.items():
        print(f"{family:<20}" + "  ".join(f"{name} {value}" for name, value in parameters.items()))
    print(path)
