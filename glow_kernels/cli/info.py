"""``glow-kernels info``: versions, devices and backends, and how to install what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from glow_kernels import __version__
from glow_kernels.backends import PREFERENCE, BackendStatus, available_backends, backend_status, choice, select
from glow_kernels.backends.native import cuda

OPTIONAL = ("numpy", "pillow", "safetensors", "scikit-learn", "tqdm", "matplotlib", "tensorboard")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info",
        help="versions, devices, backends, and what is missing",
        description="What is installed and what computes here; for what is missing, the command that fixes it.",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the report, then raise an error if GLOW_KERNELS_BACKEND names a backend that cannot be used."""
    threads = torch.get_num_threads()
    print(f"glow_kernels  {__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch         {torch.__version__}, {threads} thread{'s' * (threads != 1)}")
    print(f"triton        {_version('triton') or 'not installed'}")
    for line in _devices():
        print(f"device        {line}")
    print("\nbackends, in order of preference")
    for name in PREFERENCE:
        mark = " (chosen)" if name == choice() else ""
        if choice() is None and name == available_backends()[0]:
            mark = " (default)"
        _print_backend(name, backend_status(name), mark)
        if name == "native":
            _print_backend("  on CUDA", cuda.status())
    print("\npackages for the command line")
    missing = [package for package in OPTIONAL if _version(package) is None]
    for package in OPTIONAL:
        print(f"  {package:<14}{_version(package) or 'missing'}")
    if missing:
        print("\ninstall what is missing with: pip install 'glow_kernels[train]'")
    select()


def _print_backend(name: str, status: BackendStatus, mark: str = "") -> None:
    available = f"available{mark}" if status.available else "not available"
    remedy = f"; {status.remedy}" if status.remedy else ""
    print(f"  {name:<12}{available:<22}{status.reason}{remedy}")


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
        return ["cpu", f"no GPU: {why}"]
    return ["cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
