"""Which arguments the shared library takes; a function for every operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Types of x and of h; x float32 with h in half precision is the normal case of mixed precision.
_TYPES_WITH_H = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
}
# kMaxChannels in csrc/cpu/actnorm_conv1x1.h: more channels are a matrix product that belongs to a BLAS.
_MAX_CHANNELS = 64


def affine_coupling(function: str, *args: Any) -> bool:
    """All of it."""
    x, h = args[2:4] if function.endswith("backward") else args[:2]
    return (x.dtype, h.dtype) in _TYPES_WITH_H and _is_dense_cpu(x, h)


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Products, and inverses, of large matrices are left to the reference."""
    if function.startswith("apply"):
        x, matrix = args[1:3] if function.endswith("backward") else args[:2]
        fits = matrix.dtype == compute_dtype(x) and x.dtype in _TYPES and x.shape[1] <= _MAX_CHANNELS
        return fits and _is_dense_cpu(x, matrix)
    tensors = [tensor for tensor in args if tensor is not None]
    fits = all(tensor.dtype == args[0].dtype for tensor in tensors) and args[0].shape[-1] <= _MAX_CHANNELS
    return fits and args[0].dtype in (torch.float32, torch.float64) and _is_dense_cpu(*tensors)


def gaussian_log_prob(function: str, *args: Any) -> bool:
    """All of it."""
    z, h = args[1:3] if function.endswith("backward") else args[:2]
    return (z.dtype, h.dtype) in _TYPES_WITH_H and _is_dense_cpu(z, h)


def actnorm_statistics(function: str, x: Tensor) -> bool:
    """All of it."""
    return x.dtype in _TYPES and _is_dense_cpu(x)


def _is_dense_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors)
