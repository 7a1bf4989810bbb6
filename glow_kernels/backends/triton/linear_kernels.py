"""Kernels of the linear map ``z = M x + v`` and of its gradients, which ``actnorm_conv1x1.py`` launches.

A program holds all channels of a tile of positions, in tuples of tiles ``(16 channels, positions)``, so that 48
channels take 9 products of blocks, not the 16 of 64 channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import kernel, row_pointers, row_sizes, store


@kernel
def apply_kernel(
    x_ptr, x_b, x_c, x_p, out_ptr, out_b, out_c, out_p, shift_ptr, shift_i,
    matrix_ptr, matrix_i: tl.int32, matrix_j: tl.int32, C: tl.int32, P: tl.int32, count: tl.int32,
    HAS_SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile of positions: reads x once, writes z once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    x = _blocks(x_ptr, (x_b, x_c, x_p), rows, P, count, 0, C, BLOCKS, dtype, CHANNELS_LAST, VECTOR)
    _products(
        x, matrix_ptr, matrix_i, matrix_j, shift_ptr, shift_i, HAS_SHIFT,
        out_ptr, (out_b, out_c, out_p), rows, P, count, C, BLOCKS, CHANNELS_LAST, VECTOR, PRECISION,
    )  # fmt: skip


@kernel
def sums_kernel(
    grad_ptr, grad_b, grad_c, grad_p, x_ptr, x_b, x_c, x_p, partial_ptr,
    C: tl.int32, P: tl.int32, count: tl.int32,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A share of the tiles of positions, for ROWS blocks of channels of g: reads those and x once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    # Neighbouring programs share the tile of x, so that the second finds it in the cache.
    first = tl.program_id(0) % (BLOCKS // ROWS) * ROWS
    share = tl.program_id(0) // (BLOCKS // ROWS)
    grad_matrix, grad_shift = _zero_sums(dtype, PARTS, ROWS, BLOCKS)
    for tile in range(share, tl.cdiv(count, BLOCK_P), tl.num_programs(0) // (BLOCKS // ROWS)):
        at = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        grad = _blocks(grad_ptr, (grad_b, grad_c, grad_p), at, P, count, first, C, ROWS, dtype, CHANNELS_LAST, VECTOR)
        x = _blocks(x_ptr, (x_b, x_c, x_p), at, P, count, 0, C, BLOCKS, dtype, CHANNELS_LAST, VECTOR)
        grad_matrix, grad_shift = _add_to_sums(grad_matrix, grad_shift, grad, x, PARTS, ROWS, BLOCKS, PRECISION)
    _store_sums(partial_ptr, share, grad_matrix, grad_shift, first, C, ROWS, BLOCKS)


@kernel
def backward_kernel(
    grad_ptr, grad_b, grad_c, grad_p, data_ptr, data_b, data_c, data_p,
    undone_ptr, grad_x_ptr, out_b, out_c, out_p, partial_ptr, inverse_shift_ptr, inverse_shift_i,
    inverse_ptr, inverse_i: tl.int32, inverse_j: tl.int32, matrix_ptr, matrix_i: tl.int32, matrix_j: tl.int32,
    C: tl.int32, P: tl.int32, count: tl.int32,
    UNDO: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same, and writes dx once; with UNDO reads z instead of x, and also writes x."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    data_strides = (data_b, data_c, data_p)
    grad_strides = (grad_b, grad_c, grad_p)
    out_strides = (out_b, out_c, out_p)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    grad_matrix, grad_shift = _zero_sums(dtype, PARTS, BLOCKS, BLOCKS)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        grad = _blocks(grad_ptr, grad_strides, rows, P, count, 0, C, BLOCKS, dtype, CHANNELS_LAST, VECTOR)
        x = _blocks(data_ptr, data_strides, rows, P, count, 0, C, BLOCKS, dtype, CHANNELS_LAST, VECTOR)
        if UNDO:
            # Outside the data this is the shift, but the gradient there is zero.
            x = _products(
                x, inverse_ptr, inverse_i, inverse_j, inverse_shift_ptr, inverse_shift_i, True,
                undone_ptr, out_strides, rows, P, count, C, BLOCKS, CHANNELS_LAST, VECTOR, PRECISION,
            )  # fmt: skip
        grad_matrix, grad_shift = _add_to_sums(grad_matrix, grad_shift, grad, x, PARTS, BLOCKS, BLOCKS, PRECISION)
        _products(
            grad, matrix_ptr, matrix_j, matrix_i, matrix_ptr, 0, False,
            grad_x_ptr, out_strides, rows, P, count, C, BLOCKS, CHANNELS_LAST, VECTOR, PRECISION,
        )  # fmt: skip
    _store_sums(partial_ptr, tl.program_id(0), grad_matrix, grad_shift, 0, C, BLOCKS, BLOCKS)


@triton.jit
def _blocks(
    ptr, strides, rows, P, count, first, C,
    BLOCKS: tl.constexpr, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of 16 channels from block ``first`` on, at these rows, as a tuple of tiles (16, rows)."""
    tiles = ()
    for block in tl.static_range(BLOCKS):
        channels = (first + block) * 16 + tl.arange(0, 16)
        at = row_pointers(ptr, strides, rows, P, channels, CHANNELS_LAST, VECTOR, True)
        tiles += (tl.load(at, (channels < C)[:, None] & (rows < count)[None, :], other=0.0).to(dtype),)
    return tiles


@triton.jit
def _products(
    x, matrix_ptr, matrix_i, matrix_j, shift_ptr, shift_i, HAS_SHIFT: tl.constexpr,
    out_ptr, out_strides, rows, P, count, C,
    BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store ``M x + v`` for x in tiles (16 channels, rows), and return it."""
    results = ()
    for i in tl.static_range(BLOCKS):
        to = i * 16 + tl.arange(0, 16)
        z = tl.zeros(x[0].shape, x[0].dtype)
        if HAS_SHIFT:
            z += tl.load(shift_ptr + to * shift_i, to < C, other=0.0)[:, None]
        for j in tl.static_range(BLOCKS):
            of = j * 16 + tl.arange(0, 16)
            at = matrix_ptr + (to[:, None] * matrix_i + of[None, :] * matrix_j)
            z = _dot(tl.load(at, (to < C)[:, None] & (of < C)[None, :], other=0.0), x[j], z, PRECISION)
        out_at = row_pointers(out_ptr, out_strides, rows, P, to, CHANNELS_LAST, VECTOR, True)
        store(out_at, z, (to < C)[:, None] & (rows < count)[None, :])
        results += (z,)
    return results


@triton.jit
def _zero_sums(dtype: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Accumulators of ``sum g x^T`` for every pair of blocks and each warp, and of ``sum g`` for every block of g."""
    grad_matrix = ()
    grad_shift = ()
    for _ in tl.static_range(ROWS * BLOCKS):
        grad_matrix += (tl.zeros((PARTS, 16, 16), dtype),)
    for _ in tl.static_range(ROWS):
        grad_shift += (tl.zeros((16,), dtype),)
    return grad_matrix, grad_shift


@triton.jit
def _add_to_sums(
    grad_matrix, grad_shift, grad, x,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The accumulators plus the sums of one tile."""
    matrix_sums = ()
    shift_sums = ()
    for i in tl.static_range(ROWS):
        part = _parts(grad[i], PARTS)
        for j in tl.static_range(BLOCKS):
            x_part = tl.permute(_parts(x[j], PARTS), (0, 2, 1))
            # Added here, to round to the nearest: tensor cores round every partial sum towards zero.
            of_tile = _dot(part, x_part, tl.zeros((PARTS, 16, 16), grad[i].dtype), PRECISION)
            matrix_sums += (grad_matrix[i * BLOCKS + j] + of_tile,)
        shift_sums += (grad_shift[i] + tl.sum(grad[i], 1),)
    return matrix_sums, shift_sums


@triton.jit
def _store_sums(partial_ptr, share, grad_matrix, grad_shift, first, C, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Store ``dM``, then ``dv``, of a share, block by block."""
    at = partial_ptr + share.to(tl.int64) * (C * (C + 1))
    for i in tl.static_range(ROWS):
        to = (first + i) * 16 + tl.arange(0, 16)
        for j in tl.static_range(BLOCKS):
            of = j * 16 + tl.arange(0, 16)
            total = tl.sum(grad_matrix[i * BLOCKS + j], 0)
            tl.store(at + to[:, None] * C + of[None, :], total, (to < C)[:, None] & (of < C)[None, :])
        tl.store(at + C * C + to, grad_shift[i], to < C)


@triton.jit
def _parts(tile, PARTS: tl.constexpr):
    """A tile (16, rows) as a batch of tiles, one for each warp, so that warps work independently."""
    return tl.permute(tl.reshape(tile, (16, PARTS, tile.shape[1] // PARTS)), (1, 0, 2))


@triton.jit
def _dot(a, b, out, PRECISION: tl.constexpr):
    """``out + a b`` in three passes of TF32; Triton's own takes three times the instructions, to handle infinities.

    Infinities become NaN here. Tensor cores truncate the low parts, which have either sign, so errors do not add up.
    """
    if PRECISION == "tf32x3":
        a_high = _high(a)
        b_high = _high(b)
        out = tl.dot(a_high, b - b_high, out, input_precision="tf32")
        out = tl.dot(a - a_high, b_high, out, input_precision="tf32")
        return tl.dot(a_high, b_high, out, input_precision="tf32")
    else:
        return tl.dot(a, b, out, input_precision=PRECISION, out_dtype=out.dtype)


@triton.jit
def _high(x):
    """``x`` rounded to the 11 bits of TF32."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
