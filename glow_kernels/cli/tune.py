"""``glow-kernels tune``: tune the launch parameters of the Triton kernels on this GPU, then compare with CUDA C++."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from glow_kernels.backends.native import cuda
from glow_kernels.tuning import compare, tune


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure launch parameters of the Triton kernels on this GPU, and CUDA C++ against Triton",
        description="Measure the launch parameters of the Triton kernels on this GPU, then whether they or CUDA C++ "
        "are faster, and write the tables that the package uses from then on; this takes a few minutes. Without these "
        "tables general rules choose the parameters, and CUDA C++ is preferred.",
    )
    parser.add_argument("what", nargs="?", choices=("launches", "backends"), help="only one of the two")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the package's own)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measure, write and print the tables."""
    if arguments.what != "backends":
        _tune_launches(arguments.output)
    if arguments.what is None and not (status := cuda.status()).available:
        print(f"CUDA C++ was not measured: {status.reason}; {status.remedy}")
    elif arguments.what != "launches":
        _compare_backends(arguments.output)


def _tune_launches(output: Path | None) -> None:
    path, table = tune(output)
    for family, parameters in table.items():
        print(f"{family:<20}" + "  ".join(f"{name} {value}" for name, value in parameters.items()))
    print(path)


def _compare_backends(output: Path | None) -> None:
    # In a separate folder, since the files of both tables are named after the GPU.
    path, choice = compare(output and output / "faster")
    for operator, pairs in choice.items():
        print(f"{operator:<44}" + "  ".join(f"{name} to {limit}" for limit, name in pairs))
    print(path)
