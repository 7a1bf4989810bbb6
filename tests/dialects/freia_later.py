"""Layers with the conventions of vislearn/FrEIA after its release 0.2, written from them for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, dims_in):
        super().__init__()
        self.dims_in, self.dims_c = dims_in, []
        channels = dims_in[0][0]
        self.register_buffer("is_initialized", torch.tensor(False))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x_or_z, c=None, rev=False, jac=True):
        x = x_or_z[0]
        if not self.is_initialized:
            flat = x.detach().transpose(0, 1).flatten(1)
            sign = -1 if rev else 1
            self.loc.data = (flat.mean(1) * (1 if not rev else 0)).view_as(self.loc)
            self.log_scale.data = sign * flat.std(1).log().view_as(self.loc)
            self.is_initialized.fill_(True)
        jacobian = x.shape[2:].numel() * self.log_scale.sum().view(1)
        if rev:
            return (x * self.log_scale.exp() + self.loc,), jacobian
        return ((x - self.loc) / self.log_scale.exp(),), -jacobian


class Fixed1x1Conv(nn.Module):
    """Multiplies row vectors by the given matrix."""

    def __init__(self, dims_in, M):
        super().__init__()
        self.dims_in, self.dims_c = dims_in, []
        self.M = nn.Parameter(M.t()[:, :, None, None], requires_grad=False)
        self.M_inv = nn.Parameter(M.t().inverse()[:, :, None, None], requires_grad=False)
        self.logDetM = nn.Parameter(torch.slogdet(M)[1], requires_grad=False)

    def forward(self, x, rev=False, jac=True):
        jacobian = self.logDetM * x[0][0, 0].numel()
        if rev:
            return (F.conv2d(x[0], self.M_inv),), -jacobian
        return (F.conv2d(x[0], self.M),), jacobian


class AffineCouplingOneSided(nn.Module):
    """The first part stays unchanged; the clamp is a separate function."""

    def __init__(self, dims_in, subnet_constructor, clamp=2.0, clamp_activation=torch.tanh):
        super().__init__()
        self.dims_in, self.dims_c, self.clamp, self.f_clamp = dims_in, [], clamp, clamp_activation
        channels = dims_in[0][0]
        self.split_len1, self.split_len2 = channels - channels // 2, channels // 2
        self.subnet = subnet_constructor(self.split_len1, 2 * self.split_len2)

    def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
        x1, x2 = x[0].split([self.split_len1, self.split_len2], 1)
        s, t = self.subnet(x1).chunk(2, 1)
        log_s = self.clamp * self.f_clamp(s)
        y2 = (x2 - t) * torch.exp(-log_s) if rev else x2 * torch.exp(log_s) + t
        jacobian = log_s.flatten(1).sum(1)
        return (torch.cat((x1, y2), 1),), -jacobian if rev else jacobian


class GLOWCouplingBlock(nn.Module):
    """One half and then the other, each with a clamped scale."""

    def __init__(self, dims_in, subnet_constructor, clamp=2.0):
        super().__init__()
        self.dims_in, self.dims_c, self.clamp = dims_in, [], clamp
        channels = dims_in[0][0]
        self.split_len1, self.split_len2 = channels - channels // 2, channels // 2
        self.subnet1 = subnet_constructor(self.split_len1, 2 * self.split_len2)
        self.subnet2 = subnet_constructor(self.split_len2, 2 * self.split_len1)

    def affine(self, x, a, rev):
        s, t = a.chunk(2, 1)
        log_s = self.clamp * 0.636 * torch.atan(s)
        y = (x - t) * torch.exp(-log_s) if rev else torch.exp(log_s) * x + t
        return y, (-log_s if rev else log_s).flatten(1).sum(1)

    def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
        x1, x2 = x[0].split([self.split_len1, self.split_len2], 1)
        if rev:
            x2, j2 = self.affine(x2, self.subnet1(x1), rev)
            x1, j1 = self.affine(x1, self.subnet2(x2), rev)
        else:
            x1, j1 = self.affine(x1, self.subnet2(x2), rev)
            x2, j2 = self.affine(x2, self.subnet1(x1), rev)
        return (torch.cat((x1, x2), 1),), j1 + j2


class AllInOneBlock(nn.Module):
    """Its permutation is stored as an index, and its clamp is inside the tanh too."""

    def __init__(self, dims_in, subnet_constructor, clamp=2.0):
        super().__init__()
        self.dims_in, self.dims_c, self.clamp, self.GIN = dims_in, [], clamp, False
        self.reverse_pre_permute = False
        channels = dims_in[0][0]
        self.splits = [channels - channels // 2, channels // 2]
        self.global_scale = nn.Parameter(torch.full((1, channels, 1, 1), 5.0))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.w_perm = nn.Parameter(torch.randperm(channels), requires_grad=False)
        self.w_perm_inv = nn.Parameter(self.w_perm.argsort(), requires_grad=False)
        self.subnet = subnet_constructor(self.splits[0], 2 * self.splits[1])

    def global_scale_activation(self, a):
        return 0.1 * F.softplus(a, beta=0.5) * 2

    def _permute(self, x, rev=False):
        scale = self.global_scale_activation(self.global_scale)
        jacobian = scale.log().sum() * x.shape[2:].numel()
        if rev:
            return (x[:, self.w_perm_inv] - self.global_offset) / scale, -jacobian
        return (x * scale + self.global_offset)[:, self.w_perm], jacobian

    def _affine(self, x, a, rev):
        s, t = (0.1 * a).chunk(2, 1)
        log_s = self.clamp * torch.tanh(s / self.clamp)
        y = (x - t) * torch.exp(-log_s) if rev else x * torch.exp(log_s) + t
        return y, (-log_s if rev else log_s).flatten(1).sum(1)

    def forward(self, x, c=[], rev=False, jac=True):  # noqa: B006
        data, jacobian = self._permute(x[0], rev=True) if rev else (x[0], 0.0)
        x1, x2 = data.split(self.splits, 1)
        x2, change = self._affine(x2, self.subnet(x1), rev)
        data = torch.cat((x1, x2), 1)
        if not rev:
            data, jacobian = self._permute(data)
        return (data,), change + jacobian


class Model(nn.Module):
    def __init__(self, channels, make_net):
        super().__init__()
        dims = [(channels, 4, 4)]
        layers = [
            ActNorm(dims),
            Fixed1x1Conv(dims, 1.1 * torch.linalg.qr(torch.randn(channels, channels)).Q),
            AffineCouplingOneSided(dims, make_net),
            GLOWCouplingBlock(dims, make_net),
            AllInOneBlock(dims, make_net),
        ]
        self.module_list = nn.ModuleList(layers)

    def forward(self, x):
        data, total = (F.pixel_unshuffle(x, 2),), 0.0
        for layer in self.module_list:
            data, jacobian = layer(data)
            total = total + jacobian
        return data[0], total
