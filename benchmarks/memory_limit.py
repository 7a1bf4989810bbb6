"""A model that plain autograd cannot train in 4 GiB of memory trains in 1 GiB.

Every run is a separate process with a hard limit on its memory (``RLIMIT_DATA``: heap and anonymous mappings, which
hold all tensors, without the code of the libraries). Prints one line per run.

    python benchmarks/memory_limit.py              both runs
    python benchmarks/memory_limit.py invert 1.0   one policy under one limit in GiB
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

STEPS, LEVELS, HIDDEN, SIZE, BATCH = 72, 2, 128, 128, 8


def train(memory: str, limit: float) -> None:
    """Run two training steps and print their losses."""
    import torch

    from glow_kernels.models import Glow

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 2**30),) * 2)
    torch.manual_seed(0)
    options = {} if memory == "store" else {"memory": memory, "micro_batches": 4}
    model = Glow(3, SIZE, STEPS, LEVELS, HIDDEN, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    x = torch.rand(BATCH, 3, SIZE, SIZE) - 0.5
    model.initialize(x[:2])
    losses = []
    for _ in range(2):
        loss = model.bits_per_dim(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(f"{loss.item():.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"trained: {' then '.join(losses)} bits/dim, {peak:.2f} GiB resident at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", nargs="?", choices=("store", "checkpoint", "anchor", "invert"))
    parser.add_argument("limit", nargs="?", type=float, help="in GiB")
    arguments = parser.parse_args()
    if arguments.limit is not None:
        train(arguments.memory, arguments.limit)
        return
    if arguments.memory is not None:
        parser.error("a policy needs a limit in GiB")
    print(f"Glow, {STEPS} steps, {LEVELS} levels, {HIDDEN} hidden channels, {BATCH} images of {SIZE} x {SIZE}")
    for memory, limit in (("store", 4.0), ("anchor", 1.0)):
        run = subprocess.run([sys.executable, __file__, memory, str(limit)], capture_output=True, text=True)
        output = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
        print(f"{memory:8} within {limit} GiB: exit status {run.returncode}, {output[-1] if output else 'no output'}")


if __name__ == "__main__":
    main()
