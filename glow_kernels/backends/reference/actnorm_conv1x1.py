"""Reference of ``actnorm_conv1x1``; the mathematics is in ``glow_kernels.ops.actnorm_conv1x1``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glow_kernels.backends.numerics import is_channels_last, output_format, wide_dtype, without_autocast

_LONGEST_SUM = 1 << 16


@without_autocast
def lu_weight(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    """``W = P L (U + diag(s))`` (*K, C, C) and ``log|det W|`` (*K)."""
    dtype, wide = lower.dtype, wide_dtype(lower.device)
    unit_lower, full_upper = _triangles(lower, upper, log_diagonal, diagonal_sign)
    weight = torch.matmul(permutation.to(wide), torch.matmul(unit_lower, full_upper))
    return weight.to(dtype).contiguous(), log_diagonal.to(wide).sum(-1).to(dtype)


@without_autocast
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
    dtype, wide = lower.dtype, wide_dtype(lower.device)
    unit_lower, full_upper = _triangles(lower, upper, log_diagonal, diagonal_sign)
    permuted = torch.matmul(permutation.to(wide).mT, grad_weight.to(wide))
    grad_lower = torch.matmul(permuted, full_upper.mT).tril(-1)
    grad_upper = torch.matmul(unit_lower.mT, permuted)
    grad_diagonal = (grad_upper * full_upper).diagonal(dim1=-2, dim2=-1) + grad_log_det.to(wide).unsqueeze(-1)
    return grad_lower.to(dtype), grad_upper.triu(1).to(dtype), grad_diagonal.to(dtype)


@without_autocast
def fold(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M (*K, C, C), shift v (*K, C) and log-determinant per position (*K) of x -> z."""
    dtype, wide = weight.dtype, wide_dtype(weight.device)
    matrix = (weight.to(wide) * log_scale.to(wide).exp().unsqueeze(-2)).contiguous()
    shift = torch.matmul(matrix, bias.to(wide).unsqueeze(-1)).squeeze(-1)
    log_det = log_scale.to(wide).sum(-1) + _log_abs_det(weight.to(wide), weight_log_det)
    return matrix.to(dtype), shift.to(dtype), log_det.to(dtype)


@without_autocast
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
    dtype, wide = weight.dtype, wide_dtype(weight.device)
    scale, wide_weight = log_scale.to(wide).exp(), weight.to(wide)
    grad_shift = grad_shift.to(wide).unsqueeze(-1)
    grad_log_det = grad_log_det.to(wide)
    total = grad_matrix.to(wide) + grad_shift * bias.to(wide).unsqueeze(-2)
    grad_weight = total * scale.unsqueeze(-2)
    if weight_log_det is None:
        grad_weight = grad_weight + grad_log_det[..., None, None] * torch.linalg.inv_ex(wide_weight).inverse.mT
    grad_log_scale = scale * (wide_weight * total).sum(-2) + grad_log_det.unsqueeze(-1)
    grad_bias = scale * torch.matmul(wide_weight.mT, grad_shift).squeeze(-1)
    return (
        grad_log_scale.to(dtype),
        grad_bias.to(dtype),
        grad_weight.to(dtype),
        weight.new_empty(0) if weight_log_det is None else grad_log_det.to(dtype),
    )


@without_autocast
def fold_inverse(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix N = M^-1 (*K, C, C), shift -b (*K, C) and log-determinant per position (*K) of z -> x.

    Raises:
        ValueError: a weight is singular.
    """
    inverse, info = torch.linalg.inv_ex(weight.to(wide_dtype(weight.device)))
    _check_invertible(inverse, info)
    return fold_of_inverse(inverse, log_scale, bias, weight, weight_log_det)


def fold_of_inverse(
    inverse: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``fold_inverse`` given ``inverse``, W^-1 in the type of C x C work; does not wait for the device."""
    dtype, wide = weight.dtype, inverse.dtype
    matrix = (inverse * (-log_scale.to(wide)).exp().unsqueeze(-1)).to(dtype).contiguous()
    log_det = -log_scale.to(wide).sum(-1) - _log_abs_det(weight.to(wide), weight_log_det)
    return matrix, (-bias).contiguous(), log_det.to(dtype)


@without_autocast
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
    dtype, wide = weight.dtype, wide_dtype(weight.device)
    grad_matrix, grad_log_det = grad_matrix.to(wide), grad_log_det.to(wide)
    inverse = torch.linalg.inv_ex(weight.to(wide)).inverse
    matrix = inverse * (-log_scale.to(wide)).exp().unsqueeze(-1)
    grad_log_scale = -(grad_matrix * matrix).sum(-1) - grad_log_det.unsqueeze(-1)
    grad_weight = -torch.matmul(torch.matmul(matrix.mT, grad_matrix), inverse.mT)
    if weight_log_det is None:
        grad_weight = grad_weight - grad_log_det[..., None, None] * inverse.mT
    return (
        grad_log_scale.to(dtype),
        -grad_shift,
        grad_weight.to(dtype),
        weight.new_empty(0) if weight_log_det is None else -grad_log_det.to(dtype),
    )


@without_autocast
def apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z_p = M x_p + v`` at every position p of ``x`` (B, C, *spatial)."""
    result = _linear(x.to(matrix.dtype), matrix, shift)
    return result.to(x.dtype).contiguous(memory_format=output_format(x))


@without_autocast
def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``apply``: ``M^T g`` (or nothing), ``sum g x^T``, ``sum g`` (sums over samples and positions)."""
    grad_rows, x_rows = _rows(grad.to(matrix.dtype)), _rows(x.to(matrix.dtype))
    grad_x = _linear(grad.to(matrix.dtype), matrix.mT, None).to(x.dtype) if needs_grad_x else x.new_empty(0)
    return grad_x, _sum_of_outer_products(grad_rows, x_rows), grad_rows.sum(1)


@without_autocast
def apply_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x = M^-1 z - b`` of ``apply`` and its gradients in x, matrix and shift."""
    x = _linear(z.to(matrix.dtype), inverse, inverse_shift)
    grad_x, grad_matrix, grad_shift = apply_backward(grad, x, matrix, True)
    format_ = output_format(z)
    x, grad_x = (tensor.to(z.dtype).contiguous(memory_format=format_) for tensor in (x, grad_x))
    return x, grad_x, grad_matrix.contiguous(), grad_shift


def _triangles(lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor) -> tuple[Tensor, Tensor]:
    # Mask out what an optimizer with momentum may write outside the triangles.
    wide = wide_dtype(lower.device)
    unit_lower = lower.to(wide).tril(-1) + torch.eye(lower.shape[-1], dtype=wide, device=lower.device)
    diagonal = diagonal_sign.to(wide) * log_diagonal.to(wide).exp()
    return unit_lower, upper.to(wide).triu(1) + torch.diag_embed(diagonal)


def _rows(x: Tensor) -> Tensor:
    # One product over all samples and positions is faster than one per sample and a sum, even with the copy.
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * math.prod(x.shape[2:]))


def _sum_of_outer_products(g: Tensor, x: Tensor) -> Tensor:
    # In parts, since a library may sum sequentially, and the rounding error of that grows with the length.
    parts = zip(torch.split(g, _LONGEST_SUM, 1), torch.split(x, _LONGEST_SUM, 1), strict=True)
    return torch.stack([torch.matmul(of_g, of_x.mT) for of_g, of_x in parts]).sum(0)


def _linear(x: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
    # A batched product reads NCHW without a copy; a 1x1 convolution is up to 35 times slower on a CPU.
    if x.dim() == 2 or is_channels_last(x):
        return F.linear(x.movedim(1, -1), matrix, shift).movedim(-1, 1)
    batched = matrix.expand(x.shape[0], -1, -1)
    flat = x.flatten(2)
    product = torch.bmm(batched, flat) if shift is None else torch.baddbmm(shift[:, None], batched, flat)
    return product.reshape(x.shape)


def _log_abs_det(weight: Tensor, known: Tensor | None) -> Tensor:
    return torch.linalg.slogdet(weight).logabsdet if known is None else known


def _check_invertible(inverse: Tensor, info: Tensor) -> None:
    # Reading the flag waits for the device, which a stream being captured cannot do; the result is then not finite.
    if info.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if bool((info != 0).any()) or not bool(inverse.isfinite().all()):
        size = tuple(inverse.shape[-2:])
        raise ValueError(f"weight must be invertible, got a singular {size} matrix, or parameters that are not finite")
