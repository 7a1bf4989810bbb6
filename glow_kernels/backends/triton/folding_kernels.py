"""Kernels of the C x C half of ``actnorm_conv1x1``, which ``folding.py`` launches: one program per matrix.

All arithmetic is in float64, in registers, for up to 64 channels. Inverses and determinants are computed by in-place
Gauss-Jordan elimination with partial pivoting, without moving rows: the pivot of step k is the largest element of
column k in the rows that have not been pivots yet, in row ``row_of_step[k]``. At the end, element (i, k) is element
``(step_of_row[i], row_of_step[k])`` of the inverse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import kernel, store


@triton.jit
def _vector(ptr, strides, i, C):
    """The vector of this program, in float64, padded with zeros beyond C."""
    at = ptr + tl.program_id(0).to(tl.int64) * strides[0] + i * strides[1]
    return tl.load(at, i < C, other=0.0).to(tl.float64)


@triton.jit
def _matrix(ptr, strides, rows, columns, C):
    """Elements of the matrix of this program, in float64, padded with zeros beyond C."""
    at = ptr + tl.program_id(0).to(tl.int64) * strides[0] + (rows[:, None] * strides[1] + columns[None, :] * strides[2])
    return tl.load(at, (rows < C)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _number(ptr, stride):
    """The number of this program, in float64."""
    return tl.load(ptr + tl.program_id(0).to(tl.int64) * stride).to(tl.float64)


@triton.jit
def _store_vector(ptr, i, values, C):
    """Store a vector in a contiguous (*K, C)."""
    store(ptr + tl.program_id(0).to(tl.int64) * C + i, values, i < C)


@triton.jit
def _store_matrix(ptr, rows, columns, values, C):
    """Store elements of a matrix in a contiguous (*K, C, C)."""
    at = ptr + tl.program_id(0).to(tl.int64) * (C * C) + (rows[:, None] * C + columns[None, :])
    store(at, values, (rows < C)[:, None] & (columns < C)[None, :])


@triton.jit
def _store_number(ptr, value):
    store(ptr + tl.program_id(0), value, True)


@triton.jit
def _eliminate(left, C, BLOCK: tl.constexpr):
    """The eliminated matrix, step_of_row and row_of_step (indices beyond C if there are none), and log|det|."""
    i = tl.arange(0, BLOCK)
    step_of_row = tl.full((BLOCK,), BLOCK, tl.int32)
    row_of_step = tl.full((BLOCK,), BLOCK, tl.int32)
    pivots = tl.full((BLOCK,), 1.0, tl.float64)
    for k in range(C):
        in_column = (i == k)[None, :]
        column = tl.sum(tl.where(in_column, left, 0.0), 1)
        candidates = tl.where((step_of_row == BLOCK) & (i < C), tl.abs(column), -1.0)
        row = tl.argmax(candidates, 0)
        in_row = (i == row)[:, None]
        pivot_row = tl.sum(tl.where(in_row, left, 0.0), 0)
        pivot = tl.sum(tl.where(i == row, column, 0.0), 0)
        pivots = tl.where(i == k, pivot, pivots)
        scaled = tl.where(i == k, 1.0, pivot_row) * (1.0 / pivot)
        left = tl.where(in_row, 0.0, tl.where(in_column, 0.0, left) - column[:, None] * scaled[None, :])
        left = tl.where(in_row, scaled[None, :], left)
        step_of_row = tl.where(i == row, k, step_of_row)
        row_of_step = tl.where(i == k, row, row_of_step)
    # A pivot of zero makes the determinant zero, even if infinities follow.
    singular = tl.max((pivots == 0.0).to(tl.int32), 0) > 0
    log_det = tl.where(singular, float("-inf"), tl.sum(tl.log(tl.abs(pivots)), 0))
    return left, step_of_row, row_of_step, log_det


@triton.jit
def _product(a, b, C, TRANSPOSE_A: tl.constexpr, TRANSPOSE_B: tl.constexpr):
    """Product of two matrices, either of which may be transposed, as a sum of outer products."""
    i = tl.arange(0, a.shape[0])
    out = tl.zeros(a.shape, tl.float64)
    for k in range(C):
        in_row = (i == k)[:, None]
        in_column = (i == k)[None, :]
        column = tl.sum(tl.where(in_row if TRANSPOSE_A else in_column, a, 0.0), 0 if TRANSPOSE_A else 1)
        row = tl.sum(tl.where(in_column if TRANSPOSE_B else in_row, b, 0.0), 1 if TRANSPOSE_B else 0)
        out += column[:, None] * row[None, :]
    return out


@kernel
def fold_kernel(
    log_scale_ptr, log_scale_k, log_scale_i, bias_ptr, bias_k, bias_i, weight_ptr, weight_k, weight_i, weight_j,
    known_ptr, known_k, matrix_ptr, shift_ptr, log_det_ptr, C: tl.int32,
    INVERSE: tl.constexpr, KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Matrix, shift and log-determinant of either direction."""
    i = tl.arange(0, BLOCK)
    log_scale_strides = (log_scale_k, log_scale_i)
    log_scale = _vector(log_scale_ptr, log_scale_strides, i, C)
    bias = _vector(bias_ptr, (bias_k, bias_i), i, C)
    weight = _matrix(weight_ptr, (weight_k, weight_i, weight_j), i, i, C)
    if not INVERSE:
        matrix = weight * tl.exp(log_scale)[None, :]
        _store_matrix(matrix_ptr, i, i, matrix, C)
        _store_vector(shift_ptr, i, tl.sum(matrix * bias[None, :], 1), C)
    if INVERSE or not KNOWN:
        left, step_of_row, row_of_step, log_det = _eliminate(weight, C, BLOCK)
    if INVERSE:
        scale = tl.exp(-_vector(log_scale_ptr, log_scale_strides, step_of_row, C))
        _store_matrix(matrix_ptr, step_of_row, row_of_step, left * scale[:, None], C)
        _store_vector(shift_ptr, i, -bias, C)
    if KNOWN:
        log_det = _number(known_ptr, known_k)
    log_det += tl.sum(log_scale)
    _store_number(log_det_ptr, -log_det if INVERSE else log_det)


@kernel
def fold_backward_kernel(
    grad_matrix_ptr, grad_matrix_k, grad_matrix_i, grad_matrix_j, grad_shift_ptr, grad_shift_k, grad_shift_i,
    grad_log_det_ptr, grad_log_det_k,
    log_scale_ptr, log_scale_k, log_scale_i, bias_ptr, bias_k, bias_i, weight_ptr, weight_k, weight_i, weight_j,
    grad_log_scale_ptr, grad_bias_ptr, grad_weight_ptr, grad_known_ptr, C: tl.int32,
    INVERT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dW = (dM + dv b^T) diag(s)``, and with INVERT ``dlog_det W^-T``."""
    grad_shift_strides = (grad_shift_k, grad_shift_i)
    log_scale_strides = (log_scale_k, log_scale_i)
    bias_strides = (bias_k, bias_i)
    i = tl.arange(0, BLOCK)
    grad_log_det = _number(grad_log_det_ptr, grad_log_det_k)
    grad_shift = _vector(grad_shift_ptr, grad_shift_strides, i, C)
    bias = _vector(bias_ptr, bias_strides, i, C)
    scale = tl.exp(_vector(log_scale_ptr, log_scale_strides, i, C))
    weight = _matrix(weight_ptr, (weight_k, weight_i, weight_j), i, i, C)
    total = (
        _matrix(grad_matrix_ptr, (grad_matrix_k, grad_matrix_i, grad_matrix_j), i, i, C)
        + grad_shift[:, None] * bias[None, :]
    )
    _store_vector(grad_log_scale_ptr, i, scale * tl.sum(weight * total, 0) + grad_log_det, C)
    _store_vector(grad_bias_ptr, i, scale * tl.sum(weight * grad_shift[:, None], 0), C)
    if INVERT:
        # Element (i, k) of the eliminated matrix is element (row_of_step[k], step_of_row[i]) of the transposed inverse.
        inverse, step_of_row, row_of_step, _ = _eliminate(weight, C, BLOCK)
        grad_shift = _vector(grad_shift_ptr, grad_shift_strides, row_of_step, C)
        bias = _vector(bias_ptr, bias_strides, step_of_row, C)
        scale = tl.exp(_vector(log_scale_ptr, log_scale_strides, step_of_row, C))
        swapped = (grad_matrix_k, grad_matrix_j, grad_matrix_i)
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


@kernel
def fold_inverse_backward_kernel(
    grad_matrix_ptr, grad_matrix_k, grad_matrix_i, grad_matrix_j, grad_shift_ptr, grad_shift_k, grad_shift_i,
    grad_log_det_ptr, grad_log_det_k, log_scale_ptr, log_scale_k, log_scale_i, weight_ptr, weight_k, weight_i, weight_j,
    grad_log_scale_ptr, grad_bias_ptr, grad_weight_ptr, grad_known_ptr, inverse_ptr, C: tl.int32,
    INVERT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dW = -(W^-T diag(exp(-log_scale)) dN + dlog_det) W^-T``, as two sums of outer products."""
    i = tl.arange(0, BLOCK)
    weight = _matrix(weight_ptr, (weight_k, weight_i, weight_j), i, i, C)
    left, step_of_row, row_of_step, _ = _eliminate(weight, C, BLOCK)
    _store_matrix(inverse_ptr, step_of_row, row_of_step, left, C)
    # Other threads read what this one has written.
    tl.debug_barrier()
    inverse = _matrix(inverse_ptr, (C.to(tl.int64) * C, C, 1), i, i, C)
    grad_log_det = _number(grad_log_det_ptr, grad_log_det_k)
    scale = tl.exp(-_vector(log_scale_ptr, (log_scale_k, log_scale_i), i, C))
    grad_matrix = _matrix(grad_matrix_ptr, (grad_matrix_k, grad_matrix_i, grad_matrix_j), i, i, C)
    scaled_grad = grad_matrix * scale[:, None]
    _store_vector(grad_log_scale_ptr, i, -tl.sum(scaled_grad * inverse, 1) - grad_log_det, C)
    _store_vector(grad_bias_ptr, i, -_vector(grad_shift_ptr, (grad_shift_k, grad_shift_i), i, C), C)

    product = _product(inverse, scaled_grad, C, True, False)
    if INVERT:
        product += tl.where(i[:, None] == i[None, :], grad_log_det, 0.0)
    else:
        _store_number(grad_known_ptr, -grad_log_det)
    _store_matrix(grad_weight_ptr, i, i, -_product(product, inverse, C, False, True), C)


@kernel
def lu_weight_kernel(
    permutation_ptr, permutation_k, permutation_i, permutation_j, lower_ptr, lower_k, lower_i, lower_j,
    upper_ptr, upper_k, upper_i, upper_j, log_diagonal_ptr, log_diagonal_k, log_diagonal_i, sign_ptr, sign_k, sign_i,
    weight_ptr, log_det_ptr, C: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """``P L (U + diag(s))``, and its log-determinant."""
    i = tl.arange(0, BLOCK)
    log_diagonal = _vector(log_diagonal_ptr, (log_diagonal_k, log_diagonal_i), i, C)
    sign = _vector(sign_ptr, (sign_k, sign_i), i, C)
    lower, upper = _triangles(
        lower_ptr, (lower_k, lower_i, lower_j), upper_ptr, (upper_k, upper_i, upper_j), log_diagonal, sign, i, C
    )
    weight = _product(lower, upper, C, False, False)
    # Loaded only now: the registers hold no more than three matrices.
    permutation = _matrix(permutation_ptr, (permutation_k, permutation_i, permutation_j), i, i, C)
    _store_matrix(weight_ptr, i, i, _product(permutation, weight, C, False, False), C)
    _store_number(log_det_ptr, tl.sum(log_diagonal))


@kernel
def lu_weight_backward_kernel(
    grad_weight_ptr, grad_weight_k, grad_weight_i, grad_weight_j,
    permutation_ptr, permutation_k, permutation_i, permutation_j, lower_ptr, lower_k, lower_i, lower_j,
    upper_ptr, upper_k, upper_i, upper_j, grad_log_det_ptr, grad_log_det_k,
    log_diagonal_ptr, log_diagonal_k, log_diagonal_i, sign_ptr, sign_k, sign_i,
    grad_lower_ptr, grad_upper_ptr, grad_log_diagonal_ptr, C: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """With ``A = P^T dW``: the triangles of ``A U^T`` and ``L^T A``."""
    i = tl.arange(0, BLOCK)
    grad_weight = _matrix(grad_weight_ptr, (grad_weight_k, grad_weight_i, grad_weight_j), i, i, C)
    permutation = _matrix(permutation_ptr, (permutation_k, permutation_i, permutation_j), i, i, C)
    permuted = _product(permutation, grad_weight, C, True, False)
    log_diagonal = _vector(log_diagonal_ptr, (log_diagonal_k, log_diagonal_i), i, C)
    sign = _vector(sign_ptr, (sign_k, sign_i), i, C)
    lower, upper = _triangles(
        lower_ptr, (lower_k, lower_i, lower_j), upper_ptr, (upper_k, upper_i, upper_j), log_diagonal, sign, i, C
    )
    grad_lower = _product(permuted, upper, C, False, True)
    _store_matrix(grad_lower_ptr, i, i, tl.where(i[:, None] > i[None, :], grad_lower, 0.0), C)
    grad_upper = _product(lower, permuted, C, True, False)
    _store_matrix(grad_upper_ptr, i, i, tl.where(i[:, None] < i[None, :], grad_upper, 0.0), C)
    of_diagonal = tl.sum(tl.where(i[:, None] == i[None, :], grad_upper * upper, 0.0), 0)
    _store_vector(grad_log_diagonal_ptr, i, of_diagonal + _number(grad_log_det_ptr, grad_log_det_k), C)


@triton.jit
def _triangles(lower_ptr, lower_strides, upper_ptr, upper_strides, log_diagonal, sign, i, C):
    """L with a diagonal of ones and U with the diagonal s; values outside the triangles are ignored."""
    lower = _matrix(lower_ptr, lower_strides, i, i, C)
    lower = tl.where(i[:, None] > i[None, :], lower, tl.where(i[:, None] == i[None, :], 1.0, 0.0))
    diagonal = sign * tl.exp(log_diagonal)
    upper = _matrix(upper_ptr, upper_strides, i, i, C)
    upper = tl.where(i[:, None] < i[None, :], upper, tl.where(i[:, None] == i[None, :], diagonal[None, :], 0.0))
    return lower, upper
