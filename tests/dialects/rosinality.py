"""A small Glow with the conventions of rosinality/glow-pytorch: names, shapes, signatures, scale, layout, orders.

Written from those conventions for the tests; options that copies of that code change are arguments.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_abs(x: Tensor) -> Tensor:
    return torch.log(torch.abs(x))


class ActNorm(nn.Module):
    def __init__(self, in_channel, logdet=True):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, in_channel, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, in_channel, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = logdet

    @torch.no_grad()
    def initialize(self, x):
        flat = x.transpose(0, 1).flatten(1)
        self.loc.copy_(-flat.mean(1).view_as(self.loc))
        self.scale.copy_(1 / (flat.std(1).view_as(self.scale) + 1e-6))

    def forward(self, x):
        if self.initialized.item() == 0:
            self.initialize(x)
            self.initialized.fill_(1)
        y = self.scale * (x + self.loc)
        if not self.logdet:
            return y
        return y, x.shape[2] * x.shape[3] * log_abs(self.scale).sum()

    def reverse(self, y):
        return y / self.scale - self.loc


class InvConv2d(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(in_channel, in_channel)).Q
        self.weight = nn.Parameter(rotation[:, :, None, None].contiguous())

    def forward(self, x):
        y = F.conv2d(x, self.weight)
        log_det = x.shape[2] * x.shape[3] * torch.slogdet(self.weight[:, :, 0, 0].double())[1].float()
        return y, log_det

    def reverse(self, y):
        return F.conv2d(y, self.weight[:, :, 0, 0].inverse()[:, :, None, None])


class InvConv2dLU(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(in_channel, in_channel)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal().clone()
        ones = torch.ones(in_channel, in_channel)
        self.register_buffer("w_p", permutation)
        self.register_buffer("u_mask", ones.triu(1))
        self.register_buffer("l_mask", ones.tril(-1))
        self.register_buffer("s_sign", diagonal.sign())
        self.register_buffer("l_eye", torch.eye(in_channel))
        self.w_l = nn.Parameter(lower)
        self.w_s = nn.Parameter(log_abs(diagonal))
        self.w_u = nn.Parameter(upper.triu(1))

    def calc_weight(self):
        upper = self.w_u * self.u_mask + torch.diag(self.s_sign * torch.exp(self.w_s))
        weight = self.w_p @ (self.w_l * self.l_mask + self.l_eye) @ upper
        return weight[:, :, None, None]

    def forward(self, x):
        return F.conv2d(x, self.calc_weight()), x.shape[2] * x.shape[3] * sum(self.w_s)

    def reverse(self, y):
        return F.conv2d(y, self.calc_weight()[:, :, 0, 0].inverse()[:, :, None, None])


class ZeroConv2d(nn.Module):
    def __init__(self, in_channel, out_channel):
        super().__init__()
        self.conv = nn.Conv2d(in_channel, out_channel, 3, padding=0)
        self.scale = nn.Parameter(torch.zeros(1, out_channel, 1, 1))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        out = self.conv(F.pad(x, [1, 1, 1, 1], value=1))
        return out * torch.exp(self.scale * 3)


class AffineCoupling(nn.Module):
    def __init__(self, in_channel, filter_size=512, affine=True):
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(
            nn.Conv2d(in_channel // 2, filter_size, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(filter_size, filter_size, 1),
            nn.ReLU(inplace=True),
            ZeroConv2d(filter_size, in_channel if affine else in_channel // 2),
        )
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, 0, 0.05)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        first, second = x.chunk(2, 1)
        if not self.affine:
            return torch.cat([first, second + self.net(first)], 1), None
        u, t = self.net(first).chunk(2, 1)
        s = torch.sigmoid(u + 2)
        return torch.cat([first, (second + t) * s], 1), torch.log(s).view(len(x), -1).sum(1)

    def reverse(self, y):
        first, second = y.chunk(2, 1)
        if not self.affine:
            return torch.cat([first, second - self.net(first)], 1)
        u, t = self.net(first).chunk(2, 1)
        return torch.cat([first, second / torch.sigmoid(u + 2) - t], 1)


class Flow(nn.Module):
    def __init__(self, in_channel, affine=True, conv_lu=True, filter_size=512):
        super().__init__()
        self.actnorm = ActNorm(in_channel)
        self.invconv = InvConv2dLU(in_channel) if conv_lu else InvConv2d(in_channel)
        self.coupling = AffineCoupling(in_channel, filter_size, affine)

    def forward(self, x):
        out, log_det = self.actnorm(x)
        out, conv_log_det = self.invconv(out)
        out, coupling_log_det = self.coupling(out)
        log_det = log_det + conv_log_det
        if coupling_log_det is not None:
            log_det = log_det + coupling_log_det
        return out, log_det

    def reverse(self, y):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(y)))


def gaussian_log_p(x, mean, log_sd):
    return -0.5 * math.log(2 * math.pi) - log_sd - 0.5 * (x - mean) ** 2 / torch.exp(2 * log_sd)


def gaussian_sample(eps, mean, log_sd):
    return mean + torch.exp(log_sd) * eps


class Block(nn.Module):
    def __init__(self, in_channel, n_flow, split=True, affine=True, conv_lu=True, filter_size=512):
        super().__init__()
        squeezed = in_channel * 4
        self.flows = nn.ModuleList(Flow(squeezed, affine, conv_lu, filter_size) for _ in range(n_flow))
        self.split = split
        self.prior = ZeroConv2d(in_channel * 2, in_channel * 4) if split else ZeroConv2d(squeezed, squeezed * 2)

    def forward(self, x):
        out = F.pixel_unshuffle(x, 2)
        log_det = 0
        for flow in self.flows:
            out, flow_log_det = flow(out)
            log_det = log_det + flow_log_det
        if self.split:
            out, z_new = out.chunk(2, 1)
            mean, log_sd = self.prior(out).chunk(2, 1)
        else:
            mean, log_sd = self.prior(torch.zeros_like(out)).chunk(2, 1)
            z_new = out
        log_p = gaussian_log_p(z_new, mean, log_sd).view(len(x), -1).sum(1)
        return out, log_det, log_p, z_new

    def reverse(self, output, eps=None, reconstruct=False):
        x = output
        if reconstruct:
            x = torch.cat([output, eps], 1) if self.split else eps
        elif self.split:
            mean, log_sd = self.prior(x).chunk(2, 1)
            x = torch.cat([output, gaussian_sample(eps, mean, log_sd)], 1)
        else:
            mean, log_sd = self.prior(torch.zeros_like(x)).chunk(2, 1)
            x = gaussian_sample(eps, mean, log_sd)
        for flow in self.flows[::-1]:
            x = flow.reverse(x)
        return F.pixel_shuffle(x, 2)


class Glow(nn.Module):
    def __init__(self, in_channel, n_flow, n_block, affine=True, conv_lu=True, filter_size=512):
        super().__init__()
        self.blocks = nn.ModuleList()
        for index in range(n_block):
            last = index == n_block - 1
            self.blocks.append(Block(in_channel, n_flow, not last, affine, conv_lu or last, filter_size))
            in_channel *= 2

    def forward(self, x):
        log_p_sum, log_det, z_outs = 0, 0, []
        for block in self.blocks:
            x, block_log_det, log_p, z_new = block(x)
            z_outs.append(z_new)
            log_det = log_det + block_log_det
            log_p_sum = log_p_sum + log_p
        return log_p_sum, log_det, z_outs

    def reverse(self, z_list, reconstruct=False):
        x = None
        for index, block in enumerate(self.blocks[::-1]):
            z = z_list[-(index + 1)]
            x = block.reverse(z if index == 0 else x, z, reconstruct=reconstruct)
        return x


def loss(model, x):
    """Negative log-likelihood in nats, as in the training script."""
    log_p, log_det, _ = model(x)
    return -(log_det + log_p).mean()
