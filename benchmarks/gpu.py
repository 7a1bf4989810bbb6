"""``make gpu``: build, test and measure on a machine with an NVIDIA GPU, in stages that survive each other's failure.

Uses whatever torch and triton are installed, and downloads nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("actnorm_conv1x1", "actnorm_statistics", "affine_coupling", "gaussian_log_prob")
OPERATOR_TESTS = [f"tests/test_{name}.py" for name in MODULES]
OLDEST = {"torch": (2, 10), "triton": (3, 4)}


@dataclass(frozen=True)
class Stage:
    """A command with its own limit in seconds."""

    name: str
    command: list[str]
    limit: int


def stages(results: Path) -> list[Stage]:
    """All of them, under 8 minutes together."""
    python = sys.executable
    bench = [python, "-m", "benchmarks"]
    pytest = [python, "-m", "pytest", "-q", "-k"]
    plain = "and not opcheck and not compiles"
    found = [
        Stage("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 100),
        Stage("info", [python, "-m", "glow_kernels", "info"], 10),
        Stage("cuda tests", [*pytest, f"native {plain}", *OPERATOR_TESTS, "tests/test_cuda_gpu.py"], 50),
        Stage("triton tests", [*pytest, f"triton {plain}", *OPERATOR_TESTS, "tests/test_triton_gpu.py"], 60),
        Stage("operators", [*bench, "operators", "--quick", "--device", "cuda", "--output", str(results)], 90),
        Stage("models", [*bench, "models", "--quick", "--device", "cuda", "--output", str(results)], 60),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        small = [*pytest, f"native and of_every_shape {plain}", "-x", *OPERATOR_TESTS]
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *small]
            found.append(Stage(tool, command, 25))
    else:
        print("compute-sanitizer is not installed: its stages are left out", flush=True)
    return found


def why_not() -> str | None:
    """Why this machine cannot run it; None if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; install torch >= 2.10 with CUDA, or choose another with PYTHON=..."
    if problem := too_old("torch", torch.__version__):
        return problem
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is"
    if not torch.cuda.is_available():
        return "no usable NVIDIA GPU or driver; see 'nvidia-smi'"
    try:
        import triton
    except ImportError:
        return "triton is not installed; install triton >= 3.4"
    return too_old("triton", triton.__version__)


def too_old(package: str, version: str) -> str | None:
    """A message if ``version`` is below the oldest that works."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    oldest = OLDEST[package]
    return None if numbers >= oldest else f"{package} {version} is too old; {'.'.join(map(str, oldest))} is needed"


def run(stage: Stage) -> str:
    """``ok``, or what went wrong."""
    print(f"\n=== {stage.name} (at most {stage.limit} s)", flush=True)
    start = time.monotonic()
    environment = {**_environment(), "GLOW_KERNELS_BUILD": "auto", "GLOW_KERNELS_TEST_DEVICE": "cuda"}
    try:
        code = subprocess.run(stage.command, cwd=ROOT, timeout=stage.limit, env=environment).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {stage.limit} s"
    except OSError as error:
        return f"could not start: {error}"
    seconds = time.monotonic() - start
    return f"ok, {seconds:.0f} s" if code == 0 else f"failed with exit code {code}, {seconds:.0f} s"


def main() -> int:
    """Run every stage and say what became of each."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl")
    arguments = parser.parse_args()
    if problem := why_not():
        print(f"error: {problem}", file=sys.stderr)
        return 1
    # The CUDA library for this GPU alone, which takes less than a minute.
    os.environ.setdefault("GLOW_KERNELS_CUDA_ARCHS", _architecture())
    outcomes = [(stage.name, run(stage)) for stage in stages(arguments.output.resolve())]
    print()
    for name, outcome in outcomes:
        print(f"{name:12}{outcome}")
    print(f"results in {arguments.output}")
    return 0 if all(outcome.startswith("ok") for _, outcome in outcomes) else 1


def _architecture() -> str:
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main())
