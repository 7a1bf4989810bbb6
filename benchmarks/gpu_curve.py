"""``make gpu-curve``: bits/dim of a training run against steps and seconds, plain reference and full stack.

Both runs train the first model that ``make gpu`` trains, on 32 x 32 patches of photographs with the same seed and
settings, one after the other, each for five minutes or the given time. Their bits/dim go to one file of results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from glow_kernels.bench import environment, results
from glow_kernels.errors import GlowKernelsError, TrainingError
from glow_kernels.training import metrics

# More iterations than the time allows: both runs are stopped by time.
SETTINGS = [
    *("--dataset", "patches", "--image-size", "32", "--flow-steps", "32", "--levels", "3", "--hidden-channels", "512"),
    *("--batch-size", "64", "--seed", "0", "--schedule", "constant", "--iterations", "1000000"),
    *("--validate-every", "500"),
]
# By name: the backend, empty for the default one, and options of the training.
RUNS: dict[str, tuple[str, list[str]]] = {
    "reference": ("reference", []),
    "full stack": ("", ["--precision", "bfloat16", "--cuda-graph"]),
}


def train(folder: Path, backend: str, options: list[str], seconds: float) -> None:
    """Train for ``seconds``, then kill the training: only the metrics in the folder are needed.

    Raises:
        TrainingError: training failed before.
    """
    command = [sys.executable, "-m", "glow_kernels", "train", "--quiet", "--run", str(folder), *options]
    environment_ = {**os.environ, **({"GLOW_KERNELS_BACKEND": backend} if backend else {})}
    process = subprocess.Popen(command, env=environment_)
    try:
        if code := process.wait(seconds):
            raise TrainingError(f"training ended with exit code {code}")
    except subprocess.TimeoutExpired:
        return
    finally:
        process.kill()
        process.wait()


def row(name: str, folder: Path) -> results.Row:
    """The run's bits/dim as a row: points of step, seconds since the start and bits/dim, None if it was not finite."""

    def points(key: str) -> list[list[float | None]]:
        return [[record["step"], record["time"], record[key]] for record in metrics.read(folder) if key in record]

    return {
        "kind": "curve",
        "case": {"part": "curve", "implementation": name},
        "train": points("train_bits_per_dim"),
        "validation": points("validation_bits_per_dim"),
    }


def main(argv: list[str] | None = None) -> int:
    """Train both and write their curves."""
    parser = argparse.ArgumentParser(prog="make gpu-curve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.jsonl"), help="file of results")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each training")
    parser.add_argument("--only", choices=list(RUNS), help="one of the two")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("options", nargs="*", help="more options of the training, after --")
    arguments = parser.parse_args(argv)
    import torch  # only here, so that --help is fast

    try:
        writer = results.Writer(arguments.output, environment.record(torch.zeros(0, device=arguments.device).device))
        for name in [arguments.only] if arguments.only else RUNS:
            backend, options = RUNS[name]
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                own = [*SETTINGS, "--device", arguments.device, *options, *arguments.options]
                try:
                    train(run, backend, own, arguments.seconds)
                finally:
                    found = row(name, run)
                    writer.write(found)
                    print(f"{name}: {len(found['train'])} records, {len(found['validation'])} validations")
    except GlowKernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
