"""Triton kernels of ``actnorm_conv1x1``; the mathematics stands in ``glow_kernels.ops.actnorm_conv1x1``.

The folding stands in ``folding.py``; here are the kernels over the data, for up to 64 channels. A program holds all
channels of a tile of positions, so each kernel reads and writes every element once:

===========================  =============  ==============
kernel                       reads          writes
===========================  =============  ==============
apply                        x              z
backward                     g, x           dx
reversible backward          g, z           x, dx
===========================  =============  ==============

and the matrices, and one partial sum of ``dM`` and ``dv`` per program; the backwards find ``g`` once more in the cache.
``z``, ``x`` and ``dx`` are in IEEE float32. The sum ``dM`` is on the matrix units, on NVIDIA in three passes of TF32,
which together have the accuracy of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import output_format
from glow_kernels.backends.triton.device_functions import channel_offsets, multiple, row_offsets, store, wide
from glow_kernels.backends.triton.folding import (
    fold,
    fold_backward,
    fold_inverse,
    fold_inverse_backward,
    lu_weight,
    lu_weight_backward,
)
from glow_kernels.backends.triton.launch import Rows, launch, multiprocessors, power_of_two, rows_of
from glow_kernels.backends.triton.sums import sum_partial

__all__ = [
    "apply",
    "apply_backward",
    "apply_reversible_backward",
    "fold",
    "fold_backward",
    "fold_inverse",
    "fold_inverse_backward",
    "lu_weight",
    "lu_weight_backward",
]


def apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z_p = M x_p + v`` at every position p of ``x`` (B, C, *spatial)."""
    result = torch.empty_like(x, memory_format=output_format(x))
    if x.numel() == 0:
        return result
    rows = _rows_of("linear", x, result)
    data, out = rows.planes
    launch(
        _apply_kernel,
        rows.tiles,
        x,
        *(data, data.stride(), matrix, matrix.stride(), shift, shift.stride(0), out, out.stride()),
        *data.shape[1:],
        rows.count,
        **rows.options,
    )
    return result


def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``apply``: ``M^T g`` (or nothing), ``sum g x^T``, ``sum g`` (sums over samples and positions)."""
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    channels = x.shape[1]
    if x.numel() == 0:
        return grad_x, matrix.new_zeros(channels, channels), matrix.new_zeros(channels)
    rows = _rows_of("linear_backward", x, grad, grad_x if needs_grad_x else x)
    data, g, dx = rows.planes
    programs = min(rows.tiles, 4 * multiprocessors(x.device))
    partial = matrix.new_empty(programs, channels * (channels + 1))
    launch(
        _backward_kernel,
        programs,
        x,
        *(g, g.stride(), data, data.stride(), matrix, matrix.stride(), dx, dx.stride(), partial),
        *data.shape[1:],
        rows.count,
        **rows.options,
        NEEDS_GRAD_X=needs_grad_x,
        PRECISION=_sum_precision(matrix),
    )
    return grad_x, *_sums(partial, channels)


def apply_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x = M^-1 z - b`` of ``apply`` and its gradients in x, matrix and shift."""
    x, grad_x = (torch.empty_like(z, memory_format=output_format(z)) for _ in range(2))
    channels = z.shape[1]
    if z.numel() == 0:
        return x, grad_x, matrix.new_zeros(channels, channels), matrix.new_zeros(channels)
    rows = _rows_of("linear_backward", z, grad, x, grad_x)
    data, g, undone, dx = rows.planes
    programs = min(rows.tiles, 4 * multiprocessors(z.device))
    partial = matrix.new_empty(programs, channels * (channels + 1))
    launch(
        _reversible_backward_kernel,
        programs,
        z,
        *(g, g.stride(), data, data.stride(), matrix, matrix.stride(), inverse, inverse.stride()),
        *(inverse_shift, inverse_shift.stride(0), undone, dx, dx.stride(), partial),
        *data.shape[1:],
        rows.count,
        **rows.options,
        PRECISION=_sum_precision(matrix),
    )
    return x, grad_x, *_sums(partial, channels)


def _rows_of(family: str, x: Tensor, *others: Tensor) -> Rows:
    # A dot product has at least 16 rows and columns.
    block_c = max(16, power_of_two(x.shape[1]))
    return rows_of(f"{family}_{block_c}", (x, *others), block_c)


def _sum_precision(matrix: Tensor) -> str:
    return "ieee" if torch.version.hip or matrix.dtype == torch.float64 else "tf32x3"


def _sums(partial: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    total = sum_partial(partial, 0)
    # Results of an operator share no memory.
    return total[: channels * channels].view(channels, channels), total[channels * channels :].clone()


@triton.jit
def _apply_kernel(
    x_ptr,
    x_strides,
    matrix_ptr,
    matrix_strides,
    shift_ptr,
    shift_stride,
    out_ptr,
    out_strides,
    C,
    P,
    count,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of positions: reads x once, writes z once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    channels = tl.arange(0, BLOCK_C)
    rows = _rows(tl.program_id(0), BLOCK_P, WIDE)
    shift = tl.load(shift_ptr + channels * shift_stride, channels < C, other=0.0)
    x_at = row_offsets(rows, P, x_strides, CHANNELS_LAST, VECTOR)
    z = _product(
        x_ptr, x_at, x_strides, matrix_ptr, matrix_strides, shift, rows < count, C, BLOCK_C, CHANNELS_LAST, VECTOR
    )
    mask = (rows < count)[:, None] & (channels < C)[None, :]
    out_at = row_offsets(rows, P, out_strides, CHANNELS_LAST, VECTOR)
    out_channels = channel_offsets(channels, out_strides, CHANNELS_LAST, VECTOR)
    store(out_ptr + (out_at[:, None] + out_channels[None, :]), z, mask)


@triton.jit
def _backward_kernel(
    grad_ptr,
    grad_strides,
    x_ptr,
    x_strides,
    matrix_ptr,
    matrix_strides,
    grad_x_ptr,
    grad_x_strides,
    partial_ptr,
    C,
    P,
    count,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    NEEDS_GRAD_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every ``num_programs``-th tile of positions: reads g and x once, writes dx once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    channels = tl.arange(0, BLOCK_C)
    transposed = (matrix_strides[1], matrix_strides[0])
    zero = tl.zeros((BLOCK_C,), matrix_ptr.dtype.element_ty)
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        rows = _rows(tile, BLOCK_P, WIDE)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        grad_at = row_offsets(rows, P, grad_strides, CHANNELS_LAST, VECTOR)
        if NEEDS_GRAD_X:
            grad_x = _product(
                grad_ptr, grad_at, grad_strides, matrix_ptr, transposed, zero, rows < count, C,
                BLOCK_C, CHANNELS_LAST, VECTOR,
            )  # fmt: skip
            at = row_offsets(rows, P, grad_x_strides, CHANNELS_LAST, VECTOR)[:, None]
            at += channel_offsets(channels, grad_x_strides, CHANNELS_LAST, VECTOR)[None, :]
            store(grad_x_ptr + at, grad_x, mask)
        grad = _tile(grad_ptr, grad_at, grad_strides, channels, mask, zero.dtype, CHANNELS_LAST, VECTOR)
        x_at = row_offsets(rows, P, x_strides, CHANNELS_LAST, VECTOR)
        x = _tile(x_ptr, x_at, x_strides, channels, mask, zero.dtype, CHANNELS_LAST, VECTOR)
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, grad_matrix, grad_shift, channels, C)


@triton.jit
def _reversible_backward_kernel(
    grad_ptr,
    grad_strides,
    z_ptr,
    z_strides,
    matrix_ptr,
    matrix_strides,
    inverse_ptr,
    inverse_strides,
    inverse_shift_ptr,
    inverse_shift_stride,
    x_ptr,
    grad_x_ptr,
    out_strides,
    partial_ptr,
    C,
    P,
    count,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every ``num_programs``-th tile of positions: reads g and z once, writes x and dx once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    channels = tl.arange(0, BLOCK_C)
    transposed = (matrix_strides[1], matrix_strides[0])
    zero = tl.zeros((BLOCK_C,), matrix_ptr.dtype.element_ty)
    shift = tl.load(inverse_shift_ptr + channels * inverse_shift_stride, channels < C, other=0.0)
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        rows = _rows(tile, BLOCK_P, WIDE)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        z_at = row_offsets(rows, P, z_strides, CHANNELS_LAST, VECTOR)
        x = _product(
            z_ptr, z_at, z_strides, inverse_ptr, inverse_strides, shift, rows < count, C, BLOCK_C, CHANNELS_LAST, VECTOR
        )
        x = tl.where(mask, x, 0.0)
        grad_at = row_offsets(rows, P, grad_strides, CHANNELS_LAST, VECTOR)
        grad_x = _product(
            grad_ptr, grad_at, grad_strides, matrix_ptr, transposed, zero, rows < count, C,
            BLOCK_C, CHANNELS_LAST, VECTOR,
        )  # fmt: skip
        at = row_offsets(rows, P, out_strides, CHANNELS_LAST, VECTOR)[:, None]
        at += channel_offsets(channels, out_strides, CHANNELS_LAST, VECTOR)[None, :]
        store(x_ptr + at, x, mask)
        store(grad_x_ptr + at, grad_x, mask)
        grad = _tile(grad_ptr, grad_at, grad_strides, channels, mask, zero.dtype, CHANNELS_LAST, VECTOR)
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, grad_matrix, grad_shift, channels, C)


@triton.jit
def _rows(tile, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        tile = wide(tile)
    return tile * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _tile(ptr, at, strides, channels, mask, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    channels_at = channel_offsets(channels, strides, CHANNELS_LAST, VECTOR)
    return tl.load(ptr + (at[:, None] + channels_at[None, :]), mask, other=0.0).to(dtype)


@triton.jit
def _product(
    x_ptr,
    x_at,
    x_strides,
    matrix_ptr,
    matrix_strides,
    shift,
    inside,
    C,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``sum_j M[:, j] x[j] + shift`` in IEEE arithmetic, of the rows at ``x_at`` that are ``inside``."""
    channels = tl.arange(0, BLOCK_C)
    out = tl.zeros((x_at.shape[0], BLOCK_C), shift.dtype) + shift[None, :]
    # 16 channels at a time: a dot product on the arithmetic units keeps its operands in registers.
    for first in range(0, C, 16):
        some = first + tl.arange(0, 16)
        at = x_at[:, None] + channel_offsets(some, x_strides, CHANNELS_LAST, VECTOR)[None, :]
        x = tl.load(x_ptr + at, inside[:, None] & (some < C)[None, :], other=0.0).to(shift.dtype)
        at = channels[None, :] * matrix_strides[0] + some[:, None] * matrix_strides[1]
        columns = tl.load(matrix_ptr + at, (channels < C)[None, :] & (some < C)[:, None], other=0.0)
        out = tl.dot(x, columns, out, input_precision="ieee", out_dtype=shift.dtype)
    return out


@triton.jit
def _store_partial(partial_ptr, grad_matrix, grad_shift, channels, C):
    """``dM``, then ``dv``, of one program."""
    at = partial_ptr + tl.program_id(0).to(tl.int64) * (C * (C + 1))
    square = (channels < C)[:, None] & (channels < C)[None, :]
    tl.store(at + channels[:, None] * C + channels[None, :], grad_matrix, square)
    tl.store(at + C * C + channels, grad_shift, channels < C)
