"""Layers with the conventions of NVIDIA/waveglow and jaywalnut310/glow-tts, written from them for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Invertible1x1Conv(nn.Module):
    """WaveGlow: the log-determinant of the batch; an inverse that is computed once."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv1d(c, c, kernel_size=1, bias=False)
        weight = torch.linalg.qr(torch.randn(c, c)).Q
        weight[:, 0] *= torch.det(weight).sign()
        self.conv.weight.data = weight.view(c, c, 1)

    def forward(self, z, reverse=False):
        batch_size, _, n_of_groups = z.shape
        weight = self.conv.weight.squeeze(-1)
        if reverse:
            if not hasattr(self, "W_inverse"):
                self.W_inverse = weight.inverse()[..., None]
            return F.conv1d(z, self.W_inverse)
        return self.conv(z), batch_size * n_of_groups * torch.logdet(weight)


class InvConvNear(nn.Module):
    """Glow-TTS: one small matrix for all groups of channels."""

    def __init__(self, channels, n_split=4):
        super().__init__()
        self.channels, self.n_split = channels, n_split
        weight = torch.linalg.qr(torch.randn(n_split, n_split)).Q
        weight[:, 0] *= torch.det(weight).sign()
        self.weight = nn.Parameter(weight)

    def forward(self, x, x_mask=None, reverse=False, **kwargs):
        b, c, t = x.size()
        length = torch.ones(b, dtype=x.dtype) * t if x_mask is None else x_mask.sum([1, 2])
        x_mask = 1 if x_mask is None else x_mask
        x = x.view(b, 2, c // self.n_split, self.n_split // 2, t).permute(0, 1, 3, 2, 4)
        x = x.contiguous().view(b, self.n_split, c // self.n_split, t)
        weight = self.weight.inverse() if reverse else self.weight
        logdet = None if reverse else torch.logdet(self.weight) * (c / self.n_split) * length
        z = F.conv2d(x, weight[:, :, None, None])
        z = z.view(b, 2, self.n_split // 2, c // self.n_split, t).permute(0, 1, 3, 2, 4)
        return z.contiguous().view(b, c, t) * x_mask, logdet


class WN(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layer = nn.Conv1d(hidden, hidden, 3, padding=1)

    def forward(self, x, x_mask=None, g=None):
        return torch.tanh(self.layer(x)) * x_mask


class CouplingBlock(nn.Module):
    """Glow-TTS."""

    def __init__(self, in_channels, hidden, sigmoid_scale=False):
        super().__init__()
        self.sigmoid_scale = sigmoid_scale
        self.start = nn.Conv1d(in_channels // 2, hidden, 1)
        self.wn = WN(hidden)
        self.end = nn.Conv1d(hidden, in_channels, 1)

    def forward(self, x, x_mask=None, reverse=False, g=None, **kwargs):
        x_mask = 1 if x_mask is None else x_mask
        x_0, x_1 = x.chunk(2, 1)
        out = self.end(self.wn(self.start(x_0) * x_mask, x_mask, g))
        m, logs = out.chunk(2, 1)
        if self.sigmoid_scale:
            logs = torch.log(1e-6 + torch.sigmoid(logs + 2))
        if reverse:
            return torch.cat([x_0, (x_1 - m) * torch.exp(-logs) * x_mask], 1), None
        z_1 = (m + torch.exp(logs) * x_1) * x_mask
        return torch.cat([x_0, z_1], 1), torch.sum(logs * x_mask, [1, 2])
