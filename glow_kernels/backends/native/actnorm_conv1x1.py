"""Native ``actnorm_conv1x1``: the linear map for small C. Folding and products of large matrices are left to others."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.backends.native.support import is_dense_cpu
from glow_kernels.backends.numerics import compute_dtype

# kMaxChannels in csrc/cpu/actnorm_conv1x1.h: more channels are a matrix product that belongs to a BLAS.
_MAX_CHANNELS = 64


def supports(x: Tensor, matrix: Tensor, shift: Tensor) -> bool:
    """Whether the shared library takes these arguments."""
    return (
        x.shape[1] <= _MAX_CHANNELS
        and matrix.dtype == shift.dtype == compute_dtype(x)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and is_dense_cpu(x, matrix, shift)
    )


def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of ``apply`` in x, matrix and shift."""
    grad_x, grad_matrix, grad_shift = torch.ops.glow_kernels.actnorm_conv1x1_apply_backward_native(
        grad, x, matrix, needs_grad_x
    )
    return (grad_x if needs_grad_x else None), grad_matrix, grad_shift
