"""Triton's C x C half of ``actnorm_conv1x1``: one program per matrix, one launch for all of them.

A program holds a matrix of up to 64 channels; larger matrices are left to a library. Neither makes the host wait for
the device. So on a GPU, a singular matrix shows only in its log-determinant, -inf, and in an inverse that is not
finite; on the CPU it is an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.reference.actnorm_conv1x1 import fold_of_inverse
from glow_kernels.backends.triton.folding_kernels import (
    fold_backward_kernel,
    fold_inverse_backward_kernel,
    fold_kernel,
    lu_weight_backward_kernel,
    lu_weight_kernel,
)
from glow_kernels.backends.triton.launch import launch, power_of_two, strided
from glow_kernels.backends.triton.support import MAX_CHANNELS_PER_PROGRAM


def lu_weight(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    """``W = P L (U + diag(s))`` (*K, C, C) and ``log|det W|`` (*K)."""
    weight = torch.empty_like(lower, memory_format=torch.contiguous_format)
    log_det = lower.new_empty(lower.shape[:-2])
    matrices = (_flat(permutation, 2), _flat(lower, 2), _flat(upper, 2))
    vectors = (_flat(log_diagonal, 1), _flat(diagonal_sign, 1))
    _launch(lu_weight_kernel, lower, *strided(*matrices, *vectors), weight, log_det)
    return weight, log_det


def lu_weight_backward(
    grad_weight: Tensor,
    grad_log_det: Tensor,
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    diagonal_sign: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``lu_weight`` in lower, upper and log_diagonal."""
    results = (_like(lower), _like(upper), _like(log_diagonal))
    matrices = (_flat(grad_weight, 2), _flat(permutation, 2), _flat(lower, 2), _flat(upper, 2))
    vectors = (_flat(grad_log_det, 0), _flat(log_diagonal, 1), _flat(diagonal_sign, 1))
    _launch(lu_weight_backward_kernel, lower, *strided(*matrices, *vectors), *results)
    return results


def fold(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M (*K, C, C), shift v (*K, C) and log-determinant per position (*K) of x -> z."""
    return _fold(log_scale, bias, weight, weight_log_det, inverse=False)


def fold_inverse(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix N = M^-1 (*K, C, C), shift -b (*K, C) and log-determinant per position (*K) of z -> x.

    Raises:
        ValueError: a weight on the CPU is singular.
    """
    if weight.shape[-1] > MAX_CHANNELS_PER_PROGRAM:
        inverse = torch.linalg.inv_ex(weight.double()).inverse
        matrix, shift, log_det = fold_of_inverse(inverse, log_scale, bias, weight, weight_log_det)
    else:
        matrix, shift, log_det = _fold(log_scale, bias, weight, weight_log_det, inverse=True)
    if weight.device.type == "cpu" and not bool(matrix.isfinite().all()):
        size = tuple(weight.shape[-2:])
        raise ValueError(f"weight must be invertible, got a singular {size} matrix, or parameters that are not finite")
    return matrix, shift, log_det


def fold_backward(
    grad_matrix: Tensor,
    grad_shift: Tensor,
    grad_log_det: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``fold`` in its arguments; empty for a missing weight_log_det."""
    grads = (_flat(grad_matrix, 2), _flat(grad_shift, 1), _flat(grad_log_det, 0))
    inputs = (_flat(log_scale, 1), _flat(bias, 1), _flat(weight, 2))
    results = _fold_results(log_scale, bias, weight, weight_log_det)
    _launch(fold_backward_kernel, weight, *strided(*grads, *inputs), *results, INVERT=weight_log_det is None)
    return results


def fold_inverse_backward(
    grad_matrix: Tensor,
    grad_shift: Tensor,
    grad_log_det: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``fold_inverse``: ``dN = -diag(dlog_scale) N - N dW W^-1``."""
    results = _fold_results(log_scale, bias, weight, weight_log_det)
    inverse = torch.empty_like(results[2], dtype=torch.float64)
    grads = (_flat(grad_matrix, 2), _flat(grad_shift, 1), _flat(grad_log_det, 0))
    inputs = (_flat(log_scale, 1), _flat(weight, 2))
    _launch(
        fold_inverse_backward_kernel,
        weight,
        *strided(*grads, *inputs),
        *results,
        inverse,
        INVERT=weight_log_det is None,
    )
    return results


def _fold(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    matrix, shift, log_det = _like(weight), _like(bias), _like(log_scale[..., 0])
    known = _flat(log_scale[..., 0] if weight_log_det is None else weight_log_det, 0)
    inputs = (_flat(log_scale, 1), _flat(bias, 1), _flat(weight, 2), known)
    options = {"INVERSE": inverse, "KNOWN": weight_log_det is not None}
    _launch(fold_kernel, weight, *strided(*inputs), matrix, shift, log_det, **options)
    return matrix, shift, log_det


def _fold_results(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = weight.new_empty(0 if weight_log_det is None else weight_log_det.shape)
    return _like(log_scale), _like(bias), _like(weight), known


def _launch(kernel: Any, like: Tensor, *args: object, **options: object) -> None:
    """One program per matrix of ``like`` (*K, C, C)."""
    channels, matrices = like.shape[-1], math.prod(like.shape[:-2])
    if matrices == 0 or channels == 0:
        return
    block = max(16, power_of_two(channels))
    num_warps = min(16, block * block // 64)
    launch(kernel, matrices, like, *args, channels, **options, BLOCK=block, num_warps=num_warps, ALL_REGISTERS=True)


def _flat(tensor: Tensor, dimensions: int) -> Tensor:
    """``tensor`` with all but its last ``dimensions`` dimensions flattened to one: a view if the strides allow."""
    return tensor.reshape(-1, *tensor.shape[tensor.dim() - dimensions :])


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
