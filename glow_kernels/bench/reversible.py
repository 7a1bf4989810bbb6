"""Measures what reversible training promises: little memory, and the gradients of plain autograd even with bad data."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glow_kernels import use_backend
from glow_kernels.bench import chains
from glow_kernels.bench.live_storages import training_step_bytes
from glow_kernels.bench.plan import Show, Task
from glow_kernels.bench.results import Writer
from glow_kernels.errors import MissingDependencyError
from glow_kernels.models import Glow

# The published benchmark of activation memory: InvertibleNetworks.jl, JOSS 9(99), 2024, figure 2.
BATCH, SIZE, HIDDEN, LEVELS, DEEPEST = 8, 256, 256, 3, 80
STATE_BYTES = 4 * BATCH * 3 * SIZE * SIZE
# The state of every level has half as many elements as that of the level before.
ALL_STATES_BYTES = sum(STATE_BYTES >> level for level in range(LEVELS))
ANCHOR, MICRO_BATCHES, INVERT = "anchor 4", "anchor 6, 8 micro-batches", "invert"
_OPTIONS: dict[str, dict[str, Any]] = {
    ANCHOR: {"memory": "anchor"},
    MICRO_BATCHES: {"memory": "anchor", "anchor_every": 6, "micro_batches": 8},
    INVERT: {"memory": "invert"},
}


class Reversible:
    """Measures each promise and writes the results to one file."""

    def __init__(self, device: torch.device, writer: Writer, show: Show) -> None:
        self._device, self._writer, self._show = device, writer, show

    def tasks(self, *, quick: bool) -> list[Task]:
        """The tasks; in a quick run only the short one."""
        found = [Task("gradients of a reversible chain", 4.0, lambda _: self.gradients(4 if quick else 64))]
        if quick:
            return found
        # The deepest chain takes long, and its memory can be extrapolated exactly.
        for policy, steps, seconds in (
            (ANCHOR, 8, 3.0),
            (ANCHOR, 16, 5.0),
            (INVERT, 8, 2.0),
            (INVERT, 16, 3.0),
            (MICRO_BATCHES, 13, 16.0),
        ):
            task = functools.partial(self.memory, policy, steps)
            found.append(Task(f"activations, {policy}, {steps} steps", seconds, task))
        found.append(Task("gradients of a bad image", 25.0, lambda _: self.bad_row()))
        return found

    def memory(self, policy: str, steps: int, _: float = 0.0) -> None:
        """Count the activations of a training step of the published benchmark with fake tensors."""
        with use_backend("reference"):
            kept, peak = training_step_bytes(
                lambda: Glow(3, SIZE, steps, LEVELS, HIDDEN, **_OPTIONS[policy]), (BATCH, 3, SIZE, SIZE)
            )
        case = {"part": "activations", "policy": policy, "steps": steps}
        self._writer.write({"kind": "memory", "case": case, "kept_bytes": kept, "peak_bytes": peak})
        self._show(f"activations, {policy}, {steps} steps: kept {kept / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB")

    def gradients(self, steps: int) -> None:
        """Compare the gradients of a chain with anchors with those of plain autograd."""
        found = []
        for name in ("glow_kernels", "glow_kernels anchor"):
            torch.manual_seed(0)
            chain = chains.CHAINS[name](12, 16, steps, 8)
            chain[1].to(self._device)
            chains.training_step(chain, torch.randn(4, 12, 8, 8, device=self._device))()
            found.append(_gradient(chain[1]))
        self._write("gradients", steps, found)

    def bad_row(self, steps: int = 32, iterations: int = 150) -> None:
        """Compare the gradients of a trained Glow for a batch in which one image has a row of noise."""
        from glow_kernels.training import data

        try:
            photographs = data.load("patches", image_size=8)
        except MissingDependencyError as error:
            self._show(f"bad_row cannot be measured: {error}")
            return
        torch.manual_seed(0)
        model = Glow(3, 8, steps, 1, 32).to(self._device)
        pixels = photographs.train.to(self._device)
        model.initialize(model.dequantize(pixels[:64]))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (iteration + 1) / 100)
            batch = pixels[torch.randint(len(pixels), (16,), device=self._device)]
            optimizer.zero_grad()
            model.bits_per_dim(model.dequantize(batch)).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        x = model.dequantize(pixels[:8])
        x[0, :, 4] = 4.0 * torch.rand(3, 8, device=self._device) - 2.0
        found = []
        for memory in ("store", "anchor"):
            twin = Glow(3, 8, steps, 1, 32, memory=memory).to(self._device)
            twin.load_state_dict(model.state_dict())
            twin.bits_per_dim(x).mean().backward()  # type: ignore[no-untyped-call]
            found.append(_gradient(twin))
        self._write("bad_row", steps, found)

    def _write(self, part: str, steps: int, gradients: list[Tensor]) -> None:
        plain, reversible = gradients
        difference = ((reversible - plain).norm() / plain.norm()).item()
        case = {"part": part, "steps": steps, "device": self._device.type}
        # JSON has no NaN.
        figure = difference if difference == difference else None
        self._writer.write({"kind": "accuracy", "case": case, "relative_difference": figure})
        self._show(f"{part}: steps={steps}: reversible differs from plain autograd by {difference:.1e}")


def _gradient(module: torch.nn.Module) -> Tensor:
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads])
