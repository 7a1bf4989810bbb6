"""Reference of ``bias_relu``; the mathematics is in ``glow_kernels.ops.bias_relu``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, empty_padded, output_format


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """``max(x + bias, 0)``."""
    dtype = compute_dtype(x)
    total = x.to(dtype) + bias.to(dtype).view(-1, *(1,) * (x.dim() - 2))
    return total.relu().to(x.dtype).contiguous(memory_format=output_format(x))


def backward(grad: Tensor, y: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in x and in the bias, given its output; the latter in ``parts`` partial sums."""
    grad_x = torch.where(y > 0, grad, 0)
    return grad_x.contiguous(memory_format=output_format(y)), bias_backward(grad_x, parts)


def bias_backward(grad: Tensor, parts: int) -> Tensor:
    """Gradient in a bias that was added without ReLU, in ``parts`` partial sums: here the first is the whole sum."""
    whole = grad.sum([dimension for dimension in range(grad.dim()) if dimension != 1], dtype=compute_dtype(grad))
    return F.pad(whole[None], (0, 0, 0, parts - 1))


def pad(x: Tensor, channels: int, dtype: torch.dtype, channels_last: bool, parts: int) -> tuple[Tensor, Tensor]:
    """``x`` padded with zeros to ``channels`` channels, and its sums per channel in ``parts`` partial sums."""
    padded = empty_padded(x, channels, dtype, channels_last).zero_()
    padded[:, : x.shape[1]].copy_(x)
    return padded, bias_backward(x, parts)
