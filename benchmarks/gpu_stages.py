"""What ``make gpu`` measures in addition to ``glow-kernels bench``, one stage per call, into one file of results.

    python -m benchmarks.gpu_stages training --output gpu.jsonl
    python -m benchmarks.gpu_stages training --output gpu.jsonl --toy --device cpu

Every row is written as soon as it is measured, so a stopped stage keeps its results. ``--toy`` uses sizes that take
about a second, to test the code and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from glow_kernels import CapturedStep, accelerate, use_backend
from glow_kernels.bench import environment, models, operators, results, timing
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.bench.timing import Call
from glow_kernels.errors import GlowKernelsError, in_brief
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep

Build = Callable[[], Call]

# The package with its default backends, as a user gets it.
OURS = "glow_kernels"

# Steps, levels, width, image size and batch; the first are those of the goals.
TRAINING = ((32, 3, 512, 32, 64), (32, 3, 512, 32, 256), (32, 4, 512, 64, 32), (32, 6, 512, 256, 4))
COMPILED = "reference compiled"
# Implementations measured at the other sizes: first KEY_IMPLEMENTATIONS at all of them, then OTHER_IMPLEMENTATIONS.
KEY_IMPLEMENTATIONS = (f"{OURS} bfloat16, graph", "floor: bare convolutions, bfloat16, graph")
OTHER_IMPLEMENTATIONS = ("reference", "normflows")
# InvertibleNetworks.jl, JOSS 9(99), 2024: figure 2 by depth at 256 x 256, figure 1 by image size at 16 steps.
# The depth of the goal is first.
DEPTHS, SIZES, MEMORY_BATCH, MEMORY_HIDDEN = (80, 4, 16, 48), (512, 1024), 8, 256
MEMORY_POLICIES: dict[str, dict[str, Any]] = {
    "anchor 4": {"memory": "anchor"},
    "anchor 6, 8 micro-batches": {"memory": "anchor", "anchor_every": 6, "micro_batches": 8},
    "invert": {"memory": "invert"},
    "store": {},
}
SAMPLES = (1, 64, 256)
# Steps, levels, width, image size and batch of existing code, and the options of accelerate. Without verify, which
# takes as long as all the measurements; the tests prove that the patched layers compute the same.
DROP_IN = (4, 2, 512, 32, 64)
DROP_IN_VARIANTS: dict[str, dict[str, Any] | None] = {
    "as it was": None,
    "accelerate": {"verify": False},
    'accelerate, memory="anchor"': {"verify": False, "memory": "anchor"},
}


class Convolutions(TorchDispatchMode):
    """Records the arguments of every convolution that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


@dataclass
class Stages:
    """The stages of one run; ``toy`` uses sizes that a CPU can do in a moment."""

    device: torch.device
    writer: results.Writer
    toy: bool

    def training(self) -> None:
        """A training step and its lower bound: all implementations at the first size, a few at the others."""
        sizes = self._training_sizes()
        for some, names in ((sizes[:1], None), (sizes[1:], KEY_IMPLEMENTATIONS), (sizes[1:], OTHER_IMPLEMENTATIONS)):
            for size in some:
                case, x = self._training_case(*size)
                for name, build in self._training_builds(case, x).items():
                    if names is None or name in names:
                        self._measure("training_step", case, name, build, case["batch"])

    def compile(self) -> None:
        """Fill the compiler's cache while the tests run: compiling takes as long as all the training steps together."""
        case, x = self._training_case(*self._training_sizes()[0])
        self._training_builds(case, x)[COMPILED]()

    def memory(self) -> None:
        """Peak memory and time of a step by depth and by image size, at the sizes of the published benchmark."""
        points = [(steps, 256) for steps in DEPTHS] + [(16, size) for size in SIZES]
        levels, hidden, batch = (2, 8, 2) if self.toy else (3, MEMORY_HIDDEN, MEMORY_BATCH)
        for steps, size in [(2, 8)] if self.toy else points:
            case = {"steps": steps, "levels": levels, "hidden": hidden, "image_size": size, "batch": batch}
            x = torch.rand(batch, 3, size, size, device=self.device) - 0.5
            builds: dict[str, Build] = {
                name: functools.partial(self._build, case, x, **options) for name, options in MEMORY_POLICIES.items()
            }
            builds["normflows"] = functools.partial(self._build_normflows, case, x)
            for name, build in builds.items():
                self._measure("memory", case, name, build, batch, once=True)  # a step takes seconds

    def sampling(self) -> None:
        """Throughput in images per second, and the latency of one image, with every backend that runs here."""
        steps, levels, hidden, size = (2, 2, 8, 8) if self.toy else TRAINING[0][:4]
        case = {"steps": steps, "levels": levels, "hidden": hidden, "image_size": size}
        model = self._glow({**case})
        model.initialize(torch.rand(8, 3, size, size, device=self.device) - 0.5)
        model.eval()
        for number in SAMPLES[:2] if self.toy else SAMPLES:
            draw = functools.partial(model.sample, number)
            draws = {OURS: draw} | {backend: on(backend, draw) for backend in operators.backends_on(self.device)}
            for name, call in draws.items():
                self._measure("sampling", {**case, "batch": number}, name, functools.partial(_same, call), number)

    def drop_in(self) -> None:
        """A training step of existing code, before and after ``accelerate``."""
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from dialects import openai, rosinality

        steps, levels, hidden, size, batch = (2, 2, 8, 8, 2) if self.toy else DROP_IN
        codes: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
            "rosinality": (lambda: rosinality.Glow(3, steps, levels, filter_size=hidden), rosinality.loss),
            "chaiyujin": (lambda: openai.Glow(3, hidden, steps, levels), openai.loss),
        }
        x = torch.rand(batch, 3, size, size, device=self.device) - 0.5
        for code, (make, loss) in codes.items():
            case = {"code": code, "steps": steps, "levels": levels, "hidden": hidden, "image_size": size}
            for name, options in DROP_IN_VARIANTS.items():
                build = functools.partial(self._build_drop_in, make, loss, x, options)
                self._measure("drop_in", {**case, "batch": batch}, name, build, batch)

    def _training_sizes(self) -> Sequence[tuple[int, ...]]:
        return ((2, 2, 8, 8, 2),) if self.toy else TRAINING

    def _training_case(
        self, steps: int, levels: int, hidden: int, size: int, batch: int
    ) -> tuple[dict[str, int], Tensor]:
        case = {"steps": steps, "levels": levels, "hidden": hidden, "image_size": size, "batch": batch}
        return case, torch.rand(batch, 3, size, size, device=self.device) - 0.5

    def _training_builds(self, case: dict[str, int], x: Tensor) -> dict[str, Build]:
        """Functions that build a step, by name; the most informative first, since the stage may be stopped."""
        reference = functools.partial(on, "reference")

        def graph(backend: str = "", low_precision: bool = True, **options: Any) -> Call:
            step = self._build(case, x, low_precision, **options)
            return self._graph(on(backend, step) if backend else step)

        backends = [name for name in operators.backends_on(self.device) if name != "reference"]
        return {
            f"{OURS} bfloat16, graph": graph,
            "floor: bare convolutions, bfloat16, graph": lambda: self._graph(self._floor(case, x, low_precision=True)),
            f"{OURS} bfloat16, with optimizer, graph": lambda: self._whole_step(self._glow(case), x),
            f"{OURS} anchor, bfloat16, graph": lambda: graph(memory="anchor"),
            f"{OURS}, graph": lambda: graph(low_precision=False),
            "floor: bare convolutions, graph": lambda: self._graph(self._floor(case, x)),
            f"{OURS} anchor, graph": lambda: graph(low_precision=False, memory="anchor"),
            OURS: lambda: self._build(case, x),
            "reference": lambda: reference(self._build(case, x)),
            "reference, graph": lambda: graph("reference", low_precision=False),
            "normflows": lambda: self._build_normflows(case, x),
            f"{OURS} anchor": lambda: self._build(case, x, memory="anchor"),
            "checkpoint per step": lambda: self._step(checkpointed(self._glow(case)), x),
            f"{OURS} bfloat16": lambda: self._build(case, x, low_precision=True),
            "floor: bare convolutions": lambda: self._floor(case, x),
            # Each backend alone; what it does not support is left to the reference.
            **{f"{backend} bfloat16, graph": functools.partial(graph, backend) for backend in backends},
            COMPILED: lambda: reference(self._step(models.compiled(self._glow(case), x), x)),
        }

    def _measure(
        self, part: str, case: Mapping[str, int | str], name: str, build: Build, images: int, once: bool = False
    ) -> None:
        """Time and peak memory of one implementation alone, since several such models do not fit on one GPU."""
        row: results.Row = {
            "kind": "model",
            "case": {"part": part, **case, "implementation": name, "device": self.device.type},
            "ours": OURS,
            "note": "",
        }
        try:
            with warnings.catch_warnings(), timing.capturable(self.device):
                warnings.simplefilter("ignore")  # warnings of other packages
                call = build()
                call()
                if once:
                    start = time.perf_counter()
                    row["peak_extra_bytes"] = peak_extra_bytes(call, self.device)
                    row["seconds"] = [time.perf_counter() - start] * 3
                else:
                    times = timing.measure({name: [call]}, 0.02 if self.toy else 0.3, self.device)
                    row["seconds"] = times.spread(name).as_row()
                    if not name.endswith("graph"):  # the replay of a graph allocates nothing
                        row["peak_extra_bytes"] = peak_extra_bytes(call, self.device)
                row["images_per_second"] = images / row["seconds"][0]
        except Exception as error:  # out of memory, or a package is missing or fails: go on with the others
            row["failed"] = in_brief(error)
        call = None  # type: ignore[assignment]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.writer.write(row)
        said = row.get("failed") or f"{1e3 * row['seconds'][0]:9.2f} ms {row['images_per_second']:9.1f} images/s"
        if "peak_extra_bytes" in row:
            said += f" {row['peak_extra_bytes'] / 1e9:7.3f} GB"
        print(f"{part} {' '.join(map(str, case.values()))} {name}: {said}", flush=True)

    def _glow(self, case: dict[str, int], **options: Any) -> Glow:
        torch.manual_seed(0)
        return Glow(3, case["image_size"], case["steps"], case["levels"], case["hidden"], **options).to(self.device)

    def _build(self, case: dict[str, int], x: Tensor, low_precision: bool = False, **options: Any) -> Call:
        return self._step(self._glow(case, **options), x, low_precision)

    def _build_normflows(self, case: dict[str, int], x: Tensor) -> Call:
        return self._step(normflows_glow(case), x)

    def _build_drop_in(
        self,
        make: Callable[[], nn.Module],
        loss: Callable[[nn.Module, Tensor], Tensor],
        x: Tensor,
        options: dict[str, Any] | None,
    ) -> Call:
        torch.manual_seed(0)
        model = make().to(self.device)
        with torch.no_grad():
            loss(model, x)  # initialises ActNorm
        if options is not None and (left := accelerate(model, **options).left_alone):
            raise GlowKernelsError(f"{left[0].path} is not patched: {left[0].reason}")
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(loss(model, x), parameters)

    def _step(self, model: nn.Module, x: Tensor, low_precision: bool = False) -> Call:
        """A function that computes the gradients of a model's mean negative log-density."""
        model.to(self.device).train()
        if isinstance(model, Glow):
            model.initialize(x)
        if low_precision:
            model = model.to(memory_format=torch.channels_last)
        step = models.glow_step(model, x)

        def autocast() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return step()

        return autocast if low_precision else step

    def _whole_step(self, model: Glow, x: Tensor) -> Call:
        """Everything that a training loop does for a batch, clipping and the optimizer included, as a CUDA graph."""
        step = self._step(model, x, low_precision=True)
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=on_gpu)

        def update(_: Tensor) -> Any:
            loss = step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
            optimizer.step()
            return loss

        captured = CapturedStep(update)
        while not captured.is_settled:
            captured(x)
        if on_gpu and (reason := captured.reason):
            raise GlowKernelsError(f"the step cannot be captured in a CUDA graph: {reason}")
        return functools.partial(captured, x)

    def _floor(self, case: dict[str, int], x: Tensor, low_precision: bool = False) -> Call:
        """Only the convolutions of the coupling networks, forward and backward, as often as a step runs them."""
        model = self._glow(case)
        model.initialize(x)
        found = _network_convolutions(model, x)
        dtype, layout = (torch.bfloat16, torch.channels_last) if low_precision else (x.dtype, torch.contiguous_format)
        prepared: dict[Any, tuple[Any, ...]] = {}
        for args in found:
            key = (args[0].shape, args[1].shape)
            if key not in prepared:
                data, weight = (
                    torch.randn(shape, device=self.device).to(dtype, memory_format=layout).requires_grad_()
                    for shape in key
                )
                result = torch.ops.aten.convolution(data, weight, None, *args[3:])
                prepared[key] = data, weight, args[3:], torch.randn_like(result)
        order = [prepared[args[0].shape, args[1].shape] for args in found]

        def call() -> None:
            for data, weight, options, grad in order:
                result = torch.ops.aten.convolution(data, weight, None, *options)
                torch.autograd.grad(result, (data, weight), grad)

        return call

    def _graph(self, call: Call) -> Call:
        """``call`` as the replay of a CUDA graph; on a CPU, unchanged."""
        if self.device.type != "cuda":
            return call
        call()
        torch.cuda.empty_cache()  # the graph allocates from a private pool and cannot use cached memory
        return timing.capture(call)


def on(backend: str, call: Call) -> Call:
    """``call`` with ``backend``."""

    def chosen() -> object:
        with use_backend(backend):
            return call()

    return chosen


def checkpointed(model: Glow) -> Glow:
    """``model`` with every flow step in ``torch.utils.checkpoint``."""
    for step in (module for module in model.modules() if isinstance(module, FlowStep)):
        forward = step.forward

        def recomputed(x: Tensor, *context: Any, forward: Any = forward, step: FlowStep = step) -> Any:
            step.actnorm.prepare(x)
            return checkpoint(forward, x, *context, use_reentrant=False)

        step.forward = recomputed  # type: ignore[method-assign]
    return model


def _same(call: Call) -> Call:
    return call


def normflows_glow(case: dict[str, int]) -> nn.Module:
    """The same model in normflows: a multiscale flow of Glow blocks, squeezes and merges, deepest level first."""
    import normflows as nf

    levels, size = case["levels"], case["image_size"]
    flows, merges, priors = [], [], []
    for level in range(levels):
        channels, side = 3 * 2 ** (levels + 1 - level), size // 2 ** (levels - level)
        blocks = [nf.flows.GlowBlock(channels, case["hidden"]) for _ in range(case["steps"])]
        flows.append([*blocks, nf.flows.Squeeze()])
        if level > 0:
            merges.append(nf.flows.Merge())
        priors.append(nf.distributions.DiagGaussian((channels // 2 if level > 0 else channels, side, side)))
    flow = nf.MultiscaleFlow(priors, flows, merges)

    class LogDensity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> Tensor:
            log_density: Tensor = self.flow.log_prob(x, None)
            return log_density

    return LogDensity()


def _network_convolutions(model: Glow, x: Tensor) -> list[tuple[Any, ...]]:
    """The arguments of all convolutions in the coupling networks for this input."""
    found: list[tuple[Any, ...]] = []
    inputs: list[tuple[nn.Module, tuple[Any, ...]]] = []
    networks = [module.coupling.network for module in model.modules() if isinstance(module, FlowStep)]
    hooks = [network.register_forward_pre_hook(lambda *call: inputs.append(call)) for network in networks]
    with torch.no_grad(), use_backend("reference"):
        model(x)
        for hook in hooks:
            hook.remove()
        for network, args in inputs:
            with Convolutions() as convolutions:
                network(*args)
            found += convolutions.calls
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stages", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("compile", "training", "memory", "sampling", "drop_in"))
    parser.add_argument("--output", type=Path, required=True, help="file of results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes of a second or so")
    arguments = parser.parse_args(argv)
    device = torch.zeros(0, device=arguments.device).device
    try:
        writer = results.Writer(arguments.output, environment.record(device))
        getattr(Stages(device, writer, arguments.toy), arguments.stage)()
    except GlowKernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
