"""Kernels of ``z = M x + v`` and of its sums for more channels than a program holds, and for float64.

A tile is ``(positions, channels)``. Products are computed transposed or not to match the memory order of the data, so
that the elements that tensor cores leave in the registers of a thread are adjacent in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import kernel, row_pointers, row_sizes, store


@kernel
def wide_apply_kernel(
    x_ptr, x_b, x_c, x_p, out_ptr, out_b, out_c, out_p, shift_ptr, shift_i,
    matrix_ptr, matrix_i: tl.int32, matrix_j: tl.int32, C: tl.int32, P: tl.int32, count: tl.int32,
    HAS_SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile of positions and of channels of z: reads all channels of x once, writes z once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    tiles_c = tl.cdiv(C, BLOCK_C)
    # Neighbouring programs share the tile of x, so that the second finds it in the cache.
    rows = tl.program_id(0) // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros((BLOCK_C,), matrix_ptr.dtype.element_ty)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + channels * shift_i, channels < C, other=0.0)
    z = _product(
        x_ptr, (x_b, x_c, x_p), rows, P, count, matrix_ptr, matrix_i, matrix_j, shift, channels, C,
        CHANNELS_LAST, VECTOR, PRECISION,
    )  # fmt: skip
    at = row_pointers(out_ptr, (out_b, out_c, out_p), rows, P, channels, CHANNELS_LAST, VECTOR)
    store(at, z, (rows < count)[:, None] & (channels < C)[None, :])


@kernel
def wide_sums_kernel(
    grad_ptr, grad_b, grad_c, grad_p, x_ptr, x_b, x_c, x_p, partial_ptr,
    C: tl.int32, P: tl.int32, count: tl.int32,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A share of the positions, for one block of dM: reads the channels of g and of x that it needs once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    tiles_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) % (tiles_c * tiles_c)
    share = tl.program_id(0) // (tiles_c * tiles_c)
    grad_channels = block // tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    x_channels = block % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros((BLOCK_C,), partial_ptr.dtype.element_ty)
    grad_matrix = tl.zeros((BLOCK_C, BLOCK_C), zero.dtype)
    grad_shift = zero
    for tile in range(share, tl.cdiv(count, BLOCK_P), tl.num_programs(0) // (tiles_c * tiles_c)):
        rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        grad = _tile(
            grad_ptr, (grad_b, grad_c, grad_p), rows, P, count, grad_channels, C, zero.dtype, CHANNELS_LAST, VECTOR
        )
        x = _tile(x_ptr, (x_b, x_c, x_p), rows, P, count, x_channels, C, zero.dtype, CHANNELS_LAST, VECTOR)
        grad_matrix = tl.dot(tl.trans(grad), x, grad_matrix, input_precision=PRECISION, out_dtype=zero.dtype)
        grad_shift += tl.sum(grad, 0)
    _store_partial(partial_ptr, share, grad_matrix, grad_shift, grad_channels, x_channels, C)


@triton.jit
def _tile(
    ptr, strides, rows, P, count, channels, C, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr
):
    at = row_pointers(ptr, strides, rows, P, channels, CHANNELS_LAST, VECTOR)
    return tl.load(at, (rows < count)[:, None] & (channels < C)[None, :], other=0.0).to(dtype)


@triton.jit
def _product(
    x_ptr, x_strides, rows, P, count, matrix_ptr, matrix_i, matrix_j, shift, channels, C,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum_j M[channels, j] x[j] + shift``, reading 16 channels of x at a time, transposed if they are contiguous.

    So a dot product without tensor cores fits into the registers, and one on tensor cores, which truncate partial sums,
    has its sums of 16 terms rounded to the nearest.
    """
    if CHANNELS_LAST:
        out = tl.zeros((rows.shape[0], channels.shape[0]), shift.dtype) + shift[None, :]
    else:
        out = tl.zeros((channels.shape[0], rows.shape[0]), shift.dtype) + shift[:, None]
    for first in range(0, C, 16):
        some = first + tl.arange(0, 16)
        x_at = row_pointers(x_ptr, x_strides, rows, P, some, CHANNELS_LAST, VECTOR, not CHANNELS_LAST)
        at = channels[None, :] * matrix_i + some[:, None] * matrix_j
        columns = tl.load(matrix_ptr + at, (channels < C)[None, :] & (some < C)[:, None], other=0.0)
        if CHANNELS_LAST:
            x = tl.load(x_at, (rows < count)[:, None] & (some < C)[None, :], other=0.0).to(out.dtype)
            out = tl.dot(x, columns, out, input_precision=PRECISION, out_dtype=out.dtype)
        else:
            # Otherwise, for tensor cores of compute capability 8, Triton would copy x 4 bytes at a time.
            x = tl.load(x_at, (rows < count)[None, :] & (some < C)[:, None], other=0.0).to(out.dtype)
            out = tl.dot(tl.trans(columns), x, out, input_precision=PRECISION, out_dtype=out.dtype)
    return out if CHANNELS_LAST else tl.trans(out)


@triton.jit
def _store_partial(partial_ptr, part, grad_matrix, grad_shift, grad_channels, x_channels, C):
    """Store a block of ``dM``, then ``dv``, in the sums of one part."""
    at = partial_ptr + part.to(tl.int64) * (C * (C + 1))
    block = (grad_channels < C)[:, None] & (x_channels < C)[None, :]
    tl.store(at + grad_channels[:, None] * C + x_channels[None, :], grad_matrix, block)
    # All programs of a row of blocks have the sums of g; the first one stores them.
    end = tl.where(tl.min(x_channels, 0) == 0, C, 0)
    tl.store(at + C * C + grad_channels, grad_shift, grad_channels < end)
