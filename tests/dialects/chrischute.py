"""Steps with the conventions of chrischute/glow, written from them for the tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.register_buffer("is_initialized", torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    @torch.no_grad()
    def initialize_parameters(self, x):
        if not self.training:
            return
        bias = -x.mean(dim=[0, 2, 3], keepdim=True)
        var = (x + bias).square().mean(dim=[0, 2, 3], keepdim=True)
        self.bias.copy_(bias)
        self.logs.copy_(-(var.sqrt() + 1e-6).log())
        self.is_initialized += 1.0

    def forward(self, x, ldj=None, reverse=False):
        if not self.is_initialized:
            self.initialize_parameters(x)
        change = self.logs.sum() * x.shape[2] * x.shape[3]
        if reverse:
            return x * torch.exp(-self.logs) - self.bias, ldj if ldj is None else ldj - change
        return (x + self.bias) * torch.exp(self.logs), ldj if ldj is None else ldj + change


class InvConv(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(num_channels, num_channels)).Q.contiguous())

    def forward(self, x, sldj, reverse=False):
        change = torch.slogdet(self.weight)[1] * x.shape[2] * x.shape[3]
        if reverse:
            weight, sldj = self.weight.double().inverse().to(x.dtype), sldj - change
        else:
            weight, sldj = self.weight, sldj + change
        return F.conv2d(x, weight[:, :, None, None]), sldj


class NN(nn.Module):
    def __init__(self, in_channels, mid_channels, out_channels):
        super().__init__()
        self.in_norm = nn.BatchNorm2d(in_channels)
        self.in_conv = nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=False)
        self.out_norm = nn.BatchNorm2d(mid_channels)
        self.out_conv = nn.Conv2d(mid_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)

    def forward(self, x):
        x = self.in_conv(F.relu(self.in_norm(x)))
        return self.out_conv(F.relu(self.out_norm(x)))


class Coupling(nn.Module):
    def __init__(self, in_channels, mid_channels):
        super().__init__()
        self.nn = NN(in_channels, mid_channels, 2 * in_channels)
        self.scale = nn.Parameter(torch.ones(in_channels, 1, 1))

    def forward(self, x, ldj, reverse=False):
        x_change, x_id = x.chunk(2, dim=1)
        st = self.nn(x_id)
        s, t = st[:, 0::2], st[:, 1::2]
        s = self.scale * torch.tanh(s)
        if reverse:
            x_change = x_change * torch.exp(-s) - t
            ldj = ldj - s.flatten(1).sum(-1)
        else:
            x_change = (x_change + t) * torch.exp(s)
            ldj = ldj + s.flatten(1).sum(-1)
        return torch.cat((x_change, x_id), dim=1), ldj


class FlowStep(nn.Module):
    def __init__(self, in_channels, mid_channels):
        super().__init__()
        self.norm = ActNorm(in_channels)
        self.conv = InvConv(in_channels)
        self.coup = Coupling(in_channels // 2, mid_channels)

    def forward(self, x, sldj=None, reverse=False):
        layers = [self.norm, self.conv, self.coup]
        for layer in layers[::-1] if reverse else layers:
            x, sldj = layer(x, sldj, reverse)
        return x, sldj


class Glow(nn.Module):
    def __init__(self, channels=12, mid_channels=8, num_steps=3):
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(channels, mid_channels) for _ in range(num_steps))

    def forward(self, x):
        z, sldj = F.pixel_unshuffle(x, 2), torch.zeros(x.shape[0], dtype=x.dtype)
        for step in self.steps:
            z, sldj = step(z, sldj)
        return z, sldj


def loss(model, x):
    """Negative log-likelihood in nats."""
    z, sldj = model(x)
    return (0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) - sldj).mean()
