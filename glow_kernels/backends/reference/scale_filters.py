"""Reference of ``scale_filters``; the mathematics stands in ``glow_kernels.ops.scale_filters``."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format


def forward(
    weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``exp(factor * log_scale)`` times weight and bias."""
    compute = compute_dtype(weight)
    scale = _scale(log_scale, factor, compute)
    scaled = weight.to(compute) * _per_filter(scale, weight)
    return scaled.to(dtype).contiguous(memory_format=output_format(weight)), (bias.to(compute) * scale).to(dtype)


def backward(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in weight, bias and log_scale."""
    compute = compute_dtype(weight)
    scale = _scale(log_scale, factor, compute)
    wide = grad_weight.to(compute) * _per_filter(scale, weight)
    grad_bias = grad_bias.to(compute) * scale
    grad_log_scale = factor * ((wide * weight.to(compute)).flatten(1).sum(1) + grad_bias * bias.to(compute))
    return wide.to(weight.dtype).contiguous(memory_format=output_format(weight)), grad_bias, grad_log_scale


def forward_all(
    weights: list[Tensor], biases: list[Tensor], log_scales: list[Tensor], factors: list[float], dtype: torch.dtype
) -> list[Tensor]:
    """``forward`` of several convolutions."""
    filters = zip(weights, biases, log_scales, factors, strict=True)
    return [scaled for each in filters for scaled in forward(*each, dtype)]


def backward_all(
    grads: list[Tensor], weights: list[Tensor], biases: list[Tensor], log_scales: list[Tensor], factors: list[float]
) -> list[Tensor]:
    """``backward`` of several convolutions."""
    filters = zip(grads[::2], grads[1::2], weights, biases, log_scales, factors, strict=True)
    return [grad for each in filters for grad in backward(*each)]


def _scale(log_scale: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (factor * log_scale.to(dtype)).exp()


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (weight.dim() - 1))
