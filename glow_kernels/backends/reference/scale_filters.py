"""Reference of ``scale_filters``; the mathematics is in ``glow_kernels.ops.scale_filters``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    weights: list[Tensor],
    biases: list[Tensor],
    log_scales: list[Tensor],
    factors: list[float],
    dtype: torch.dtype,
    sizes: list[int],
) -> list[Tensor]:
    """``forward`` of several convolutions, padded with zeros to ``sizes``, two numbers for each."""
    results: list[Tensor] = []
    filters = zip(weights, biases, log_scales, factors, strict=True)
    for each, count, channels in zip(filters, sizes[::2], sizes[1::2], strict=True):
        weight, bias = forward(*each, dtype)
        beyond = (count - weight.shape[0], channels - weight.shape[1])
        if any(beyond):
            format_ = output_format(each[0])
            zeros = (0, 0) * (weight.dim() - 2)
            weight = F.pad(weight, (*zeros, 0, beyond[1], 0, beyond[0])).contiguous(memory_format=format_)
            bias = F.pad(bias, (0, beyond[0]))
        results += [weight, bias]
    return results


def backward_all(
    grads: list[Tensor], weights: list[Tensor], biases: list[Tensor], log_scales: list[Tensor], factors: list[float]
) -> list[Tensor]:
    """``backward`` of several convolutions, from gradients of padded results, and of biases in partial sums."""
    results: list[Tensor] = []
    for grad, of_bias, weight, *rest in zip(grads[::2], grads[1::2], weights, biases, log_scales, factors, strict=True):
        count, channels = weight.shape[:2]
        whole = of_bias.sum(0) if of_bias.dim() == 2 else of_bias
        results += backward(grad[:count, :channels], whole[:count], weight, *rest)
    return results


def _scale(log_scale: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (factor * log_scale.to(dtype)).exp()


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (weight.dim() - 1))
