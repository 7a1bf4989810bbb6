"""Which arguments the shared library takes; a function for every operator."""

from __future__ import annotations

import functools
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
# kMaxChannels in csrc/cpu/actnorm_conv1x1.h: larger matrices are left to BLAS and LAPACK.
_MAX_CHANNELS = 512


@functools.cache
def _has_kernel(operator: str) -> bool:
    """Whether the library in use has the operator; that of tests/cuda_host may not."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"glow_kernels::{operator}_native", "CPU")


# A constant, which torch.compile need not trace.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def affine_coupling(function: str, *args: Any) -> bool:
    """All of it."""
    if not _has_kernel(f"affine_coupling_{function}"):
        return False
    x, h = args[2:4] if function.endswith("backward") else args[:2]
    return (x.dtype, h.dtype) in _TYPES_WITH_H and _is_dense_cpu(x, h)


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Products of large matrices are left to the reference."""
    if not _has_kernel(f"actnorm_conv1x1_{function}"):
        return False
    if function.startswith("apply"):
        x, matrix = args[1:3] if function.endswith("backward") else args[:2]
        fits = x.dtype in _TYPES and x.shape[1] <= _MAX_CHANNELS and matrix.dtype == compute_dtype(x)
        return fits and _is_dense_cpu(x, matrix)
    first = args[0]
    if first.dtype not in (torch.float32, torch.float64) or first.shape[-1] > _MAX_CHANNELS:
        return False
    tensors = [tensor for tensor in args if tensor is not None]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            return False
    return _is_dense_cpu(*tensors)


def gaussian_log_prob(function: str, *args: Any) -> bool:
    """All of it."""
    z, h = args[1:3] if function.endswith("backward") else args[:2]
    return (z.dtype, h.dtype) in _TYPES_WITH_H and _is_dense_cpu(z, h)


def actnorm_statistics(function: str, x: Tensor) -> bool:
    """All of it."""
    return _has_kernel(f"actnorm_statistics_{function}") and x.dtype in _TYPES and _is_dense_cpu(x)


def _is_dense_cpu(*tensors: Tensor) -> bool:
    # A loop: this is asked at every call, and a generator costs more than all the answers.
    for tensor in tensors:  # noqa: SIM110
        if not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
    return True
