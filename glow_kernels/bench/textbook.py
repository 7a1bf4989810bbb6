"""The operators as people usually write them in PyTorch; eager and ``torch.compile`` are measured on these.

They follow the well-known Glow implementations: ActNorm, ``F.conv2d`` and ``slogdet``, and a coupling with
``sigmoid(raw + 2)`` and its logarithm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def actnorm_conv1x1(x: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """ActNorm, a 1x1 convolution, and the log-determinant of both."""
    activated = (x + bias[:, None, None]) * log_scale.exp()[:, None, None]
    z = F.conv2d(activated, weight[:, :, None, None])
    log_det = x.shape[2] * x.shape[3] * (log_scale.sum() + torch.slogdet(weight).logabsdet)
    return z, log_det.expand(x.shape[0])


def actnorm_conv1x1_inverse(z: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution with the inverse matrix, then ActNorm undone."""
    # Unlike an addition, a convolution does not promote types.
    activated = F.conv2d(z.to(weight.dtype), torch.inverse(weight)[:, :, None, None])
    x = activated * (-log_scale).exp()[:, None, None] - bias[:, None, None]
    log_det = -z.shape[2] * z.shape[3] * (log_scale.sum() + torch.slogdet(weight).logabsdet)
    return x, log_det.expand(z.shape[0])


def folded_conv1x1(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """:func:`actnorm_conv1x1` with its parameters folded in advance, without the log-determinant."""
    return F.conv2d(x.to(matrix.dtype), matrix[:, :, None, None], shift)


def affine_coupling(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Affine coupling; the shift is in the even channels of ``h``, the raw scale in the odd ones."""
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
    return (x + shift) * scale, torch.log(scale).flatten(1).sum(1)


def affine_coupling_inverse(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`affine_coupling`."""
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
    return y / scale - shift, -torch.log(scale).flatten(1).sum(1)


def coupling_conv1x1(z: Tensor, h: Tensor, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`affine_coupling` of the second half of the channels, then :func:`folded_conv1x1` of both halves."""
    untouched, transformed = z.chunk(2, dim=1)
    y, log_det = affine_coupling(transformed, h)
    return folded_conv1x1(torch.cat((untouched, y), dim=1), matrix, shift), log_det


def gaussian_log_prob(z: Tensor, h: Tensor) -> Tensor:
    """Log-density; mean in the even channels of ``h``, log standard deviation in the odd ones."""
    mean, log_sd = h[:, 0::2], h[:, 1::2]
    density = -0.5 * (math.log(2.0 * math.pi) + 2.0 * log_sd + (z - mean) ** 2 / torch.exp(2.0 * log_sd))
    return density.flatten(1).sum(1)


def gaussian_sample(eps: Tensor, h: Tensor) -> Tensor:
    """Transform standard normal ``eps`` to a sample of the density of :func:`gaussian_log_prob`."""
    return h[:, 0::2] + torch.exp(h[:, 1::2]) * eps


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation per channel."""
    flat = x.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1, correction=0)
