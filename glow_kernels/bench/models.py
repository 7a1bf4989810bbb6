"""Measures whole models: training steps, sampling, and other packages by depth, batch and image size."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels import tune_allocator, use_backend
from glow_kernels.bench import chains, operators, table, timing
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.bench.plan import Show, Task
from glow_kernels.bench.results import Writer
from glow_kernels.bench.timing import Call
from glow_kernels.errors import in_brief
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep

Sizes = dict[str, int]
# The goals for training are for the first.
GLOWS = (
    {"steps": 8, "levels": 2, "hidden": 64, "image_size": 32, "batch": 16},
    {"steps": 4, "levels": 3, "hidden": 64, "image_size": 64, "batch": 4},
)
QUICK_GLOWS = ({"steps": 2, "levels": 2, "hidden": 32, "image_size": 32, "batch": 8},)
CHAIN = {"steps": 4, "channels": 12, "hidden": 64, "image_size": 16, "batch": 8}
# The variable of each curve and its values; the other sizes are those of CHAIN.
CURVES = {"steps": (1, 4, 16, 64), "batch": (1, 4, 16, 32), "image_size": (8, 16, 32, 48)}
QUICK_CURVES = {"steps": (1, 8)}
# The chains on the curves; the others are measured only at the sizes of CHAIN.
ON_CURVES = ("glow_kernels", "glow_kernels anchor", "glow_kernels invert", "checkpoint", "normflows", "memcnn")


class Models:
    """Measures one part after the other into one file.

    Args:
        device: where to compute.
        with_compile: also measure the reference under ``torch.compile``.
    """

    def __init__(self, device: torch.device, writer: Writer, show: Show, *, with_compile: bool) -> None:
        self._device, self._writer, self._show = device, writer, show
        self._with_compile = with_compile
        self._backends = operators.backends_on(device)

    def tasks(self, *, quick: bool) -> list[Task]:
        """The tasks of all parts."""
        found = []
        for index, sizes in enumerate(QUICK_GLOWS if quick else GLOWS):
            # Only the first model is compiled, since compiling takes longer than all the rest.
            compiles = self._with_compile and index == 0
            seconds = 15.0 if quick else 50.0 if compiles else 15.0
            found.append(self._task("training_step", seconds, self.training, sizes, compiles))
            found.append(self._task("sampling", 2.0 if quick else 6.0, self.sampling, sizes))
        found.append(self._task("chain", 5.0 if quick else 15.0, self.chain, CHAIN, chains.available()))
        names = [name for name in chains.available() if name in ON_CURVES]
        for variable, values in (QUICK_CURVES if quick else CURVES).items():
            for value in values:
                sizes = {**CHAIN, variable: value}
                seconds = 1.0 + 0.06 * sizes["steps"] * sizes["batch"] * sizes["image_size"] ** 2 / 256
                found.append(self._task(f"curve by {variable}", seconds, self.chain, sizes, names))
        return found

    def training(self, seconds: float, part: str, sizes: Sizes, compiles: bool) -> None:
        """A training step of a Glow with every backend, and also reversible and compiled."""
        x = torch.rand(_images(sizes, 3), device=self._device) - 0.5
        calls: dict[str, Call] = {}
        for backend in self._backends:
            calls[backend] = _on(backend, glow_step(self._glow(sizes), x))
        ours = self._backends[0]
        calls[f"{ours} anchor"] = _on(ours, glow_step(self._glow(sizes, memory="anchor"), x))
        if compiles:
            name = "reference compiled"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the compiler's warnings about itself
                    calls[name] = _on("reference", glow_step(compiled(self._glow(sizes), x), x))
            except Exception as error:  # the compiler may raise anything
                self._show(f"{name} cannot be measured: {in_brief(error)}")
        self._time(part, sizes, calls, seconds)

    def sampling(self, seconds: float, part: str, sizes: Sizes) -> None:
        """The throughput of a batch and the latency of one image."""
        model = self._glow(sizes)
        model.initialize(torch.rand(_images(sizes, 3), device=self._device) - 0.5)
        model.eval()
        for number in (sizes["batch"], 1):
            draw = functools.partial(model.sample, number)
            calls = {backend: _on(backend, draw) for backend in self._backends}
            self._time(part, {**sizes, "batch": number}, calls, seconds / 2)

    def chain(self, seconds: float, part: str, sizes: Sizes, names: Sequence[str]) -> None:
        """A training step of the same chain in each package of ``names``."""
        x = torch.randn(_images(sizes, sizes["channels"]), device=self._device)
        calls: dict[str, Call] = {}
        for name in names:
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # other packages use functions that PyTorch has deprecated
                    chain = chains.CHAINS[name](sizes["channels"], sizes["hidden"], sizes["steps"], sizes["image_size"])
                    chain[1].to(self._device)
                    calls[name] = chains.training_step(chain, x)
            except Exception as error:  # other packages may raise anything
                self._show(f"{name} cannot be measured: {in_brief(error)}")
        self._time(part, sizes, calls, seconds)

    def _task(self, part: str, seconds: float, measure: Callable[..., None], sizes: Sizes, *others: Any) -> Task:
        def run(allowed: float) -> None:
            tune_allocator()  # a run of all parts has done so by now, in the part "operators"
            # Building, warming up and counting bytes take the rest of the time.
            measure(0.6 * allowed, part, sizes, *others)

        return Task(f"{part}, {_title(sizes)}", seconds, run)

    def _glow(self, sizes: Sizes, **options: Any) -> Glow:
        torch.manual_seed(0)
        model = Glow(3, sizes["image_size"], sizes["steps"], sizes["levels"], sizes["hidden"], **options)
        return model.to(self._device)

    def _time(self, part: str, sizes: Mapping[str, int], calls: dict[str, Call], seconds: float) -> None:
        ours = next(iter(calls))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = timing.measure({name: [call] for name, call in calls.items()}, seconds, self._device)
            peaks = {name: peak_extra_bytes(call, self._device) for name, call in calls.items()}
        self._show(f"\n{part}: {_title(sizes)}")
        for name in calls:
            spread, ratio = times.spread(name), times.ratio(name, ours)
            note = chains.NOTES.get(name, "")
            self._writer.write(
                {
                    "kind": "model",
                    "case": {"part": part, **sizes, "implementation": name, "device": self._device.type}
                    | {"threads": torch.get_num_threads()},
                    "ours": ours,
                    "seconds": spread.as_row(),
                    "images_per_second": sizes["batch"] / spread.median,
                    "ratio_to_ours": list(ratio),
                    "peak_extra_bytes": peaks[name],
                    "note": note,
                }
            )
            self._show(
                f"  {name:20} {sizes['batch'] / spread.median:9.1f} images/s {1e3 * spread.median:9.2f} ms  "
                f"{table.in_range(*ratio)} times {ours}  "
                f"peak {peaks[name] / 1e6:8.1f} MB" + (f"  ({note})" if note else "")
            )


def glow_step(model: Glow, x: Tensor) -> Call:
    """A function that computes the gradients of the mean negative log-density of ``x``."""

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss: Tensor = -model(x).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def compiled(model: Glow, x: Tensor) -> Glow:
    """``model`` with the reference backend and every flow step under ``torch.compile``.

    Steps of one level share a compilation, so a deep Glow needs three instead of a hundred. No fusion is lost, since
    the coupling that ends a step is followed by the matrix product that begins the next.
    """
    with use_backend("reference"):
        model.train()
        model.initialize(x)
        for module in model.modules():
            if isinstance(module, FlowStep):
                module.compile(dynamic=False)
        glow_step(model, x)()
    return model


def _images(sizes: Sizes, channels: int) -> tuple[int, int, int, int]:
    return sizes["batch"], channels, sizes["image_size"], sizes["image_size"]


def _title(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def _on(backend: str, call: Call) -> Call:
    def chosen() -> object:
        with use_backend(backend):
            return call()

    return chosen
