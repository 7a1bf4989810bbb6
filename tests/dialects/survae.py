"""Layers with the conventions of didriknielsen/survae_flows, written from them for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ActNormBijection2d(nn.Module):
    def __init__(self, num_features, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.register_buffer("initialized", torch.zeros(1))
        self.shift = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    @torch.no_grad()
    def data_init(self, x):
        flat = x.transpose(0, 1).flatten(1)
        self.shift.copy_(flat.mean(1).view_as(self.shift))
        self.log_scale.copy_((flat.std(1).view_as(self.shift) + self.eps).log())
        self.initialized += 1.0

    def forward(self, x):
        if self.training and not self.initialized:
            self.data_init(x)
        z = (x - self.shift) * torch.exp(-self.log_scale)
        return z, (-self.log_scale.sum() * x.shape[2] * x.shape[3]).expand([x.shape[0]])

    def inverse(self, z):
        return self.shift + z * torch.exp(self.log_scale)


class Conv1x1(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(num_channels, num_channels)))

    def forward(self, x):
        log_det = torch.slogdet(self.weight.cpu())[1].to(x) * x.shape[2] * x.shape[3]
        return F.conv2d(x, self.weight[:, :, None, None]), log_det.expand([x.shape[0]])

    def inverse(self, z):
        return F.conv2d(z, torch.inverse(self.weight)[:, :, None, None])


class ElementwiseParams(nn.Module):
    """Pairs of numbers per element, from alternating or adjacent parts of the channels."""

    def __init__(self, num_params, mode="interleaved"):
        super().__init__()
        self.num_params, self.mode = num_params, mode

    def forward(self, x):
        channels = x.shape[1] // self.num_params
        if self.mode == "interleaved":
            return x.reshape(x.shape[0], self.num_params, channels, *x.shape[2:]).movedim(1, -1)
        return x.reshape(x.shape[0], channels, self.num_params, *x.shape[2:]).movedim(2, -1)


class AffineCouplingBijection(nn.Module):
    def __init__(self, coupling_net, scale_fn=torch.exp):
        super().__init__()
        self.coupling_net = coupling_net
        self.scale_fn = scale_fn

    def _params(self, x1):
        params = self.coupling_net(x1)
        return self.scale_fn(params[..., 0]), params[..., 1]

    def forward(self, x):
        x1, x2 = torch.chunk(x, 2, dim=1)
        scale, shift = self._params(x1)
        return torch.cat([x1, scale * x2 + shift], dim=1), torch.log(scale).flatten(1).sum(1)

    @torch.no_grad()
    def inverse(self, z):
        z1, z2 = torch.chunk(z, 2, dim=1)
        scale, shift = self._params(z1)
        return torch.cat([z1, (z2 - shift) / scale], dim=1)


def bounded_exp(u):
    return torch.exp(2 * torch.tanh(u / 2))


class Flow(nn.Module):
    def __init__(self, channels=12, hidden=8):
        super().__init__()
        self.transforms = nn.ModuleList()
        for mode, scale_fn in (("interleaved", torch.exp), ("sequential", bounded_exp)):
            net = nn.Sequential(
                nn.Conv2d(channels // 2, hidden, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 3, padding=1),
                ElementwiseParams(2, mode),
            )
            layers = [ActNormBijection2d(channels), AffineCouplingBijection(net, scale_fn), Conv1x1(channels)]
            self.transforms.extend(layers)

    def forward(self, x):
        z, total = F.pixel_unshuffle(x, 2), torch.zeros(x.shape[0], dtype=x.dtype)
        for transform in self.transforms:
            z, log_det = transform(z)
            total = total + log_det
        return z, total
