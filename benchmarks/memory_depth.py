"""Activation memory against depth at the sizes of the published benchmark, counted with fake tensors.

256 x 256 images, batch 8, 256 hidden channels, 3 levels (InvertibleNetworks.jl, JOSS 9(99), 2024, figure 2). Writes
docs/memory/depth.json. A step is simulated operator by operator, so this needs no GPU and takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import glow_kernels as gk
from glow_kernels.bench.live_storages import training_step_bytes
from glow_kernels.models import Glow

ROOT = Path(__file__).parents[1]
POLICIES = {
    "store": {"memory": "store"},
    "checkpoint": {"memory": "checkpoint"},
    "anchor 4": {"memory": "anchor"},
    "invert": {"memory": "invert"},
    "anchor 4, 8 micro-batches": {"memory": "anchor", "micro_batches": 8},
    "anchor 6, 8 micro-batches": {"memory": "anchor", "anchor_every": 6, "micro_batches": 8},
    "anchor 4 offloaded, 8 micro-batches": {"memory": "anchor", "micro_batches": 8, "offload_anchors": True},
}
DEPTHS = {True: (4, 16, 48, 80), False: (6, 12)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for name, options in POLICIES.items():
        fast = "micro_batches" not in options
        for depth in DEPTHS[fast]:
            with gk.use_backend("reference"):
                kept, peak = training_step_bytes(
                    lambda k=depth, o=options: Glow(3, 256, k, 3, 256, **o), (8, 3, 256, 256)
                )
            rows.append({"policy": name, "steps": depth, "kept": kept, "peak": peak})
            print(f"{name:36} K={depth:3}  kept {kept / 1e9:6.3f} GB  peak {peak / 1e9:6.3f} GB", flush=True)
    (ROOT / "docs/memory/depth.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
