"""The same chain of K flow steps in this package and in others, with equal architecture.

A step is ActNorm, an LU-decomposed 1x1 convolution and an affine coupling whose network is 3x3, 1x1, 3x3 convolutions
with ReLU, for data (B, C, size, size). Where a package cannot do that, ``NOTES`` says what differs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glow_kernels.nn import FlowStep
from glow_kernels.reversible import ReversibleSequential

# A chain: data to (z, log_det), and the module that owns its parameters.
Chain = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], nn.Module]

PEERS = ("normflows", "nflows", "FrEIA", "memcnn")
NOTES = {
    "FrEIA": "its 1x1 convolution is fixed, not learned",
    "memcnn": "additive couplings alone, with two networks a step; it has no log-determinant",
}


def network(inputs: int, outputs: int, hidden: int) -> nn.Module:
    """The coupling network of every chain."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    )


def available() -> list[str]:
    """Names of :data:`CHAINS` whose package is installed."""
    return [name for name in CHAINS if name not in PEERS or importlib.util.find_spec(name) is not None]


def glow_kernels_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """This package, with plain autograd."""
    module = _steps(channels, hidden, steps)
    return lambda x: _in_turn(module, x), module


def reversible_chain(memory: str, channels: int, hidden: int, steps: int, size: int) -> Chain:
    """This package, as a reversible chain with the policy ``memory``."""
    module = ReversibleSequential(_steps(channels, hidden, steps), memory=memory)
    return module, module


def checkpoint_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """This package, with every step in ``torch.utils.checkpoint``."""
    module = _steps(channels, hidden, steps)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for step in module:
            x, step_log_det = checkpoint(step, x, use_reentrant=False)
            log_det = log_det + step_log_det
        return x, log_det

    return forward, module


def normflows_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """normflows, where the density direction of a block is ``inverse``."""
    package = importlib.import_module("normflows")
    blocks = [package.flows.GlowBlock(channels, hidden, init_zeros=False) for _ in range(steps)]
    module = nn.ModuleList(blocks)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for block in blocks:
            x, block_log_det = block.inverse(x)
            log_det = log_det + block_log_det
        return x, log_det

    return forward, module


def nflows_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """nflows."""
    transforms = importlib.import_module("nflows.transforms")

    class _Network(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layers = network(inputs, outputs, hidden)

        def forward(self, inputs: Tensor, context: object = None) -> Tensor:
            output: Tensor = self.layers(inputs)
            return output

    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)
    layers = []
    for _ in range(steps):
        layers += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels)]
        layers.append(transforms.AffineCouplingTransform(mask, _Network))
    module = transforms.CompositeTransform(layers)
    return module, module


def freia_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """FrEIA, with fixed 1x1 convolutions."""
    package = importlib.import_module("FrEIA.modules")

    def build(inputs: int, outputs: int) -> nn.Module:
        return network(inputs, outputs, hidden)

    shape = [(channels, size, size)]
    layers = []
    for _ in range(steps):
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        layers += [package.ActNorm(shape), package.Fixed1x1Conv(shape, M=rotation)]
        layers.append(package.AffineCouplingOneSided(shape, subnet_constructor=build))
    module = nn.ModuleList(layers)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for layer in layers:
            (x,), layer_log_det = layer((x,))
            log_det = log_det + layer_log_det
        return x, log_det

    return forward, module


def memcnn_chain(channels: int, hidden: int, steps: int, size: int) -> Chain:
    """memcnn, reversible, without stored activations."""
    package = importlib.import_module("memcnn")
    half = channels // 2
    layers = [
        package.InvertibleModuleWrapper(
            package.AdditiveCoupling(Fm=network(half, half, hidden), Gm=network(half, half, hidden))
        )
        for _ in range(steps)
    ]
    module = nn.Sequential(*layers)
    # Its wrapper frees the storage of its input, so it gets a copy; the input must require a gradient.
    return lambda x: (module(x.clone().requires_grad_()), x.new_zeros(x.shape[0])), module


CHAINS: dict[str, Callable[[int, int, int, int], Chain]] = {
    "glow_kernels": glow_kernels_chain,
    "glow_kernels anchor": functools.partial(reversible_chain, "anchor"),
    "glow_kernels invert": functools.partial(reversible_chain, "invert"),
    "checkpoint": checkpoint_chain,
    "normflows": normflows_chain,
    "nflows": nflows_chain,
    "FrEIA": freia_chain,
    "memcnn": memcnn_chain,
}


def training_step(chain: Chain, x: Tensor) -> Callable[[], Tensor]:
    """A function that computes loss and gradients; every ActNorm is first initialised from ``x``."""
    forward, module = chain
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        z, log_det = forward(x)
        loss = (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    module.train()
    step()
    return step


def _steps(channels: int, hidden: int, steps: int) -> nn.ModuleList:
    half = channels // 2
    return nn.ModuleList(FlowStep(channels, network=network(half, 2 * (channels - half), hidden)) for _ in range(steps))


def _in_turn(module: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    log_det = x.new_zeros(x.shape[0])
    for step in module:
        x, step_log_det = step(x)
        log_det = log_det + step_log_det
    return x, log_det
