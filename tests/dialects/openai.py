"""A small Glow with the conventions of chaiyujin/glow-pytorch, y0ast/Glow-PyTorch and other ports of OpenAI's code.

Written from those conventions for the tests. ``style`` chooses between the first two, which differ in the structure of
their convolutions, the names of the network and of the triangular factors, and how a step finds its permutation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm2d(nn.Module):
    def __init__(self, num_features, scale=1.0, strict=False):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.num_features = num_features
        self.scale = float(scale)
        self.strict = strict
        self.inited = False

    @torch.no_grad()
    def initialize_parameters(self, x):
        if not self.training:
            if self.strict:
                raise ValueError("In Eval mode, but ActNorm not inited")
            return
        bias = -x.mean(dim=[0, 2, 3], keepdim=True)
        var = ((x + bias) ** 2).mean(dim=[0, 2, 3], keepdim=True)
        self.bias.data.copy_(bias.data)
        self.logs.data.copy_(torch.log(self.scale / (torch.sqrt(var) + 1e-6)).data)
        self.inited = True

    def forward(self, x, logdet=None, reverse=False):
        assert x.shape[1:-2] == (self.num_features,), f"expected {self.num_features} channels"
        if not self.inited:
            self.initialize_parameters(x)
        y = x * torch.exp(-self.logs) - self.bias if reverse else (x + self.bias) * torch.exp(self.logs)
        if logdet is not None:
            change = self.logs.sum() * x.shape[2] * x.shape[3]
            logdet = logdet - change if reverse else logdet + change
        return y, logdet


class Conv2d(nn.Conv2d):
    """chaiyujin: the convolution is the layer, with ActNorm inside."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.weight.data.normal_(mean=0.0, std=0.05)
        self.actnorm = ActNorm2d(out_channels)

    def forward(self, x):
        return self.actnorm(super().forward(x))[0]


class Conv2dZeros(nn.Conv2d):
    """chaiyujin."""

    def __init__(self, in_channels, out_channels, logscale_factor=3.0):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.logscale_factor = logscale_factor
        self.logs = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.weight.data.zero_()
        self.bias.data.zero_()

    def forward(self, x):
        return super().forward(x) * torch.exp(self.logs * self.logscale_factor)


class InnerConv2d(nn.Module):
    """y0ast: the layer holds a convolution and ActNorm."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv.weight.data.normal_(mean=0.0, std=0.05)
        self.actnorm = ActNorm2d(out_channels, strict=True)
        self.do_actnorm = True

    def forward(self, x):
        out = self.conv(x)
        if self.do_actnorm:
            out, _ = self.actnorm(out)
        return out


class InnerConv2dZeros(nn.Module):
    """y0ast."""

    def __init__(self, in_channels, out_channels, logscale_factor=3.0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.logscale_factor = logscale_factor
        self.logs = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.conv.weight.data.zero_()
        self.conv.bias.data.zero_()

    def forward(self, x):
        return self.conv(x) * torch.exp(self.logs * self.logscale_factor)


class InvertibleConv1x1(nn.Module):
    def __init__(self, num_channels, LU_decomposed=False, style="chaiyujin"):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(num_channels, num_channels)).Q
        self.LU = LU_decomposed
        self.num_channels = num_channels
        self.double_inverse = style == "chaiyujin"
        if not LU_decomposed:
            self.weight = nn.Parameter(rotation.contiguous())
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal().clone()
        self.names = ("l", "u") if style == "chaiyujin" else ("lower", "upper")
        self.register_buffer("p", permutation)
        self.register_buffer("sign_s", diagonal.sign())
        self.register_parameter(self.names[0], nn.Parameter(lower))
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.register_parameter(self.names[1], nn.Parameter(upper.triu(1)))
        self.l_mask = torch.ones(num_channels, num_channels).tril(-1)
        self.eye = torch.eye(num_channels)

    def get_weight(self, x, reverse):
        positions = x.shape[2] * x.shape[3]
        if not self.LU:
            log_det = torch.slogdet(self.weight)[1] * positions
            weight = self.weight
            if reverse:
                weight = weight.double().inverse().float() if self.double_inverse else weight.inverse()
            return weight[:, :, None, None], log_det
        mask, eye = self.l_mask.to(x), self.eye.to(x)
        lower = getattr(self, self.names[0]) * mask + eye
        upper = getattr(self, self.names[1]) * mask.T + torch.diag(self.sign_s * self.log_s.exp())
        weight = upper.inverse() @ lower.inverse() @ self.p.inverse() if reverse else self.p @ lower @ upper
        return weight[:, :, None, None], self.log_s.sum() * positions

    def forward(self, x, logdet=None, reverse=False):
        weight, change = self.get_weight(x, reverse)
        if logdet is not None:
            logdet = logdet - change if reverse else logdet + change
        return F.conv2d(x, weight), logdet


class Permute2d(nn.Module):
    def __init__(self, num_channels, shuffle):
        super().__init__()
        self.indices = torch.randperm(num_channels) if shuffle else torch.arange(num_channels - 1, -1, -1)
        self.indices_inverse = self.indices.argsort()

    def forward(self, x, reverse=False):
        return x[:, self.indices_inverse if reverse else self.indices]


def make_net(in_channels, hidden, out_channels, style):
    inner, zeros = (Conv2d, Conv2dZeros) if style == "chaiyujin" else (InnerConv2d, InnerConv2dZeros)
    return nn.Sequential(
        inner(in_channels, hidden, 3),
        nn.ReLU(inplace=False),
        inner(hidden, hidden, 1),
        nn.ReLU(inplace=False),
        zeros(hidden, out_channels),
    )


class FlowStep(nn.Module):
    def __init__(
        self, channels, hidden, permutation="invconv", coupling="affine", LU_decomposed=False, style="chaiyujin"
    ):
        super().__init__()
        self.flow_coupling = coupling
        self.style = style
        self.actnorm = ActNorm2d(channels, strict=style != "chaiyujin")
        if permutation == "invconv":
            self.invconv = InvertibleConv1x1(channels, LU_decomposed, style)
        else:
            setattr(self, permutation, Permute2d(channels, permutation == "shuffle"))
        self.flow_permutation = permutation
        if style != "chaiyujin":
            if permutation == "invconv":
                self.flow_permutation = lambda z, logdet, rev: self.invconv(z, logdet, rev)
            else:
                layer = getattr(self, permutation)
                self.flow_permutation = lambda z, logdet, rev: (layer(z, rev), logdet)
        outputs = channels if coupling == "affine" else channels // 2
        net = make_net(channels // 2, hidden, outputs, style)
        self.net_name = "f" if style == "chaiyujin" else "block"
        setattr(self, self.net_name, net)

    def permute(self, z, logdet, reverse):
        if callable(self.flow_permutation):
            return self.flow_permutation(z, logdet, reverse)
        if self.flow_permutation == "invconv":
            return self.invconv(z, logdet, reverse)
        return getattr(self, self.flow_permutation)(z, reverse), logdet

    def forward(self, x, logdet=None, reverse=False):
        return self.reverse_flow(x, logdet) if reverse else self.normal_flow(x, logdet)

    def scale(self, u):
        return torch.sigmoid(u + 2.0)

    def normal_flow(self, x, logdet):
        z, logdet = self.actnorm(x, logdet=logdet, reverse=False)
        z, logdet = self.permute(z, logdet, False)
        z1, z2 = z.chunk(2, 1)
        h = getattr(self, self.net_name)(z1)
        if self.flow_coupling == "additive":
            z2 = z2 + h
        else:
            shift, u = h[:, 0::2], h[:, 1::2]
            scale = self.scale(u)
            z2 = (z2 + shift) * scale
            logdet = torch.log(scale).sum(dim=[1, 2, 3]) + logdet
        return torch.cat((z1, z2), dim=1), logdet

    def reverse_flow(self, z, logdet):
        z1, z2 = z.chunk(2, 1)
        h = getattr(self, self.net_name)(z1)
        if self.flow_coupling == "additive":
            z2 = z2 - h
        else:
            shift, u = h[:, 0::2], h[:, 1::2]
            scale = self.scale(u)
            z2 = z2 / scale - shift
            logdet = -torch.log(scale).sum(dim=[1, 2, 3]) + logdet
        z = torch.cat((z1, z2), dim=1)
        z, logdet = self.permute(z, logdet, True)
        return self.actnorm(z, logdet=logdet, reverse=True)


class SqueezeLayer(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, logdet=None, reverse=False):
        return (F.pixel_shuffle if reverse else F.pixel_unshuffle)(x, self.factor), logdet


def gaussian_log_prob(mean, logs, x):
    log_p = -0.5 * (2 * logs + (x - mean) ** 2 / torch.exp(2 * logs) + math.log(2 * math.pi))
    return log_p.sum(dim=[1, 2, 3])


class Split2d(nn.Module):
    def __init__(self, num_channels, style="chaiyujin"):
        super().__init__()
        zeros = Conv2dZeros if style == "chaiyujin" else InnerConv2dZeros
        self.conv = zeros(num_channels // 2, num_channels)

    def split2d_prior(self, z):
        h = self.conv(z)
        return h[:, 0::2], h[:, 1::2]

    def forward(self, x, logdet=0.0, reverse=False, eps_std=None):
        if reverse:
            mean, logs = self.split2d_prior(x)
            z2 = mean + torch.exp(logs) * (eps_std or 1.0) * torch.randn_like(mean)
            return torch.cat((x, z2), dim=1), logdet
        z1, z2 = x.chunk(2, 1)
        mean, logs = self.split2d_prior(z1)
        return z1, gaussian_log_prob(mean, logs, z2) + logdet


class FlowNet(nn.Module):
    def __init__(self, in_channels, hidden, K, L, style="chaiyujin", **options):
        super().__init__()
        self.layers = nn.ModuleList()
        channels = in_channels
        for level in range(L):
            self.layers.append(SqueezeLayer(2))
            channels *= 4
            self.layers.extend(FlowStep(channels, hidden, style=style, **options) for _ in range(K))
            if level < L - 1:
                self.layers.append(Split2d(channels, style))
                channels //= 2

    def forward(self, x, logdet=0.0, reverse=False, eps_std=None):
        if reverse:
            for layer in reversed(self.layers):
                if isinstance(layer, Split2d):
                    x, logdet = layer(x, logdet=logdet, reverse=True, eps_std=eps_std)
                else:
                    x, logdet = layer(x, logdet=logdet, reverse=True)
            return x
        for layer in self.layers:
            x, logdet = layer(x, logdet)
        return x, logdet


class Glow(nn.Module):
    def __init__(self, in_channels, hidden, K, L, **options):
        super().__init__()
        self.flow = FlowNet(in_channels, hidden, K, L, **options)

    def forward(self, x):
        z, objective = self.flow(x, logdet=x.new_zeros(x.shape[0]))
        zeros = torch.zeros_like(z)
        return z, -(objective + gaussian_log_prob(zeros, zeros, z))


def loss(model: Glow, x: Tensor) -> Tensor:
    """Negative log-likelihood in nats."""
    return model(x)[1].mean()
