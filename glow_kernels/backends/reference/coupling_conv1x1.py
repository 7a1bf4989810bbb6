"""Reference of ``coupling_conv1x1``; the mathematics is in ``glow_kernels.ops.coupling_conv1x1``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glow_kernels.backends.numerics import output_format, without_autocast
from glow_kernels.backends.reference import actnorm_conv1x1, affine_coupling


@without_autocast
def forward(
    z: Tensor,
    h: Tensor,
    matrix: Tensor,
    shift: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``M [z1, y] + v`` like z, and ``log_det`` (B,) of z2 -> y."""
    x, log_det = _couple(z.to(matrix.dtype), h, kind, scale_parameters, layout, order)
    result = actnorm_conv1x1.apply(x, matrix, shift)
    return result.to(z.dtype).contiguous(memory_format=output_format(z)), log_det


@without_autocast
def backward(
    grad: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    h: Tensor,
    matrix: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in z, h, matrix and shift."""
    options = (kind, scale_parameters, layout, order)
    x, _ = _couple(z.to(matrix.dtype), h, *options)
    grad_x, grad_matrix, grad_shift = actnorm_conv1x1.apply_backward(grad.to(matrix.dtype), x, matrix, True)
    untouched = z.shape[1] - h.shape[1] // 2
    grad_z2, grad_h, _ = affine_coupling.backward(
        grad_x[:, untouched:], grad_log_det, x[:, untouched:], h, None, *options
    )
    return torch.cat((grad_x[:, :untouched], grad_z2), dim=1).to(z.dtype), grad_h, grad_matrix, grad_shift


def _couple(
    z: Tensor, h: Tensor, kind: str, scale_parameters: Sequence[float], layout: str, order: str
) -> tuple[Tensor, Tensor]:
    """``[z1, y]``, and ``log_det`` (B,)."""
    untouched = z.shape[1] - h.shape[1] // 2
    y, log_det = affine_coupling.forward(z[:, untouched:], h, None, kind, scale_parameters, layout, order)
    return torch.cat((z[:, :untouched], y), dim=1), log_det
