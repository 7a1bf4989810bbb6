"""The machine and software of a measurement, and whether the machine is quiet enough to measure on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from glow_kernels import __version__
from glow_kernels.backends import PREFERENCE, backend_status

_SOURCE = Path(__file__).resolve().parents[2]


def record(device: torch.device) -> dict[str, Any]:
    """Everything that measured times depend on, as values for JSON."""
    # An installed package may be inside the repository of another project, whose commit does not count.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "glow_kernels") else None
    return {
        "kind": "environment",
        "run": uuid.uuid4().hex[:12],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "glow_kernels": __version__,
        "commit": commit,
        "dirty": None if commit is None else bool(git("status", "--porcelain", "--untracked-files=no")),
        "backends": {name: backend_status(name).reason for name in PREFERENCE if backend_status(name).available},
    }


def device_name(device: torch.device) -> str:
    """The manufacturer's name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def git(*arguments: str) -> str | None:
    """Output of git in the source tree; None if there is no git or no repository, or the command fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_SOURCE, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def warnings(device: torch.device) -> list[str]:
    """Reasons why times measured now may be wrong; empty on a quiet machine."""
    found = []
    cores = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5 * cores:
        found.append(f"the machine is busy: load average {load:.1f} on {cores} cores")
    times = [_spin() for _ in range(20)]
    if (variation := max(times) / statistics.median(times)) > 1.3:
        found.append(f"a fixed computation took up to {variation:.1f} times its median: another load, or clocks move")
    if device.type == "cuda" and (throttled := _throttled()):
        found.append(throttled)
    return found


def _spin() -> float:
    start = time.perf_counter()
    total = 0
    for number in range(50_000):
        total += number
    return time.perf_counter() - start


def _throttled() -> str | None:
    line = _nvidia_smi("clocks.sm,clocks.max.sm,utilization.gpu")
    if line is None:
        return None
    now, most, busy = (field.strip() for field in line.split(","))
    # A MIG instance reports "[N/A]".
    is_busy = busy.isdecimal() and int(busy) > 10
    return f"GPU at {now} of {most} MHz and {busy}% busy before the start" if is_busy else None


def _driver(device: torch.device) -> str | None:
    return _nvidia_smi("driver_version") if device.type == "cuda" else None


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
