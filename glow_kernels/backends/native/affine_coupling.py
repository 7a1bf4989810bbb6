"""Native ``affine_coupling``; its forward and inverse are registered by the shared library itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.native.support import is_dense_cpu

# Types of x and of h; x float32 with h in half precision is the normal case of mixed precision.
_TYPES = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
}


def supports(x: Tensor, h: Tensor, log_scale_gain: Tensor | None, *_: Any) -> bool:
    """Whether the shared library takes these arguments; a learned gain is left to the reference."""
    return log_scale_gain is None and (x.dtype, h.dtype) in _TYPES and is_dense_cpu(x, h)


def backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    log_scale_gain: None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, None]:
    """Gradients of ``forward`` in x, h and log_scale_gain, of which there is none."""
    options = (kind, scale_parameters, layout, order)
    grad_x, grad_h = torch.ops.glow_kernels.affine_coupling_backward_native(grad, grad_log_det, y, h, *options)
    return grad_x, grad_h, None


def inverse_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    h: Tensor,
    log_scale_gain: None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, None]:
    """Gradients of ``inverse`` in y, h and log_scale_gain, of which there is none."""
    options = (kind, scale_parameters, layout, order)
    grad_y, grad_h = torch.ops.glow_kernels.affine_coupling_inverse_backward_native(grad, grad_log_det, x, h, *options)
    return grad_y, grad_h, None
