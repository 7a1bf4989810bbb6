"""Triton kernels of the C x C half of ``actnorm_conv1x1``: one program per matrix, one launch for all of them.

All arithmetic is in float64, in registers, for up to 64 channels. Inverses and determinants are by Gauss-Jordan
elimination in place with partial pivoting, without moving rows: step k takes the largest element of column k among the
rows not yet taken, row ``row_of_step[k]``, and element (i, k) of what is left is element
``(step_of_row[i], row_of_step[k])`` of the inverse. Nothing waits for the device: there, a singular matrix has a
log-determinant of -inf and an inverse that is not finite; on the CPU it is an error.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.triton.device_functions import store, wide
from glow_kernels.backends.triton.launch import launch, power_of_two


def lu_weight(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    """``W = P L (U + diag(s))`` (*K, C, C) and ``log|det W|`` (*K)."""
    weight = torch.empty_like(lower, memory_format=torch.contiguous_format)
    log_det = lower.new_empty(lower.shape[:-2])
    matrices = (_flat(permutation, 2), _flat(lower, 2), _flat(upper, 2))
    vectors = (_flat(log_diagonal, 1), _flat(diagonal_sign, 1))
    _launch(_lu_weight_kernel, lower, *_strided(*matrices, *vectors), weight, log_det)
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
    _launch(_lu_weight_backward_kernel, lower, *_strided(*matrices, *vectors), *results)
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
    matrix, shift, log_det = _fold(log_scale, bias, weight, weight_log_det, inverse=True)
    if weight.device.type == "cpu" and not bool(matrix.isfinite().all()):
        raise ValueError(f"weight must be invertible, got a singular {tuple(weight.shape[-2:])} matrix")
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
    _launch(_fold_backward_kernel, weight, *_strided(*grads, *inputs), *results, INVERT=weight_log_det is None)
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
        _fold_inverse_backward_kernel,
        weight,
        *_strided(*grads, *inputs),
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
    kernel = _fold_inverse_kernel if inverse else _fold_kernel
    _launch(kernel, weight, *_strided(*inputs), matrix, shift, log_det, KNOWN=weight_log_det is not None)
    return matrix, shift, log_det


def _fold_results(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = weight.new_empty(0 if weight_log_det is None else weight_log_det.shape)
    return _like(log_scale), _like(bias), _like(weight), known


def _launch(kernel: triton.JITFunction, like: Tensor, *args: object, **options: object) -> None:
    """One program per matrix of ``like`` (*K, C, C)."""
    channels, matrices = like.shape[-1], math.prod(like.shape[:-2])
    if matrices == 0 or channels == 0:
        return
    block = power_of_two(channels)
    num_warps = max(1, min(16, block * block // 256))
    launch(kernel, matrices, like, *args, channels, **options, BLOCK=block, num_warps=num_warps)


def _flat(tensor: Tensor, dimensions: int) -> Tensor:
    """All leading dimensions but the last ``dimensions`` as one: a view wherever the strides allow."""
    return tensor.reshape(-1, *tensor.shape[tensor.dim() - dimensions :])


def _strided(*tensors: Tensor) -> tuple[object, ...]:
    return tuple(part for tensor in tensors for part in (tensor, tensor.stride()))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@triton.jit
def _vector(ptr, strides, i, C):
    """Vector of this program, in float64; what is beyond C is zero."""
    at = ptr + tl.program_id(0).to(tl.int64) * strides[0] + i * strides[1]
    return tl.load(at, i < C, other=0.0).to(tl.float64)


@triton.jit
def _matrix(ptr, strides, rows, columns, C):
    """Elements of the matrix of this program, in float64; what is beyond C is zero."""
    at = ptr + tl.program_id(0).to(tl.int64) * strides[0] + (rows[:, None] * strides[1] + columns[None, :] * strides[2])
    return tl.load(at, (rows < C)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _number(ptr, strides):
    """Number of this program, in float64."""
    return tl.load(ptr + tl.program_id(0).to(tl.int64) * strides[0]).to(tl.float64)


@triton.jit
def _store_vector(ptr, i, values, C):
    """To a contiguous (*K, C)."""
    store(ptr + tl.program_id(0).to(tl.int64) * C + i, values, i < C)


@triton.jit
def _store_matrix(ptr, rows, columns, values, C):
    """To elements of a contiguous (*K, C, C)."""
    at = ptr + tl.program_id(0).to(tl.int64) * (C * C) + (rows[:, None] * C + columns[None, :])
    store(at, values, (rows < C)[:, None] & (columns < C)[None, :])


@triton.jit
def _store_number(ptr, value):
    store(ptr + tl.program_id(0), value, True)


@triton.jit
def _eliminate(left, C, BLOCK: tl.constexpr):
    """What is left of a matrix, step_of_row, row_of_step (beyond C where there are none) and log|det|."""
    i = tl.arange(0, BLOCK)
    step_of_row = tl.full((BLOCK,), BLOCK, tl.int32)
    row_of_step = tl.full((BLOCK,), BLOCK, tl.int32)
    log_det = tl.zeros((), tl.float64)
    for k in range(C):
        in_column = (i == k)[None, :]
        column = tl.sum(tl.where(in_column, left, 0.0), 1)
        candidates = tl.where((step_of_row == BLOCK) & (i < C), tl.abs(column), -1.0)
        row = tl.argmax(candidates, 0)
        in_row = (i == row)[:, None]
        pivot_row = tl.sum(tl.where(in_row, left, 0.0), 0)
        pivot = tl.sum(tl.where(i == k, pivot_row, 0.0), 0)
        # A pivot of zero stays the whole determinant, whatever the infinities that follow say.
        log_det = tl.where(log_det == float("-inf"), log_det, log_det + tl.log(tl.abs(pivot)))
        scaled = tl.where(i == k, 1.0, pivot_row) / pivot
        left = tl.where(in_row, 0.0, tl.where(in_column, 0.0, left) - column[:, None] * scaled[None, :])
        left = tl.where(in_row, scaled[None, :], left)
        step_of_row = tl.where(i == row, k, step_of_row)
        row_of_step = tl.where(i == k, row, row_of_step)
    return left, step_of_row, row_of_step, log_det


@triton.jit
def _fold_kernel(
    log_scale_ptr,
    log_scale_strides,
    bias_ptr,
    bias_strides,
    weight_ptr,
    weight_strides,
    known_ptr,
    known_strides,
    matrix_ptr,
    shift_ptr,
    log_det_ptr,
    C,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    log_scale = _vector(log_scale_ptr, log_scale_strides, i, C)
    weight = _matrix(weight_ptr, weight_strides, i, i, C)
    matrix = weight * tl.exp(log_scale)[None, :]
    _store_matrix(matrix_ptr, i, i, matrix, C)
    shift = tl.sum(matrix * _vector(bias_ptr, bias_strides, i, C)[None, :], 1)
    _store_vector(shift_ptr, i, shift, C)
    if KNOWN:
        log_det = _number(known_ptr, known_strides)
    else:
        _, _, _, log_det = _eliminate(weight, C, BLOCK)
    _store_number(log_det_ptr, tl.sum(log_scale) + log_det)


@triton.jit
def _fold_inverse_kernel(
    log_scale_ptr,
    log_scale_strides,
    bias_ptr,
    bias_strides,
    weight_ptr,
    weight_strides,
    known_ptr,
    known_strides,
    matrix_ptr,
    shift_ptr,
    log_det_ptr,
    C,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inverse, step_of_row, row_of_step, log_det = _eliminate(_matrix(weight_ptr, weight_strides, i, i, C), C, BLOCK)
    scale = tl.exp(-_vector(log_scale_ptr, log_scale_strides, step_of_row, C))
    _store_matrix(matrix_ptr, step_of_row, row_of_step, inverse * scale[:, None], C)
    _store_vector(shift_ptr, i, -_vector(bias_ptr, bias_strides, i, C), C)
    if KNOWN:
        log_det = _number(known_ptr, known_strides)
    _store_number(log_det_ptr, -tl.sum(_vector(log_scale_ptr, log_scale_strides, i, C)) - log_det)


@triton.jit
def _fold_backward_kernel(
    grad_matrix_ptr,
    grad_matrix_strides,
    grad_shift_ptr,
    grad_shift_strides,
    grad_log_det_ptr,
    grad_log_det_strides,
    log_scale_ptr,
    log_scale_strides,
    bias_ptr,
    bias_strides,
    weight_ptr,
    weight_strides,
    grad_log_scale_ptr,
    grad_bias_ptr,
    grad_weight_ptr,
    grad_known_ptr,
    C,
    INVERT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    grad_log_det = _number(grad_log_det_ptr, grad_log_det_strides)
    grad_shift = _vector(grad_shift_ptr, grad_shift_strides, i, C)
    bias = _vector(bias_ptr, bias_strides, i, C)
    scale = tl.exp(_vector(log_scale_ptr, log_scale_strides, i, C))
    weight = _matrix(weight_ptr, weight_strides, i, i, C)
    total = _matrix(grad_matrix_ptr, grad_matrix_strides, i, i, C) + grad_shift[:, None] * bias[None, :]
    _store_vector(grad_log_scale_ptr, i, scale * tl.sum(weight * total, 0) + grad_log_det, C)
    _store_vector(grad_bias_ptr, i, scale * tl.sum(weight * grad_shift[:, None], 0), C)
    if INVERT:
        # Element (i, k) of what is left belongs to element (row_of_step[k], step_of_row[i]) of the transposed inverse.
        inverse, step_of_row, row_of_step, _ = _eliminate(weight, C, BLOCK)
        grad_shift = _vector(grad_shift_ptr, grad_shift_strides, row_of_step, C)
        bias = _vector(bias_ptr, bias_strides, step_of_row, C)
        scale = tl.exp(_vector(log_scale_ptr, log_scale_strides, step_of_row, C))
        swapped = (grad_matrix_strides[0], grad_matrix_strides[2], grad_matrix_strides[1])
        total = _matrix(grad_matrix_ptr, swapped, step_of_row, row_of_step, C) + bias[:, None] * grad_shift[None, :]
        grad_weight = total * scale[:, None] + grad_log_det * inverse
        at = (
            grad_weight_ptr
            + tl.program_id(0).to(tl.int64) * (C * C)
            + (row_of_step[None, :] * C + step_of_row[:, None])
        )
        mask = (step_of_row < C)[:, None] & (row_of_step < C)[None, :]
        store(at, grad_weight, mask)
    else:
        _store_matrix(grad_weight_ptr, i, i, total * scale[None, :], C)
        _store_number(grad_known_ptr, grad_log_det)


@triton.jit
def _fold_inverse_backward_kernel(
    grad_matrix_ptr,
    grad_matrix_strides,
    grad_shift_ptr,
    grad_shift_strides,
    grad_log_det_ptr,
    grad_log_det_strides,
    log_scale_ptr,
    log_scale_strides,
    weight_ptr,
    weight_strides,
    grad_log_scale_ptr,
    grad_bias_ptr,
    grad_weight_ptr,
    grad_known_ptr,
    inverse_ptr,
    C,
    INVERT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dW = -(W^-T diag(exp(-log_scale)) dN + dlog_det) W^-T``, two products of columns and rows."""
    i = tl.arange(0, BLOCK)
    weight = _matrix(weight_ptr, weight_strides, i, i, C)
    left, step_of_row, row_of_step, _ = _eliminate(weight, C, BLOCK)
    _store_matrix(inverse_ptr, step_of_row, row_of_step, left, C)
    # What a thread wrote others read.
    tl.debug_barrier()
    square = (wide(C) * C, C, 1)
    inverse = _matrix(inverse_ptr, square, i, i, C)
    grad_log_det = _number(grad_log_det_ptr, grad_log_det_strides)
    scale = tl.exp(-_vector(log_scale_ptr, log_scale_strides, i, C))
    scaled_grad = _matrix(grad_matrix_ptr, grad_matrix_strides, i, i, C) * scale[:, None]
    _store_vector(grad_log_scale_ptr, i, -tl.sum(scaled_grad * inverse, 1) - grad_log_det, C)
    _store_vector(grad_bias_ptr, i, -_vector(grad_shift_ptr, grad_shift_strides, i, C), C)

    # Row i of the first product is sum_k inverse[k, i] scaled_grad[k, :].
    product = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        in_row = (i == k)[:, None]
        column = tl.sum(tl.where(in_row, inverse, 0.0), 0)
        product += column[:, None] * tl.sum(tl.where(in_row, scaled_grad, 0.0), 0)[None, :]
    if INVERT:
        product += tl.where(i[:, None] == i[None, :], grad_log_det, 0.0)
    else:
        _store_number(grad_known_ptr, -grad_log_det)
    grad_weight = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        in_column = (i == k)[None, :]
        column = tl.sum(tl.where(in_column, product, 0.0), 1)
        grad_weight -= column[:, None] * tl.sum(tl.where(in_column, inverse, 0.0), 1)[None, :]
    _store_matrix(grad_weight_ptr, i, i, grad_weight, C)


@triton.jit
def _lu_weight_kernel(
    permutation_ptr,
    permutation_strides,
    lower_ptr,
    lower_strides,
    upper_ptr,
    upper_strides,
    log_diagonal_ptr,
    log_diagonal_strides,
    sign_ptr,
    sign_strides,
    weight_ptr,
    log_det_ptr,
    C,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    permutation = _matrix(permutation_ptr, permutation_strides, i, i, C)
    log_diagonal = _vector(log_diagonal_ptr, log_diagonal_strides, i, C)
    lower, upper = _triangles(
        lower_ptr, lower_strides, upper_ptr, upper_strides, log_diagonal, sign_ptr, sign_strides, i, C
    )
    weight = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        # Column k of L, permuted, and row k of U.
        column = tl.sum(tl.where((i == k)[None, :], lower, 0.0), 1)
        column = tl.sum(permutation * column[None, :], 1)
        row = tl.sum(tl.where((i == k)[:, None], upper, 0.0), 0)
        weight += column[:, None] * row[None, :]
    _store_matrix(weight_ptr, i, i, weight, C)
    _store_number(log_det_ptr, tl.sum(log_diagonal))


@triton.jit
def _lu_weight_backward_kernel(
    grad_weight_ptr,
    grad_weight_strides,
    permutation_ptr,
    permutation_strides,
    lower_ptr,
    lower_strides,
    upper_ptr,
    upper_strides,
    grad_log_det_ptr,
    grad_log_det_strides,
    log_diagonal_ptr,
    log_diagonal_strides,
    sign_ptr,
    sign_strides,
    grad_lower_ptr,
    grad_upper_ptr,
    grad_log_diagonal_ptr,
    C,
    BLOCK: tl.constexpr,
):
    """With ``A = P^T dW``: the triangles of ``A U^T`` and ``L^T A``."""
    i = tl.arange(0, BLOCK)
    log_diagonal = _vector(log_diagonal_ptr, log_diagonal_strides, i, C)
    lower, upper = _triangles(
        lower_ptr, lower_strides, upper_ptr, upper_strides, log_diagonal, sign_ptr, sign_strides, i, C
    )
    grad_weight = _matrix(grad_weight_ptr, grad_weight_strides, i, i, C)
    permutation = _matrix(permutation_ptr, permutation_strides, i, i, C)
    permuted = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        in_row = (i == k)[:, None]
        column = tl.sum(tl.where(in_row, permutation, 0.0), 0)
        permuted += column[:, None] * tl.sum(tl.where(in_row, grad_weight, 0.0), 0)[None, :]

    grad_lower = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        in_column = (i == k)[None, :]
        column = tl.sum(tl.where(in_column, permuted, 0.0), 1)
        grad_lower += column[:, None] * tl.sum(tl.where(in_column, upper, 0.0), 1)[None, :]
    _store_matrix(grad_lower_ptr, i, i, tl.where(i[:, None] > i[None, :], grad_lower, 0.0), C)

    grad_upper = tl.zeros((BLOCK, BLOCK), tl.float64)
    for k in range(C):
        in_row = (i == k)[:, None]
        column = tl.sum(tl.where(in_row, lower, 0.0), 0)
        grad_upper += column[:, None] * tl.sum(tl.where(in_row, permuted, 0.0), 0)[None, :]
    _store_matrix(grad_upper_ptr, i, i, tl.where(i[:, None] < i[None, :], grad_upper, 0.0), C)
    of_diagonal = tl.sum(tl.where(i[:, None] == i[None, :], grad_upper * upper, 0.0), 0)
    _store_vector(grad_log_diagonal_ptr, i, of_diagonal + _number(grad_log_det_ptr, grad_log_det_strides), C)


@triton.jit
def _triangles(lower_ptr, lower_strides, upper_ptr, upper_strides, log_diagonal, sign_ptr, sign_strides, i, C):
    """L with its diagonal of ones, and U with the diagonal s, without what lies outside the triangles."""
    lower = _matrix(lower_ptr, lower_strides, i, i, C)
    lower = tl.where(i[:, None] > i[None, :], lower, tl.where(i[:, None] == i[None, :], 1.0, 0.0))
    diagonal = _vector(sign_ptr, sign_strides, i, C) * tl.exp(log_diagonal)
    upper = _matrix(upper_ptr, upper_strides, i, i, C)
    upper = tl.where(i[:, None] < i[None, :], upper, tl.where(i[:, None] == i[None, :], diagonal[None, :], 0.0))
    return lower, upper
