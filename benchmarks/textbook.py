"""The operators as people write them in PyTorch today: what eager and torch.compile are measured on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def actnorm_conv1x1(x: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """ActNorm, then a convolution, then the log-determinant of its matrix."""
    activated = (x + bias.view(1, -1, 1, 1)) * log_scale.exp().view(1, -1, 1, 1)
    z = F.conv2d(activated, weight.view(*weight.shape, 1, 1))
    log_det = x.shape[2] * x.shape[3] * (log_scale.sum() + torch.slogdet(weight).logabsdet)
    return z, log_det.expand(x.shape[0])


def actnorm_conv1x1_inverse(z: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution with the inverse matrix, then ActNorm undone."""
    inverse = torch.inverse(weight)
    activated = F.conv2d(z, inverse.view(*weight.shape, 1, 1))
    x = activated * (-log_scale).exp().view(1, -1, 1, 1) - bias.view(1, -1, 1, 1)
    log_det = -z.shape[2] * z.shape[3] * (log_scale.sum() + torch.slogdet(weight).logabsdet)
    return x, log_det.expand(z.shape[0])


def affine_coupling(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Shift in the even channels of ``h``, raw scale in the odd ones."""
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
    return (x + shift) * scale, torch.log(scale).flatten(1).sum(1)


def affine_coupling_inverse(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse."""
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
    return y / scale - shift, -torch.log(scale).flatten(1).sum(1)
