"""Kernels of the linear map ``z = M x + v`` and of its gradients, which ``actnorm_conv1x1.py`` launches.

A tile is ``(positions, channels)``. Products are computed the way round in which the data lie, so that what the matrix
units leave in the registers of a thread are neighbours in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import channel_offsets, multiple, row_offsets, store, wide


@triton.jit
def apply_kernel(
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
    HAS_SHIFT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of positions and of channels of z: reads all channels of x once, writes z once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    tiles_c = tl.cdiv(C, BLOCK_C)
    # Neighbours share the tile of x, which the second finds in the cache.
    rows = _rows(tl.program_id(0) // tiles_c, BLOCK_P, WIDE)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros((BLOCK_C,), matrix_ptr.dtype.element_ty)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + channels * shift_stride, channels < C, other=0.0)
    z = _product(
        x_ptr, x_strides, rows, P, count, matrix_ptr, matrix_strides, shift, channels, C,
        False, CHANNELS_LAST, VECTOR, PRECISION,
    )  # fmt: skip
    at = _tile_offsets(rows, P, channels, out_strides, CHANNELS_LAST, VECTOR)
    store(out_ptr + at, z, (rows < count)[:, None] & (channels < C)[None, :])


@triton.jit
def sums_kernel(
    grad_ptr,
    grad_strides,
    x_ptr,
    x_strides,
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
    """A share of the positions, for one block of dM: reads the channels of g and of x that it needs once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    tiles_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) % (tiles_c * tiles_c)
    share = tl.program_id(0) // (tiles_c * tiles_c)
    grad_channels = block // tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    x_channels = block % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros((BLOCK_C,), partial_ptr.dtype.element_ty)
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(share, tl.cdiv(count, BLOCK_P), tl.num_programs(0) // (tiles_c * tiles_c)):
        rows = _rows(tile, BLOCK_P, WIDE)
        grad = _tile(grad_ptr, grad_strides, rows, P, count, grad_channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        x = _tile(x_ptr, x_strides, rows, P, count, x_channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, share, grad_matrix, grad_shift, grad_channels, x_channels, C)


@triton.jit
def backward_kernel(
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
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
):
    """Every ``num_programs``-th tile of positions: reads g and x once, writes dx once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    channels = tl.arange(0, BLOCK_C)
    zero = tl.zeros((BLOCK_C,), matrix_ptr.dtype.element_ty)
    transposed = (matrix_strides[1], matrix_strides[0])
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        rows = _rows(tile, BLOCK_P, WIDE)
        grad_x = _product(
            grad_ptr, grad_strides, rows, P, count, matrix_ptr, transposed, zero, channels, C,
            BLOCK_C <= 32, CHANNELS_LAST, VECTOR, PRECISION,
        )  # fmt: skip
        grad = _tile(grad_ptr, grad_strides, rows, P, count, channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        x = _tile(x_ptr, x_strides, rows, P, count, channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        at = _tile_offsets(rows, P, channels, grad_x_strides, CHANNELS_LAST, VECTOR)
        store(grad_x_ptr + at, grad_x, (rows < count)[:, None] & (channels < C)[None, :])
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=SUM_PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, tl.program_id(0), grad_matrix, grad_shift, channels, channels, C)


@triton.jit
def reversible_backward_kernel(
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
    SUM_PRECISION: tl.constexpr,
):
    """Every ``num_programs``-th tile of positions: reads g and z once, writes x and dx once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    channels = tl.arange(0, BLOCK_C)
    shift = tl.load(inverse_shift_ptr + channels * inverse_shift_stride, channels < C, other=0.0)
    zero = tl.zeros((BLOCK_C,), shift.dtype)
    transposed = (matrix_strides[1], matrix_strides[0])
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        rows = _rows(tile, BLOCK_P, WIDE)
        x = _product(
            z_ptr, z_strides, rows, P, count, inverse_ptr, inverse_strides, shift, channels, C,
            BLOCK_C <= 32, CHANNELS_LAST, VECTOR, PRECISION,
        )  # fmt: skip
        grad_x = _product(
            grad_ptr, grad_strides, rows, P, count, matrix_ptr, transposed, zero, channels, C,
            BLOCK_C <= 32, CHANNELS_LAST, VECTOR, PRECISION,
        )  # fmt: skip
        grad = _tile(grad_ptr, grad_strides, rows, P, count, channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        at = _tile_offsets(rows, P, channels, out_strides, CHANNELS_LAST, VECTOR)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        store(x_ptr + at, x, mask)
        store(grad_x_ptr + at, grad_x, mask)
        # Outside, where x is the shift, grad is zero.
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=SUM_PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, tl.program_id(0), grad_matrix, grad_shift, channels, channels, C)


@triton.jit
def _rows(tile, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        tile = wide(tile)
    return tile * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _tile_offsets(rows, P, channels, strides, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    rows_at = row_offsets(rows, P, strides, CHANNELS_LAST, VECTOR)
    return rows_at[:, None] + channel_offsets(channels, strides, CHANNELS_LAST, VECTOR)[None, :]


@triton.jit
def _tile(
    ptr, strides, rows, P, count, channels, C, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr
):
    mask = (rows < count)[:, None] & (channels < C)[None, :]
    at = _tile_offsets(rows, P, channels, strides, CHANNELS_LAST, VECTOR)
    return tl.load(ptr + at, mask, other=0.0).to(dtype)


@triton.jit
def _product(
    x_ptr,
    x_strides,
    rows,
    P,
    count,
    matrix_ptr,
    matrix_strides,
    shift,
    channels,
    C,
    UNROLLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum_j M[channels, j] x[j] + shift``, read 16 channels of x at a time.

    So a dot product on the arithmetic units has room in the registers, and one on the matrix units, which cut off what
    does not fit, rounds its sum of 16 terms to the nearest.
    """
    if CHANNELS_LAST:
        out = tl.zeros((rows.shape[0], channels.shape[0]), shift.dtype) + shift[None, :]
    else:
        out = tl.zeros((channels.shape[0], rows.shape[0]), shift.dtype) + shift[:, None]
    # Unrolled, so that a loop over tiles is the innermost one: the compiler issues loads ahead of that one only.
    if UNROLLED:
        for first in tl.static_range(0, channels.shape[0], 16):
            some = first + tl.arange(0, 16)
            x = _tile(x_ptr, x_strides, rows, P, count, some, C, shift.dtype, CHANNELS_LAST, VECTOR)
            out = _add_product(out, x, matrix_ptr, matrix_strides, channels, some, C, CHANNELS_LAST, PRECISION)
    else:
        for first in range(0, C, 16):
            some = first + tl.arange(0, 16)
            x = _tile(x_ptr, x_strides, rows, P, count, some, C, shift.dtype, CHANNELS_LAST, VECTOR)
            out = _add_product(out, x, matrix_ptr, matrix_strides, channels, some, C, CHANNELS_LAST, PRECISION)
    return out if CHANNELS_LAST else tl.trans(out)


@triton.jit
def _add_product(
    out, x, matrix_ptr, matrix_strides, channels, some, C, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr
):
    """``out + M[channels, some] x``, the way round in which the data lie."""
    at = channels[None, :] * matrix_strides[0] + some[:, None] * matrix_strides[1]
    columns = tl.load(matrix_ptr + at, (channels < C)[None, :] & (some < C)[:, None], other=0.0)
    if CHANNELS_LAST:
        return tl.dot(x, columns, out, input_precision=PRECISION, out_dtype=out.dtype)
    else:
        return tl.dot(tl.trans(columns), tl.trans(x), out, input_precision=PRECISION, out_dtype=out.dtype)


@triton.jit
def _store_partial(partial_ptr, part, grad_matrix, grad_shift, grad_channels, x_channels, C):
    """A block of ``dM``, then ``dv``, in the sums of one part."""
    at = partial_ptr + part.to(tl.int64) * (C * (C + 1))
    block = (grad_channels < C)[:, None] & (x_channels < C)[None, :]
    tl.store(at + grad_channels[:, None] * C + x_channels[None, :], grad_matrix, block)
    # The first of a row of blocks writes the sums of g, which all of them have.
    end = tl.where(tl.min(x_channels, 0) == 0, C, 0)
    tl.store(at + C * C + grad_channels, grad_shift, grad_channels < end)
