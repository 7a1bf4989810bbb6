"""Reference of ``bias_relu``; the mathematics stands in ``glow_kernels.ops.bias_relu``."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """``max(x + bias, 0)``."""
    dtype = compute_dtype(x)
    total = x.to(dtype) + bias.to(dtype).view(-1, *(1,) * (x.dim() - 2))
    return total.relu().to(x.dtype).contiguous(memory_format=output_format(x))


def backward(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in x and in the bias, from its output."""
    grad_x = torch.where(y > 0, grad, 0)
    others = [dimension for dimension in range(y.dim()) if dimension != 1]
    grad_bias = grad_x.to(compute_dtype(y)).sum(others)
    return grad_x.contiguous(memory_format=output_format(y)), grad_bias


def bias_backward(grad: Tensor) -> Tensor:
    """Gradient in a bias that was added without ReLU."""
    return grad.sum([dimension for dimension in range(grad.dim()) if dimension != 1], dtype=compute_dtype(grad))
