"""A small Glow with the conventions of pclucas14/pytorch-glow, written from them for the tests.

Layers have ``forward_(x, objective)`` and ``reverse_``. The original couplings overwrite views of their input, which
PyTorch no longer differentiates: ``in_place`` keeps that; without it they are as users had to rewrite them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, num_features, logscale_factor=1.0):
        super().__init__()
        self.initialized = False
        self.logscale_factor = logscale_factor
        self.b = nn.Parameter(torch.zeros(1, num_features, 1))
        self.logs = nn.Parameter(torch.zeros(1, num_features, 1))

    def forward_(self, x, objective):
        flat = x.flatten(2)
        if not self.initialized:
            self.initialized = True
            mean = flat.mean((0, 2)).detach()
            variance = (flat - mean[:, None]).square().mean((0, 2)).detach()
            self.b.data.copy_(-mean[:, None])
            self.logs.data.copy_((-(variance.sqrt() + 1e-6).log() / self.logscale_factor)[:, None])
        logs = self.logs * self.logscale_factor
        return ((flat + self.b) * logs.exp()).view(x.shape), objective + logs.sum() * flat.shape[2]

    def reverse_(self, y, objective):
        assert self.initialized
        flat, logs = y.flatten(2), self.logs * self.logscale_factor
        return (flat * torch.exp(-logs) - self.b).view(y.shape), objective - logs.sum() * flat.shape[2]


class Invertible1x1Conv(nn.Conv2d):
    def __init__(self, num_channels):
        super().__init__(num_channels, num_channels, 1, bias=False)
        self.weight.data.copy_(torch.linalg.qr(torch.randn(num_channels, num_channels)).Q[:, :, None, None])

    def change(self, x):
        return torch.det(self.weight.squeeze()).abs().log() * x.shape[2] * x.shape[3]

    def forward_(self, x, objective):
        objective += self.change(x)
        return F.conv2d(x, self.weight), objective

    def reverse_(self, y, objective):
        objective -= self.change(y)
        return F.conv2d(y, self.weight.squeeze().inverse()[:, :, None, None]), objective


class Shuffle(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.register_buffer("indices", torch.randperm(num_channels))
        self.register_buffer("rev_indices", self.indices.argsort())

    def forward_(self, x, objective):
        return x[:, self.indices], objective

    def reverse_(self, y, objective):
        return y[:, self.rev_indices], objective


class Conv2dActNorm(nn.Module):
    def __init__(self, channels_in, channels_out, filter_size):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, filter_size, padding=filter_size // 2, bias=False)
        nn.init.normal_(self.conv.weight, 0, 0.05)
        self.actnorm = ActNorm(channels_out)

    def forward(self, x):
        return self.actnorm.forward_(self.conv(x), -1)[0]


class Conv2dZeroInit(nn.Conv2d):
    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.logs = nn.Parameter(torch.zeros(channels_out, 1, 1))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(x) * torch.exp(self.logs * 3.0)


class Network(nn.Sequential):
    def __init__(self, channels_in, hidden, channels_out):
        first, second = Conv2dActNorm(channels_in, hidden, 3), Conv2dActNorm(hidden, hidden, 1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), Conv2dZeroInit(hidden, channels_out))


class AffineCoupling(nn.Module):
    def __init__(self, num_features, hidden, additive=False, in_place=False):
        super().__init__()
        self.additive, self.in_place = additive, in_place
        self.NN = Network(num_features // 2, hidden, num_features // 2 if additive else num_features)

    def predict(self, z1):
        h = self.NN(z1)
        if self.additive:
            return h, torch.ones_like(h)
        return h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)

    def forward_(self, x, objective):
        z1, z2 = torch.chunk(x, 2, dim=1)
        shift, scale = self.predict(z1)
        if self.in_place:
            z2 += shift
            z2 *= scale
        else:
            z2 = (z2 + shift) * scale
        if not self.additive:
            objective += scale.log().flatten(1).sum(1)
        return torch.cat([z1, z2], dim=1), objective

    def reverse_(self, y, objective):
        z1, z2 = torch.chunk(y, 2, dim=1)
        shift, scale = self.predict(z1)
        if not self.additive:
            objective -= scale.log().flatten(1).sum(1)
        return torch.cat([z1, z2 / scale - shift], dim=1), objective


class Squeeze(nn.Module):
    def forward_(self, x, objective):
        return F.pixel_unshuffle(x, 2), objective

    def reverse_(self, y, objective):
        return F.pixel_shuffle(y, 2), objective


class Split(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_zero = Conv2dZeroInit(channels // 2, channels)

    def forward_(self, x, objective):
        z1, z2 = torch.chunk(x, 2, dim=1)
        h = self.conv_zero(z1)
        mean, logs = h[:, 0::2], h[:, 1::2]
        log_p = -0.5 * (2 * logs + (z2 - mean).square() / torch.exp(2 * logs) + math.log(2 * math.pi))
        objective += log_p.flatten(1).sum(1)
        return z1, objective

    def reverse_(self, y, objective):
        h = self.conv_zero(y)
        mean, logs = h[:, 0::2], h[:, 1::2]
        return torch.cat([y, mean + logs.exp() * torch.randn_like(mean)], dim=1), objective


class Glow(nn.Module):
    """A flat list of layers."""

    def __init__(self, channels=3, hidden=8, depth=2, n_levels=2, additive=False, permutation="conv"):
        super().__init__()
        layers = []
        for level in range(n_levels):
            channels *= 4
            layers.append(Squeeze())
            for _ in range(depth):
                mixing = Invertible1x1Conv(channels) if permutation == "conv" else Shuffle(channels)
                layers += [ActNorm(channels), mixing, AffineCoupling(channels, hidden, additive)]
            if level < n_levels - 1:
                layers.append(Split(channels))
                channels //= 2
        self.layers = nn.ModuleList(layers)

    def forward(self, x, objective):
        for layer in self.layers:
            x, objective = layer.forward_(x, objective)
        return x, objective


def loss(model, x):
    """Negative log-likelihood in nats, with a standard normal at the top."""
    z, objective = model(x, torch.zeros(x.shape[0], dtype=x.dtype))
    return (0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) - objective).mean()
