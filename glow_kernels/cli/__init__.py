"""The command line ``glow-kernels``, also ``python -m glow_kernels``. Each subcommand is a module of this package."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn

import torch

from glow_kernels import __version__
from glow_kernels.allocator import tune_allocator
from glow_kernels.cli import bench, evaluate, info, interpolate, sample, train, tune
from glow_kernels.errors import GlowKernelsError, UsageError, one_line
from glow_kernels.training import distributed

COMMANDS = (train, evaluate, sample, interpolate, bench, info, tune)
LESS_MEMORY = {
    train: "use --memory anchor and --micro-batches, or a smaller --batch-size",
    evaluate: "use a smaller --batch-size",
    sample: "draw fewer images with -n",
    interpolate: "draw fewer images with --rows and --count",
    bench: "measure smaller tensors with --shape",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error, 2 for wrong usage.

    130 means interrupted, and 141 that the reader of the output closed the pipe.
    """
    # sys.stdout is None if the caller closed it, for example with >&-, and much code that writes to it then fails.
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(sys.stdout or nowhere),
        redirect_stderr(sys.stderr or nowhere),
    ):
        # Standard error does this by default: a path that the encoding cannot represent must not end a training.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "tune_allocator", True):
        tune_allocator()
    try:
        _refuse_ranks(arguments)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe. Redirected, since Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # a shell's exit code for SIGPIPE
    except (GlowKernelsError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except (MemoryError, RuntimeError) as error:
        if arguments.debug or not _is_out_of_memory(error):
            raise
        print(f"error: out of memory: {one_line(error)}; {arguments.less_memory}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see '{self.prog} --help'\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glow-kernels",
        description="Train, evaluate and sample Glow, a normalizing flow for images; measure its operators.",
    )
    parser.add_argument("--version", action="version", version=f"glow_kernels {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = command.add_parser(subparsers)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        less_memory = LESS_MEMORY.get(command, "end other programs")
        subparser.set_defaults(run=command.run, name=subparser.prog, less_memory=less_memory)
    return parser


def _refuse_ranks(arguments: argparse.Namespace) -> None:
    """Refuse several ranks except for train and evaluate: every rank would do all the work and write the same files."""
    if arguments.run in (train.run, evaluate.run) or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    with distributed.connected() as ranks:
        if ranks.size > 1:
            raise UsageError(f"{arguments.name} runs in one process: start it without torchrun")


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU PyTorch raises a plain RuntimeError. A rank wraps unexpected errors in a RuntimeError that names it.
    found = any(isinstance(one, (MemoryError, torch.OutOfMemoryError)) for one in (error, error.__cause__))
    return found or "can't allocate memory" in str(error)
