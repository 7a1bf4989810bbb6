"""Trains 500 steps on digits with anchors and with plain autograd, and compares bits/dim at every validation.

Writes docs/memory/digits.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from glow_kernels.training import data, metrics, run_folder
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.trainer import Trainer

RESULTS = Path(__file__).parents[1] / "docs/memory"


def run(memory: str, folder: Path) -> list[float]:
    config = TrainingConfig.for_dataset("digits", iterations=500, validate_every=100, memory=memory)
    run_folder.prepare(folder, overwrite=False)
    if not Trainer(config, data.load("digits"), folder, show_progress=False).train():
        raise KeyboardInterrupt
    records = metrics.read(folder)
    return [record["validation_bits_per_dim"] for record in records if "validation_bits_per_dim" in record]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {memory: run(memory, Path(folder) / memory) for memory in ("store", "anchor")}
    for index, (plain, anchored) in enumerate(zip(*curves.values(), strict=True), start=1):
        print(f"step {100 * index}: store {plain:.4f}, anchor {anchored:.4f}, {anchored - plain:+.4f} bits/dim")
    (RESULTS / "digits.json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
