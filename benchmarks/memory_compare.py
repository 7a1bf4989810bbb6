"""Memory and time of a training step: this package's policies, PyTorch's checkpointing, memcnn and normflows.

All train the same flow, one level of Glow's steps (ActNorm, 1x1 convolution, coupling with a network of three
convolutions). memcnn only has the additive coupling, so there are two tables. Peaks are live bytes of real tensors on
the CPU, without gradients of parameters; times are medians of interleaved steps, with these gradients. Writes
docs/memory/compare.json. Needs the extra "peers".

    python benchmarks/memory_compare.py             everything
    python benchmarks/memory_compare.py 16          with another number of flow steps
    python benchmarks/memory_compare.py 8 additive  only this table; the other stays as it is
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import glow_kernels as gk
from glow_kernels import ReversibleSequential
from glow_kernels.bench.live_storages import LiveStorages
from glow_kernels.nn import FlowStep

RESULTS = Path(__file__).parents[1] / "docs/memory/compare.json"
CHANNELS, HIDDEN, SIZE, BATCH = 12, 128, 32, 8
REPEATS = 8


class ResizableStorages(LiveStorages):
    """Reads the size of every storage again after every operator, since memcnn empties storages that stay alive."""

    def __init__(self, ignored: list[nn.Module]) -> None:
        super().__init__(ignored)
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._bytes:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        self._alive = {key: weak for key, weak in self._alive.items() if not weak.expired()}
        self.now = sum(torch.UntypedStorage._new_with_weak_ptr(weak.cdata).nbytes() for weak in self._alive.values())
        self.peak = max(self.peak, self.now)
        return results


class Checkpointed(nn.Module):
    def __init__(self, steps: nn.Sequential) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for step in self.steps:
            x, log_det = checkpoint(step, x, use_reentrant=False)
            total = total + log_det
        return x, total


class MemcnnChain(nn.Module):
    """ActNorm and 1x1 convolution of this package, wrapped as memcnn layers, with memcnn's additive coupling."""

    def __init__(self, steps: nn.Sequential) -> None:
        super().__init__()
        import memcnn

        class Linear(nn.Module):
            def __init__(self, step: FlowStep) -> None:
                super().__init__()
                self.actnorm, self.mixing = step.actnorm, step.mixing

            def forward(self, x: Tensor) -> Tensor:
                matrix = self.mixing.matrix()
                return gk.actnorm_conv1x1(x, self.actnorm.log_scale, self.actnorm.bias, *matrix)[0]

            def inverse(self, z: Tensor) -> Tensor:
                matrix = self.mixing.matrix()
                return gk.actnorm_conv1x1_inverse(z, self.actnorm.log_scale, self.actnorm.bias, *matrix)[0]

        class Nothing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.zeros_like(x)

        self.steps = steps
        self.layers = nn.ModuleList()
        for step in steps:
            self.layers.append(memcnn.InvertibleModuleWrapper(Linear(step), keep_input=False))
            coupling = memcnn.AdditiveCoupling(step.coupling.network, Nothing())
            self.layers.append(memcnn.InvertibleModuleWrapper(coupling, keep_input=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for step, layers in zip(self.steps, zip(self.layers[::2], self.layers[1::2], strict=True), strict=True):
            for layer in layers:
                x = layer(x)
            weight_log_det = step.mixing.matrix()[1]
            log_det = log_det + x[0, 0].numel() * (step.actnorm.log_scale.sum() + weight_log_det)
        return x, log_det


class NormflowsChain(nn.Module):
    def __init__(self, count: int, coupling: str) -> None:
        super().__init__()
        import normflows

        self.blocks = nn.ModuleList(
            normflows.flows.GlowBlock(CHANNELS, HIDDEN, scale=coupling == "affine", net_actnorm=True)
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, log_det = block.inverse(x)  # from data to latents in normflows
            total = total + log_det
        return x, total


def models(count: int, coupling: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    steps = nn.Sequential(*(FlowStep(CHANNELS, HIDDEN, coupling=coupling) for _ in range(count)))
    ReversibleSequential(steps, "store")(torch.randn(BATCH, CHANNELS, SIZE, SIZE))
    result: dict[str, nn.Module] = {
        "store": ReversibleSequential(steps, "store"),
        "anchor 4": ReversibleSequential(steps),
        "anchor 4, 8 micro-batches": ReversibleSequential(steps, micro_batches=8),
        "invert": ReversibleSequential(steps, "invert"),
        "checkpoint": ReversibleSequential(steps, "checkpoint"),
        "torch.utils.checkpoint per step": Checkpointed(steps),
        "normflows": NormflowsChain(count, coupling),
    }
    if coupling == "additive":
        result["memcnn"] = MemcnnChain(steps)
    return result


def step(model: nn.Module, x: Tensor) -> None:
    # memcnn frees its input's storage, and computes no gradients unless the input requires one.
    z, log_det = model(x.clone().requires_grad_())
    (0.5 * z.square().flatten(1).sum(1) - log_det).mean().backward()


def peak(model: nn.Module, x: Tensor) -> int:
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    with ResizableStorages([model]) as storages:
        step(model, x)
    for handle in handles:
        handle.remove()
    return storages.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="?", type=int, default=8)
    parser.add_argument("coupling", nargs="?", choices=("affine", "additive"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count = arguments.steps
    torch.set_num_threads(1)
    gk.tune_allocator()
    couplings = [arguments.coupling] if arguments.coupling else ["affine", "additive"]
    rows = [row for row in json.loads(RESULTS.read_text()) if row["coupling"] not in couplings]
    for coupling in couplings:
        x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
        contenders = models(count, coupling)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for model in contenders.values():
            step(model, x)
        gc.collect()
        gc.disable()  # as in timeit
        for name, model in [*contenders.items()] * REPEATS:
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            step(model, x)
            times[name].append(time.perf_counter() - started)
        gc.enable()
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"{coupling}, {count} steps, {HIDDEN} hidden channels, {BATCH} x {CHANNELS} x {SIZE} x {SIZE}")
        for name, model in contenders.items():
            model.zero_grad(set_to_none=True)
            row = {"coupling": coupling, "name": name, "peak": peak(model, x), "time": medians[name] / medians["store"]}
            rows.append(row)
            print(f"  {name:32} {row['peak'] / 2**20:8.1f} MiB  {row['time']:.2f} x store", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
