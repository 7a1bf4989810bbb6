"""``make gpu``: build, test and measure on a machine with an NVIDIA GPU, in stages that survive each other's failure.

Uses the installed torch and triton, and downloads nothing. All results, and the outcome of every stage, are appended
to one file as soon as they are known. ``--dry-run`` runs the stages that a CPU can run, at toy sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
OLDEST = {"torch": (2, 10), "triton": (3, 4)}
# The reference has a file for every operator, named after it.
MODULES = sorted(path.stem for path in (ROOT / "glow_kernels/backends/reference").glob("[!_]*.py"))
OPERATOR_TESTS = [f"tests/test_{name}.py" for name in MODULES]
# Tests of CUDA graphs of whole steps, anchors in host memory and accelerated existing code.
MODEL_TESTS = (
    "tests/test_graphs.py",
    "tests/test_reversible_graphs.py",
    "tests/test_reversible.py::test_offloaded_anchors_leave_the_gpu",
    "tests/test_interop_gpu.py",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
CUDA = "/usr/local/cuda/bin"
BANDWIDTH_SHAPES = "64x12x128x128,32x48x64x64"
# Shapes of the first and last level of the trained model, so small that launch overhead dominates.
LAUNCH_SHAPES = "64x12x16x16,64x48x4x4"


@dataclass(frozen=True)
class Stage:
    """A command with its own limit in seconds; if ``skip`` is not empty, the reason why it is left out.

    Consecutive stages with ``parallel``, which measure no times, run in parallel.
    """

    name: str
    command: list[str]
    limit: int
    skip: str = ""
    parallel: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def stages(results: Path, dry_run: bool = False) -> list[Stage]:
    """All stages, under 8 minutes together; the most important first, since the device may be taken away."""
    python = [sys.executable, "-m"]
    output = ["--output", str(results)]
    device = ["--device", "cpu" if dry_run else "cuda"]
    bench = [*python, "benchmarks", "operators", *device, *output]
    small = ["--shape", "2x4x2x2", "--direction", "no_grad", "--dtype", "float32", "--seconds", "0.01", "--no-compile"]
    small += ["--threads", "1", "--allocator", "tuned"]
    measure = [*python, "benchmarks.gpu_stages"]
    options = [*device, *output, *(["--toy"] if dry_run else [])]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "10"]
    tests = [*pytest, *_workers(), "-k"]
    plain = "and not opcheck and not compiles"
    cuda_tests = [*tests, f"native {plain}", *OPERATOR_TESTS, "tests/test_cuda_gpu.py"]
    triton_tests = [*tests, f"triton {plain}", *OPERATOR_TESTS, "tests/test_triton_gpu.py"]
    # These tests choose themselves what to put on the GPU.
    model_tests = [*pytest, *_workers(4), *MODEL_TESTS]
    # Only the shape with 13 channels and the cases with kernels of their own: all tests take ten minutes under a tool.
    selected = "(of_every_shape and 13 or every_number_of_channels and 48 or many_steps and 70)"
    sanitized = [*pytest, "-k", f"native and {selected} {plain}", "-x", *OPERATOR_TESTS]
    bandwidth = ["--shape", BANDWIDTH_SHAPES, "--dtype", "float32", "--minutes", "0.85"]
    bandwidth += ["--direction", "forward,inverse,backward,reversible_backward"]
    no_gpu = "it needs a GPU" if dry_run else ""
    launches = ["--shape", LAUNCH_SHAPES, "--dtype", "float32", "--direction", "forward,backward"]
    launches += ["--no-compile", "--minutes", "0.2"]
    untested = no_gpu or _missing("pytest", "hypothesis")
    no_library = _no_cuda_library()
    checks = 120
    build = {"GLOW_KERNELS_BUILD": "none" if dry_run else "auto"}
    if not dry_run:  # the CUDA library for this GPU alone, which takes about a minute
        build["GLOW_KERNELS_CUDA_ARCHS"] = os.environ.get("GLOW_KERNELS_CUDA_ARCHS") or _architecture()
    return [
        Stage("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], 70, environment=build),
        Stage("info", [*python, "glow_kernels", "info"], 8),
        Stage("cuda tests", cuda_tests, checks, untested or no_library, parallel=True),
        Stage("triton tests", triton_tests, checks, untested, parallel=True),
        Stage(
            "model tests",
            model_tests,
            checks,
            untested,
            parallel=True,
            environment={"GLOW_KERNELS_TEST_DEVICE": "cpu"},
        ),
        *(
            # Without the caching allocator, whose free blocks the tools would take for memory in use.
            Stage(
                tool,
                _sanitizer(tool, sanitized),
                checks,
                untested or no_library or _no_sanitizer(),
                parallel=True,
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in SANITIZERS
        ),
        Stage("compile", [*measure, "compile", *options], checks, parallel=True),
        Stage("training", [*measure, "training", *options], 108),
        Stage("bandwidth", [*bench, *(small if dry_run else bandwidth)], 48),
        Stage("kernels", [*bench, *(small if dry_run else launches)], 20),
        Stage("drop-in", [*measure, "drop_in", *options], 22),
        Stage("memory", [*measure, "memory", *options], 46),
        Stage("sampling", [*measure, "sampling", *options], 14),
        Stage("backends", [*python, "glow_kernels", "tune", "backends"], 24, no_gpu or no_library),
    ]


def grouped(stages: list[Stage]) -> list[list[Stage]]:
    """The stages in groups that run in parallel, in the same order."""
    groups = itertools.groupby(enumerate(stages), lambda place: -1 if place[1].parallel else place[0])
    return [[stage for _, stage in group] for _, group in groups]


def unsupported_reason() -> str | None:
    """The reason why this machine cannot run the stages; None if it can."""
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
    """A message if ``version`` is older than the oldest that works, otherwise None."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    oldest = OLDEST[package]
    return None if numbers >= oldest else f"{package} {version} is too old; {'.'.join(map(str, oldest))} is needed"


def run(stages: list[Stage]) -> dict[str, str]:
    """Run stages in parallel, and return their outcomes by name: ``ok``, ``skipped`` or what went wrong.

    If there are several, the output of each is printed when it ends.
    """
    outcomes = {stage.name: f"skipped: {stage.skip}" for stage in stages if stage.skip}
    running: dict[str, tuple[Stage, subprocess.Popen[bytes], IO[str] | None]] = {}
    start = time.monotonic()
    with contextlib.ExitStack() as ends:
        for stage in stages:
            if stage.skip:
                continue
            print(f"\n=== {stage.name} (at most {stage.limit} s)", flush=True)
            said = None
            if len(stages) > 1:
                said = ends.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            try:
                process = _start(stage, said)
            except OSError as error:
                outcomes[stage.name] = f"could not start: {error}"
                continue
            ends.callback(_kill, process)
            running[stage.name] = stage, process, said
        while running:
            time.sleep(0.02)
            for name, (stage, process, said) in list(running.items()):
                seconds, code = time.monotonic() - start, process.poll()
                if code is None and seconds < stage.limit:
                    continue
                _kill(process)
                del running[name]
                outcomes[name] = (
                    f"ok, {seconds:.0f} s" if code == 0 else f"failed with exit code {code}, {seconds:.0f} s"
                )
                if code is None:
                    outcomes[name] = f"stopped after {stage.limit} s"
                if said is not None:
                    said.seek(0)
                    print(f"\n=== {name}: {outcomes[name]}\n{said.read()}", flush=True)
    return outcomes


def _start(stage: Stage, output: IO[str] | None) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "GLOW_KERNELS_TEST_DEVICE": "cuda", **stage.environment}
    # In a process group of its own, so that compilers and workers that it starts can be killed with it.
    return subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run every stage and print the outcomes; returns 0 if none failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl", help="file")
    parser.add_argument("--only", default="", help="names of stages, with commas between")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes: does every stage run?")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and (problem := unsupported_reason()):
        print(f"error: {problem}", file=sys.stderr)
        return 1
    output = arguments.output.resolve()
    found = stages(output, arguments.dry_run)
    wanted = set(filter(None, arguments.only.split(","))) or {stage.name for stage in found}
    if unknown := wanted - {stage.name for stage in found}:
        names = ", ".join(stage.name for stage in found)
        print(f"error: stages are {names}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    from glow_kernels.bench import results  # only here, since it needs torch
    from glow_kernels.errors import DataError

    outcomes: dict[str, str] = {}
    try:
        results.prepare(output)
        for group in grouped([stage for stage in found if stage.name in wanted]):
            outcomes.update(run(group))
            results.prepare(output)  # a stage that was stopped may have left half a line
            for stage in group:
                case, outcome = {"stage": stage.name}, outcomes[stage.name]
                results.append(output, {"kind": "stage", "case": case, "outcome": outcome, "run": "gpu"})
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print()
    for name, outcome in outcomes.items():
        print(f"{name:12}{outcome}")
    print(f"results in {output}")
    return 0 if all(outcome.startswith(("ok", "skipped")) for outcome in outcomes.values()) else 1


def _workers(most: int = 16) -> list[str]:
    """Options that run tests in parallel if pytest-xdist is installed; most of their time is spent on the host."""
    return [] if _missing("xdist") else ["-n", str(min(most, os.cpu_count() or 1))]


def _missing(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def _no_cuda_library() -> str:
    has = (ROOT / "glow_kernels" / "_C_cuda.so").exists() or shutil.which("nvcc", path=f"{os.environ['PATH']}:{CUDA}")
    return "" if has else "there is no CUDA library and no nvcc to build it with"


def _architecture() -> str:
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


def _no_sanitizer() -> str:
    return "" if _sanitizer_path() else "compute-sanitizer is not installed"


def _sanitizer(tool: str, tests: list[str]) -> list[str]:
    return [_sanitizer_path(), "--tool", tool, "--error-exitcode", "1", *tests]


def _sanitizer_path() -> str:
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA}") or ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
