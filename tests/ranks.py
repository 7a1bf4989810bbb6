"""Runs one function in two gloo processes on the CPU; as they start slowly, it runs all cases of a test file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
# Options of DistributedDataParallel.
DDP = {
    "default": {},
    "find-unused": {"find_unused_parameters": True},
    "static-graph": {"static_graph": True},
    "bucket-view": {"gradient_as_bucket_view": True},
}


def run(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)``, a function of a module, returns in each process; ``folder`` is for the way back."""
    mp.spawn(_process, (work, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _process(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    # By a file, since a port that is free now may be somebody's then.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
