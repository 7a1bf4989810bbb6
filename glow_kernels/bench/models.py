"""Whole models: training steps, memory by depth, sampling; our backends among each other and against other packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glow_kernels import available_backends, use_backend
from glow_kernels.bench import chains, table, timing
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.bench.results import Writer
from glow_kernels.bench.timing import Call
from glow_kernels.models import Glow

DEPTHS = (1, 4, 16, 64)
QUICK_DEPTHS = (1, 4)
# Steps, levels and width of Glow, image size and batch; the first is the one of the goal for training.
GLOWS = ((8, 2, 64, 32, 16), (4, 3, 64, 64, 4))
QUICK_GLOWS = ((2, 2, 32, 32, 8),)
Show = Callable[[str], None]


class Models:
    """Measures one part after the other into one file.

    Args:
        device: where to compute.
        quick: smaller models.
        with_compile: also the reference under ``torch.compile``.
    """

    def __init__(self, device: torch.device, writer: Writer, show: Show, *, quick: bool, with_compile: bool) -> None:
        self._device, self._writer, self._show = device, writer, show
        self._quick, self._with_compile = quick, with_compile
        self._seconds = 3.0 if quick else 10.0

    def run(self) -> None:
        """All parts."""
        for sizes in QUICK_GLOWS if self._quick else GLOWS:
            self.training(*sizes)
            self.sampling(*sizes)
        self.peers(steps=2 if self._quick else 4)
        self.gradients(steps=4 if self._quick else 64)
        for depth in QUICK_DEPTHS if self._quick else DEPTHS:
            self.depth(depth)

    def training(self, steps: int, levels: int, hidden: int, size: int, batch: int) -> None:
        """A training step of a Glow by every backend."""
        case = {"steps": steps, "levels": levels, "hidden": hidden, "image_size": size, "batch": batch}
        x = torch.rand(batch, 3, size, size, device=self._device) - 0.5
        candidates: dict[str, Call] = {}
        for backend in available_backends():
            candidates[backend] = _on(backend, _glow_step(self._glow(case), x))
        backend = available_backends()[0]
        candidates[f"{backend} anchor"] = _on(backend, _glow_step(self._glow(case, memory="anchor"), x))
        if self._with_compile:
            model = self._glow(case)
            with use_backend("reference"):
                eager = _glow_step(model, x)  # initialises, which is not for the compiler
                eager()
                compiled = _glow_step(model, x, torch.compile(model, dynamic=False))
                compiled()
            candidates["reference compiled"] = _on("reference", compiled)
        self._time("training_step", case, candidates, batch)

    def sampling(self, steps: int, levels: int, hidden: int, size: int, batch: int) -> None:
        """Throughput of a batch and latency of one image."""
        case = {"steps": steps, "levels": levels, "hidden": hidden, "image_size": size}
        model = self._glow(case)
        x = torch.rand(batch, 3, size, size, device=self._device) - 0.5
        model.initialize(x)
        model.eval()
        for number in (batch, 1):
            calls = {backend: _on(backend, lambda: model.sample(number)) for backend in available_backends()}  # noqa: B023
            self._time("sampling", {**case, "batch": number}, calls, number)

    def peers(self, steps: int) -> None:
        """A training step of the same chain in other packages; memcnn and checkpointing save memory."""
        case = {"steps": steps, "channels": 12, "hidden": 64, "image_size": 16, "batch": 16}
        self._time("chain", case, self._chains(case, chains.available()), case["batch"])

    def depth(self, steps: int) -> None:
        """Time and memory of a chain as functions of its depth."""
        case = {"steps": steps, "channels": 12, "hidden": 64, "image_size": 16, "batch": 4}
        names = [name for name in chains.available() if name not in ("nflows", "FrEIA")]
        self._time("depth", case, self._chains(case, names), case["batch"])

    def gradients(self, steps: int) -> None:
        """How far the gradients of a reversible chain are from those of plain autograd: relative L2 difference."""
        found = []
        for name in ("glow_kernels", "glow_kernels anchor"):
            torch.manual_seed(0)
            chain = chains.CHAINS[name](12, 16, steps, 8)
            chain[1].to(self._device)
            chains.training_step(chain, torch.randn(4, 12, 8, 8, device=self._device))()
            grads = [parameter.grad for parameter in chain[1].parameters() if parameter.grad is not None]
            found.append(torch.cat([grad.flatten().double() for grad in grads]))
        difference = ((found[1] - found[0]).norm() / found[0].norm()).item()
        case = {"part": "gradients", "steps": steps, "device": self._device.type}
        self._writer.write({"kind": "accuracy", "case": case, "relative_difference": difference})
        self._show(f"\ngradients: steps={steps}: reversible differs from plain autograd by {difference:.1e}")

    def _chains(self, case: Mapping[str, int], names: list[str]) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        shape = (case["batch"], case["channels"], case["image_size"], case["image_size"])
        x = torch.randn(shape, device=self._device)
        for name in names:
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of other packages, about functions that PyTorch will remove
                    chain = chains.CHAINS[name](case["channels"], case["hidden"], case["steps"], case["image_size"])
                    chain[1].to(self._device)
                    calls[name] = chains.training_step(chain, x)
            except Exception as error:
                self._show(f"{name} cannot be measured: {type(error).__name__}: {error}")
        return calls

    def _glow(self, case: Mapping[str, int], **options: Any) -> Glow:
        torch.manual_seed(0)
        model = Glow(3, case["image_size"], case["steps"], case["levels"], case["hidden"], **options)
        return model.to(self._device)

    def _time(self, part: str, case: Mapping[str, Any], candidates: dict[str, Call], images: int) -> None:
        ours = next(iter(candidates))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = timing.measure({name: [call] for name, call in candidates.items()}, self._seconds, self._device)
            peaks = {name: peak_extra_bytes(call, self._device) for name, call in candidates.items()}
        title = " ".join(f"{name}={value}" for name, value in case.items())
        self._show(f"\n{part}: {title}")
        for name in candidates:
            spread, ratio = times.spread(name), times.ratio(name, ours)
            row = {
                "kind": "model",
                "case": {"part": part, **case, "implementation": name, "device": self._device.type},
                "ours": ours,
                "seconds": table.as_row(spread),
                "images_per_second": images / spread.median,
                "ratio_to_ours": table.as_row(ratio),
                "peak_extra_bytes": peaks[name],
                "note": chains.NOTES.get(name, ""),
            }
            self._writer.write(row)
            note = f"  ({row['note']})" if row["note"] else ""
            self._show(
                f"  {name:20} {row['images_per_second']:8.1f} images/s  {ratio.median:5.2f} times {ours}"
                f" ({ratio.low:.2f}-{ratio.high:.2f})  peak {peaks[name] / 1e6:8.1f} MB{note}"
            )


def _glow_step(model: Glow, x: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> Call:
    log_prob = model if function is None else function  # a compiled module has no truth value

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss = -log_prob(x).mean()
        loss.backward()
        return loss.detach()

    return step


def _on(backend: str, call: Call) -> Call:
    def chosen() -> object:
        with use_backend(backend):
            return call()

    return chosen
