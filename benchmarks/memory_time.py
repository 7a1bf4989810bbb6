"""Time of a training step of a Glow under every policy, and with torch.utils.checkpoint around every flow step.

Steps are interleaved on one thread, with Python's garbage collector off as in ``timeit``, and all models have the same
weights. Prints medians, then medians and minima relative to plain autograd.

    python benchmarks/memory_time.py               the sizes of SIZES
    python benchmarks/memory_time.py 8 2 64 32 16  steps, levels, width, image size, batch
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import glow_kernels as gk
from glow_kernels.models import Glow

SIZES = ((8, 2, 64, 32, 16), (4, 2, 256, 32, 8))
REPEATS = 15
POLICIES = {
    "store": {"memory": "store"},
    "checkpoint": {"memory": "checkpoint"},
    "anchor 4": {"memory": "anchor"},
    "anchor 4, offloaded": {"memory": "anchor", "offload_anchors": True},
    "invert": {"memory": "invert"},
    "anchor 4, 4 micro-batches": {"memory": "anchor", "micro_batches": 4},
    "torch.utils.checkpoint per step": {"memory": "store"},
}


def models(steps: int, levels: int, hidden: int, size: int, x: Tensor) -> dict[str, Glow]:
    torch.manual_seed(0)
    start = Glow(3, size, steps, levels, hidden)
    start.initialize(x)
    result = {}
    for name, options in POLICIES.items():
        result[name] = Glow(3, size, steps, levels, hidden, **options)
        result[name].load_state_dict(start.state_dict())
    for level in result["torch.utils.checkpoint per step"].levels:
        for step in level.steps:
            step.forward = functools.partial(checkpoint, step.forward, use_reentrant=False)
    return result


def seconds(model: Glow, x: Tensor) -> float:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    model.bits_per_dim(x).mean().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, help="steps, levels, width, image size and batch")
    arguments = parser.parse_args()
    if len(arguments.sizes) not in (0, 5):
        parser.error(f"there are five sizes, got {len(arguments.sizes)}")
    torch.set_num_threads(1)
    gk.tune_allocator()
    for sizes in [tuple(arguments.sizes)] if arguments.sizes else SIZES:
        *shape, batch = sizes
        x = torch.rand(batch, 3, shape[3], shape[3]) - 0.5
        contenders = models(*shape, x)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        gc.collect()
        gc.disable()
        for repeat in range(REPEATS + 2):
            for name, model in contenders.items():
                taken = seconds(model, x)
                if repeat >= 2:
                    times[name].append(taken)
        gc.enable()
        print("{} steps, {} levels, width {}, image size {}, batch {}".format(*sizes))
        for name, values in times.items():
            median, least = (f(values) / f(times["store"]) for f in (statistics.median, min))
            print(f"  {name:32} {1e3 * statistics.median(values):8.1f} ms  {median:5.2f}  {least:5.2f}", flush=True)


if __name__ == "__main__":
    main()
