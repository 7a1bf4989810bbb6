"""Errors of inverted states, and their effect on gradients: by depth, and for poisoned batches.

``depth``: relative error of inverting K steps with random weights after data-dependent initialisation. Writes
docs/memory/drift.json.
``poison K [UPDATES]``: relative error of the gradients, compared with plain autograd, of a Glow with K steps, trained
on photographs for 300 updates, for clean images, noise, saturated pixels, random black and white, and one bad row in
one of eight images. With 300 updates it writes docs/memory/poisonK.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from glow_kernels import ReversibleSequential
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep
from glow_kernels.training import data

UPDATES = 300
RESULTS = Path(__file__).parents[1] / "docs/memory"
POLICIES = {
    "checkpoint": {"memory": "checkpoint"},
    "anchor 2": {"memory": "anchor", "anchor_every": 2},
    "anchor 4": {"memory": "anchor"},
    "anchor 4, replay": {"memory": "anchor", "check": "replay"},
    "anchor 8": {"memory": "anchor", "anchor_every": 8},
    "invert": {"memory": "invert"},
}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def depth() -> None:
    rows = []
    for coupling, low_precision in (("affine", False), ("additive", False), ("affine", True)):
        for count in (4, 8, 16, 32, 64, 128):
            torch.manual_seed(0)
            steps = [FlowStep(12, 64, coupling=coupling) for _ in range(count)]
            for step in steps:
                step.coupling.network.last.weight.normal_(0.0, 0.01)
            chain = ReversibleSequential(steps, "store")
            x = torch.randn(8, 12, 16, 16)
            with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                error = relative(chain.inverse(chain(x)[0])[0], x)
            rows.append({"coupling": coupling, "bfloat16": low_precision, "steps": count, "error": error})
            print(rows[-1], flush=True)
    (RESULTS / "drift.json").write_text(json.dumps(rows, indent=1) + "\n")


def poison(count: int, updates: int) -> None:
    hidden = 1024 // count
    torch.manual_seed(0)
    photographs = data.load("patches", image_size=8)
    model = Glow(3, 8, count, 1, hidden)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model.initialize(model.dequantize(photographs.train[:64]))
    started = time.perf_counter()
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        x = model.dequantize(photographs.train[torch.randint(len(photographs.train), (16,))])
        loss = model.bits_per_dim(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained in {time.perf_counter() - started:.0f} s to {loss.item():.2f} bits/dim", flush=True)
    clean = model.dequantize(photographs.train[:8])
    bad = clean.clone()
    bad[0, :, 4] = 4.0 * torch.rand(3, 8) - 2.0
    batches = {
        "clean": clean,
        "noise": torch.rand_like(clean) - 0.5,
        "saturated": (20.0 * clean).clamp(-0.5, 0.5),
        "random black and white": torch.randn_like(clean).sign() * 0.5,
        "one bad row": bad,
    }

    def gradient(x: Tensor, **options: object) -> Tensor:
        twin = Glow(3, 8, count, 1, hidden, **options)
        twin.load_state_dict(model.state_dict())
        twin.bits_per_dim(x).mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in twin.parameters()])

    rows = []
    for batch, x in batches.items():
        expected = gradient(x)
        errors = {name: relative(gradient(x, **options), expected) for name, options in POLICIES.items()}
        rows.append({"batch": batch, **errors})
        print(f"{batch:24}" + "".join(f"  {name} {error:.1e}" for name, error in errors.items()), flush=True)
    if updates == UPDATES:
        (RESULTS / f"poison{count}.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "poison"))
    parser.add_argument("steps", nargs="?", type=int)
    parser.add_argument("updates", nargs="?", type=int, default=UPDATES)
    arguments = parser.parse_args()
    if arguments.what == "poison" and arguments.steps is None:
        parser.error("poison needs the number of steps of flow")
    # For convolutions this small, oneDNN's set-up takes longer than the computation.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        depth() if arguments.what == "depth" else poison(arguments.steps, arguments.updates)


if __name__ == "__main__":
    main()
