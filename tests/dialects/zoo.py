"""Models of every dialect, those of normflows, nflows and FrEIA from these libraries, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
from torch import Tensor, nn

from dialects import chrischute, freia_later, openai, pclucas14, rosinality, survae


@dataclass(frozen=True)
class Example:
    """A model and its training objective.

    Attributes:
        make: builds the model.
        loss: negative log-likelihood of a batch.
        shape: of the batch.
        layers: flow layers that the report must list, all patched.
        steps: length of the training run; the first example of each dialect has the longest.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    layers: int
    steps: int = 15
    shape: tuple[int, ...] = (4, 3, 8, 8)


def small_net(channels_in: int, channels_out: int) -> nn.Module:
    """A coupling network that does not start at zero."""
    return nn.Sequential(nn.Conv2d(channels_in, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels_out, 3, padding=1))


def glow_net(channels_in: int, channels_out: int, width: int) -> list[nn.Module]:
    """The layers of Glow's network."""
    return [
        nn.Conv2d(channels_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, channels_out, 3, padding=1),
    ]


class IgnoresContext(nn.Sequential):
    """A network that nflows can call with a context."""

    def forward(self, x, context=None):
        return super().forward(x)


def normflows_glow(steps=2, levels=2, hidden=8, shape=(3, 8, 8), **options) -> nn.Module:
    """A Glow as in normflows' own example."""
    channels, height, width = shape
    flows, bases, merges = [], [], []
    for level in range(levels):
        squeezed = channels * 2 ** (levels + 1 - level)
        blocks = [normflows.flows.GlowBlock(squeezed, hidden, **options) for _ in range(steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        if level > 0:
            merges.append(normflows.flows.Merge())
        latent = squeezed if level == 0 else squeezed // 2
        side = 2 ** (levels - level)
        bases.append(normflows.distributions.DiagGaussian((latent, height // side, width // side)))
    return normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)


def nflows_glow(channels=12, number=3, width=None) -> nn.Module:
    """Steps of nflows' transforms after a squeeze."""
    transforms = nflows.transforms
    steps = []
    for index in range(number):
        mask = [0] * (channels // 2) + [1] * (channels // 2) if index else [0, 1] * (channels // 2)

        def make(inputs, outputs):
            return IgnoresContext(*(glow_net(inputs, outputs, width) if width else small_net(inputs, outputs)))

        kind = transforms.AdditiveCouplingTransform if index == 2 else transforms.AffineCouplingTransform
        steps += [
            transforms.ActNorm(channels),
            transforms.OneByOneConvolution(channels, identity_init=index > 0),
            kind(mask, make),
        ]
    return transforms.CompositeTransform([transforms.SqueezeTransform(), transforms.CompositeTransform(steps)])


def freia_glow(channels=12) -> nn.Module:
    """Every layer of FrEIA that is accelerated, after a squeeze."""
    modules = FrEIA.modules
    model = FrEIA.framework.SequenceINN(3, 8, 8)
    model.append(modules.IRevNetDownsampling)
    rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
    model.append(modules.ActNorm)
    model.append(modules.Fixed1x1Conv, M=1.1 * rotation)
    model.append(modules.AffineCouplingOneSided, subnet_constructor=small_net)
    model.append(modules.GLOWCouplingBlock, subnet_constructor=small_net, clamp=1.5, clamp_activation=torch.tanh)
    model.append(modules.AllInOneBlock, subnet_constructor=small_net, permute_soft=True)
    options = {"affine_clamping": 1.0, "global_affine_type": "EXP", "reverse_permutation": True}
    model.append(modules.AllInOneBlock, subnet_constructor=small_net, **options)
    return model


def freia_steps(channels=12, number=8, width=64, size=32) -> nn.Module:
    """Steps of Glow as FrEIA builds them, after a squeeze."""
    modules = FrEIA.modules
    model = FrEIA.framework.SequenceINN(channels // 4, size, size)
    model.append(modules.IRevNetDownsampling)
    for _ in range(number):
        model.append(modules.ActNorm)
        model.append(modules.Fixed1x1Conv, M=torch.linalg.qr(torch.randn(channels, channels)).Q)
        net = lambda inputs, outputs: nn.Sequential(*glow_net(inputs, outputs, width))  # noqa: E731
        model.append(modules.AffineCouplingOneSided, subnet_constructor=net)
    return model


def standard_normal_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Loss of a transform that returns latents and log-determinant."""
    z, log_det = model(x)
    return (0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) - log_det).mean()


def normflows_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -model.log_prob(x, None).mean()


EXAMPLES = {
    "rosinality": Example(lambda: rosinality.Glow(3, 2, 2, filter_size=8), rosinality.loss, 28, 40),
    "rosinality_plain": Example(lambda: rosinality.Glow(3, 2, 2, filter_size=8, conv_lu=False), rosinality.loss, 28),
    "rosinality_additive": Example(
        lambda: rosinality.Glow(3, 2, 2, filter_size=8, affine=False), rosinality.loss, 28, 40
    ),
    "chaiyujin": Example(lambda: openai.Glow(3, 8, 2, 2), openai.loss, 38, 40),
    "chaiyujin_lu": Example(lambda: openai.Glow(3, 8, 2, 2, LU_decomposed=True), openai.loss, 38),
    "chaiyujin_additive": Example(
        lambda: openai.Glow(3, 8, 2, 2, coupling="additive", permutation="shuffle"), openai.loss, 34
    ),
    "y0ast": Example(lambda: openai.Glow(3, 8, 2, 2, style="y0ast"), openai.loss, 38),
    "y0ast_reverse": Example(lambda: openai.Glow(3, 8, 2, 2, style="y0ast", permutation="reverse"), openai.loss, 34),
    "pclucas14": Example(pclucas14.Glow, pclucas14.loss, 26, 40),
    "pclucas14_additive": Example(lambda: pclucas14.Glow(additive=True), pclucas14.loss, 26),
    "normflows": Example(normflows_glow, normflows_loss, 20, 40),
    "normflows_plain_exp": Example(lambda: normflows_glow(use_lu=False, scale_map="exp"), normflows_loss, 20),
    "normflows_sigmoid_inv": Example(
        lambda: normflows_glow(scale_map="sigmoid_inv", net_actnorm=True), normflows_loss, 24
    ),
    "normflows_additive": Example(lambda: normflows_glow(scale=False, split_mode="channel_inv"), normflows_loss, 20),
    "nflows": Example(nflows_glow, standard_normal_loss, 10, 40),
    "FrEIA": Example(freia_glow, standard_normal_loss, 11, 40),
    "FrEIA later": Example(lambda: freia_later.Model(12, small_net), standard_normal_loss, 9, 40),
    "chrischute": Example(chrischute.Glow, chrischute.loss, 12, 40),
    "survae": Example(survae.Flow, standard_normal_loss, 8, 40),
}
