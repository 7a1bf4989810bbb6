"""Reference of ``gaussian_log_prob``; the mathematics is in ``glow_kernels.ops.gaussian_log_prob``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format, without_autocast


@without_autocast
def forward(z: Tensor, h: Tensor, layout: str) -> Tensor:
    """Log-density (B,) of z (B, C, *spatial)."""
    dtype = compute_dtype(z)
    mean, log_sd = split(h.to(dtype), layout)
    standardized = (z.to(dtype) - mean) * (-log_sd).exp()
    return (-0.5 * math.log(2.0 * math.pi) - log_sd - 0.5 * standardized.square()).flatten(1).sum(1)


@without_autocast
def backward(grad: Tensor, z: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in z and h."""
    dtype = compute_dtype(z)
    mean, log_sd = split(h.to(dtype), layout)
    weight = grad.view(-1, *(1,) * (z.dim() - 1))
    inverse_sd = (-log_sd).exp()
    standardized = (z.to(dtype) - mean) * inverse_sd
    grad_mean = weight * standardized * inverse_sd
    grad_log_sd = weight * (standardized.square() - 1.0)
    return (-grad_mean).to(z.dtype), merge(grad_mean, grad_log_sd, layout).to(h.dtype)


@without_autocast
def sample(eps: Tensor, h: Tensor, layout: str) -> Tensor:
    """``mean + exp(log_sd) * eps``."""
    dtype = compute_dtype(eps)
    mean, log_sd = split(h.to(dtype), layout)
    z = mean + log_sd.exp() * eps.to(dtype)
    return z.to(eps.dtype).contiguous(memory_format=output_format(eps))


@without_autocast
def sample_backward(grad: Tensor, eps: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``sample`` in eps and h."""
    dtype = compute_dtype(eps)
    _, log_sd = split(h.to(dtype), layout)
    wide_grad = grad.to(dtype)
    grad_eps = wide_grad * log_sd.exp()
    return grad_eps.to(eps.dtype), merge(wide_grad, grad_eps * eps.to(dtype), layout).to(h.dtype)


@without_autocast
def standardize(z: Tensor, h: Tensor, layout: str) -> Tensor:
    """``(z - mean) * exp(-log_sd)``."""
    dtype = compute_dtype(z)
    mean, log_sd = split(h.to(dtype), layout)
    eps = (z.to(dtype) - mean) * (-log_sd).exp()
    return eps.to(z.dtype).contiguous(memory_format=output_format(z))


@without_autocast
def standardize_backward(grad: Tensor, eps: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``standardize`` in z and h."""
    dtype = compute_dtype(eps)
    _, log_sd = split(h.to(dtype), layout)
    wide_grad = grad.to(dtype)
    grad_z = wide_grad * (-log_sd).exp()
    return grad_z.to(eps.dtype), merge(-grad_z, -wide_grad * eps.to(dtype), layout).to(h.dtype)


def split(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation, each (B, C, *spatial), from ``h`` (B, 2 C, *spatial)."""
    if layout == "chunk_mean_log_sd":
        return h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return h[:, 0::2], h[:, 1::2]


def merge(mean: Tensor, log_sd: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`split`."""
    if layout == "chunk_mean_log_sd":
        return torch.cat((mean, log_sd), dim=1)
    return torch.stack((mean, log_sd), dim=2).flatten(1, 2)
