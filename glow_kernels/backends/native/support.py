"""Which arguments the shared library takes; a function for every operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype

# Types of x and of h; x float32 with h in half precision is the normal case of mixed precision.
_COUPLING_TYPES = {
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
    return (x.dtype, h.dtype) in _COUPLING_TYPES and _is_dense_cpu(x, h)


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Products of large matrices are left to the reference."""
    x, matrix = args[1:3] if function.endswith("backward") else args[:2]
    return (
        x.shape[1] <= _MAX_CHANNELS
        and matrix.dtype == compute_dtype(x)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and _is_dense_cpu(x, matrix)
    )


def _is_dense_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors)
