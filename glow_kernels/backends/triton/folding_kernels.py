"""Kernels of the C x C half of ``actnorm_conv1x1``, which ``folding.py`` launches: one program per matrix.

All arithmetic is in float64, in registers, for up to 64 channels. Inverses and determinants are by Gauss-Jordan
elimination in place with partial pivoting, without moving rows: step k takes the largest element of column k among the
rows not yet taken, row ``row_of_step[k]``, and element (i, k) of what is left is element
``(step_of_row[i], row_of_step[k])`` of the inverse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import store, wide


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
def fold_kernel(
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
def fold_inverse_kernel(
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
def fold_backward_kernel(
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
def fold_inverse_backward_kernel(
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
def lu_weight_kernel(
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
def lu_weight_backward_kernel(
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
