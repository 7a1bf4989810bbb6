"""A small Glow with the conventions of openai/glow, written from them for the tests, in PyTorch.

Its ``state_dict`` has the names and shapes of the original's TensorFlow variables. Internally, data are (B, H, W, C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def gaussian(z, mean, logs):
    return (-0.5 * math.log(2 * math.pi) - logs - 0.5 * (z - mean) ** 2 * torch.exp(-2 * logs)).sum((1, 2, 3))


def squeeze(x):
    return F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class Glow(nn.Module):
    def __init__(self, channels, steps, levels, width):
        super().__init__()
        self.steps, self.levels = steps, levels
        for level in range(levels):
            channels *= 4
            for step in range(steps):
                name = f"model/{level}/{step}"
                self.actnorm_variables(f"{name}/actnorm", channels)
                self.variable(f"{name}/invconv/W", torch.linalg.qr(torch.randn(channels, channels)).Q)
                self.variable(f"{name}/f1/l_1/W", torch.randn(3, 3, channels // 2 + 1, width))
                self.variable(f"{name}/f1/l_2/W", torch.randn(1, 1, width, width))
                for layer in ("l_1", "l_2"):
                    self.actnorm_variables(f"{name}/f1/{layer}/actnorm", width)
                self.zeros_variables(f"{name}/f1/l_last", width, channels)
            if level < levels - 1:
                channels //= 2
                self.zeros_variables(f"model/pool{level}/conv", channels, 2 * channels)
        self.zeros_variables("model/prior/p", 2 * channels, 2 * channels)

    def variable(self, name, value):
        self.register_parameter(name, nn.Parameter(value))

    def actnorm_variables(self, name, channels):
        self.variable(f"{name}_center/b", torch.zeros(1, 1, 1, channels))
        self.variable(f"{name}_scale/logs", torch.zeros(1, 1, 1, channels))

    def zeros_variables(self, name, inputs, outputs):
        self.variable(f"{name}/W", torch.zeros(3, 3, inputs + 1, outputs))
        self.variable(f"{name}/b", torch.zeros(1, 1, 1, outputs))
        self.variable(f"{name}/logs", torch.zeros(1, outputs))

    def get(self, name):
        return getattr(self, name)

    def conv(self, name, x):
        kernel = self.get(f"{name}/W")
        x = x.permute(0, 3, 1, 2)
        if kernel.shape[0] == 3:
            border = F.pad(torch.zeros_like(x[:, :1]), [1] * 4, value=1.0)
            x = torch.cat((F.pad(x, [1] * 4), border), 1)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)

    def conv_zeros(self, name, x):
        return (self.conv(name, x) + self.get(f"{name}/b")) * torch.exp(3 * self.get(f"{name}/logs"))

    def actnorm(self, name, x):
        logs = 3 * self.get(f"{name}_scale/logs")
        return (x + self.get(f"{name}_center/b")) * torch.exp(logs), logs.sum() * x.shape[1] * x.shape[2]

    def f(self, name, x):
        for layer in ("l_1", "l_2"):
            x = torch.relu(self.actnorm(f"{name}/{layer}/actnorm", self.conv(f"{name}/{layer}", x))[0])
        return self.conv_zeros(f"{name}/l_last", x)

    def step(self, name, z):
        z, objective = self.actnorm(f"{name}/actnorm", z)
        weight = self.get(f"{name}/invconv/W")
        z = z @ weight
        objective = objective + torch.linalg.slogdet(weight)[1] * z.shape[1] * z.shape[2]
        z1, z2 = z.chunk(2, -1)
        h = self.f(f"{name}/f1", z1)
        scale = torch.sigmoid(h[..., 1::2] + 2)
        return torch.cat((z1, (z2 + h[..., 0::2]) * scale), -1), objective + scale.log().sum((1, 2, 3))

    def log_prob(self, x):
        """Log-density (B,) of ``x`` (B, C, H, W)."""
        z, objective = squeeze(x.permute(0, 2, 3, 1)), 0
        for level in range(self.levels):
            for number in range(self.steps):
                z, log_det = self.step(f"model/{level}/{number}", z)
                objective = objective + log_det
            if level < self.levels - 1:
                z, dropped = z.chunk(2, -1)
                h = self.conv_zeros(f"model/pool{level}/conv", z)
                objective = objective + gaussian(dropped, h[..., 0::2], h[..., 1::2])
                z = squeeze(z)
        mean, logs = self.conv_zeros("model/prior/p", torch.zeros_like(torch.cat((z, z), -1))).chunk(2, -1)
        return objective + gaussian(z, mean, logs)
