"""The halves of ``actnorm_conv1x1`` apart, for a caller that folds many steps at once and applies each in its turn.

The mathematics stands in :mod:`glow_kernels.ops.actnorm_conv1x1`. Leading dimensions ``(*K)`` fold many steps in one
call. Callers have checked their arguments.
"""

from __future__ import annotations

from torch import Tensor

from glow_kernels.ops.actnorm_conv1x1 import _apply, _reversible_backward
from glow_kernels.ops.folding import _fold, _invert


def fold(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M (*K, C, C), shift v (*K, C) and log-determinant per position (*K) of x -> z.

    Args:
        log_scale, bias, weight, weight_log_det: (*K, C), (*K, C), (*K, C, C) and (*K), of one type.
    """
    matrix, shift, log_det = _fold(log_scale, bias, weight, weight_log_det)
    return matrix, shift, log_det


def fold_inverse(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M^-1, shift -b and log-determinant of z -> x; arguments as for :func:`fold`.

    Raises:
        ValueError: a weight is singular.
    """
    return _invert(log_scale, bias, weight, weight_log_det)


def linear_map(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z = M x + v`` at every position of ``x`` (B, C, *spatial); M and v as :func:`fold` gives them for its type."""
    z: Tensor = _apply(x, matrix, shift)
    return z


def linear_map_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x`` of :func:`linear_map`, its gradient, and those of ``matrix`` and ``shift``, in one pass."""
    x, grad_x, grad_matrix, grad_shift = _reversible_backward(grad.to(z.dtype), z, matrix, inverse, inverse_shift)
    return x, grad_x, grad_matrix, grad_shift
