"""Kernels of ``x = [z1, coupling(z2)]`` with ``M x + v`` and of its gradients, which ``coupling_conv1x1.py`` launches.

A program holds all channels of a tile of positions, as in ``linear_kernels.py``, whose products and sums it uses; the
arithmetic of the coupling is that of ``affine_coupling_kernels.py``. ``FIRST`` is the number of channels that the
coupling does not change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.affine_coupling_kernels import _do, _forward_gradients, _scale_map
from glow_kernels.backends.triton.device_functions import exp, kernel, row_pointers, row_sizes, store
from glow_kernels.backends.triton.linear_kernels import _add_to_sums, _blocks, _dot, _products, _zero_sums
from glow_kernels.backends.triton.row_pairs import load_row_pairs, store_row_pairs


@kernel
def coupled_apply_kernel(
    z_ptr, z_b, z_c, z_p, h_ptr, h_b, h_c, h_p, out_ptr, out_b, out_c, out_p, partial_ptr, shift_ptr, shift_i,
    matrix_ptr, matrix_i: tl.int32, matrix_j: tl.int32, C: tl.int32, FIRST: tl.int32, P: tl.int32, count: tl.int32,
    SCALE_MAP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr, ORDER: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    H_CHANNELS_LAST: tl.constexpr, H_VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile of positions: reads z and h once, writes the next z once, and ``sum log s`` of every GROUP positions."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    x = ()
    log_det = tl.zeros((BLOCK_P,), dtype)
    for block in tl.static_range(BLOCKS):
        # z before h: Triton distributes elements over threads as in the last load, and the product rearranges z anyway.
        (z,) = _blocks(z_ptr, (z_b, z_c, z_p), rows, P, count, block, C, 1, dtype, CHANNELS_LAST, VECTOR)
        t, log_scale, _, transformed = _conditions(
            h_ptr, (h_b, h_c, h_p), rows, P, count, block * 16, C, FIRST, dtype,
            SCALE_MAP, INTERLEAVED, SCALE_FIRST, H_CHANNELS_LAST, H_VECTOR,
        )  # fmt: skip
        x += (tl.where(transformed, _do(z, exp(log_scale), t, ORDER), z),)
        log_det += tl.sum(tl.where(transformed, log_scale, 0.0), 0)
    _products(
        x, matrix_ptr, matrix_i, matrix_j, shift_ptr, shift_i, True,
        out_ptr, (out_b, out_c, out_p), rows, P, count, C, BLOCKS, CHANNELS_LAST, VECTOR, PRECISION,
    )  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_P // GROUP
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(partial_ptr + group, tl.sum(tl.reshape(log_det, (GROUPS, GROUP)), 1), group < count // GROUP)


@kernel
def coupled_backward_kernel(
    grad_ptr, grad_b, grad_c, grad_p, z_ptr, z_b, z_c, z_p, h_ptr, h_b, h_c, h_p, grad_log_det_ptr, grad_log_det_b,
    grad_z_ptr, out_b, out_c, out_p, grad_h_ptr, grad_h_b, grad_h_c, grad_h_p, partial_ptr,
    matrix_ptr, matrix_i: tl.int32, matrix_j: tl.int32,
    C: tl.int32, FIRST: tl.int32, P: tl.int32, count: tl.int32, of_sample: tl.int32,
    SCALE_MAP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr, ORDER: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    H_CHANNELS_LAST: tl.constexpr, H_VECTOR: tl.constexpr,
):  # fmt: skip
    """A share of the tiles, for one block of 16 channels: reads its z and h and all of g once, writes dz and dh once.

    Also stores its columns of the sums ``dM``. A sample has ``of_sample`` positions; P may be those of all samples.
    """
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    # Neighbouring programs share the tile of g, so that all except the first find it in the cache.
    block = tl.program_id(0) % BLOCKS
    share = tl.program_id(0) // BLOCKS
    channels = block * 16 + tl.arange(0, 16)
    grad_matrix, grad_shift = _zero_sums(dtype, PARTS, BLOCKS, 1)
    for tile in range(share, tl.cdiv(count, BLOCK_P), tl.num_programs(0) // BLOCKS):
        rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        here = (rows < count)[None, :]
        grad = _blocks(grad_ptr, (grad_b, grad_c, grad_p), rows, P, count, 0, C, BLOCKS, dtype, CHANNELS_LAST, VECTOR)
        # z after h, since Triton distributes elements over threads as in the last load, and dz is stored like z.
        t, log_scale, of_u, transformed = _conditions(
            h_ptr, (h_b, h_c, h_p), rows, P, count, block * 16, C, FIRST, dtype,
            SCALE_MAP, INTERLEAVED, SCALE_FIRST, H_CHANNELS_LAST, H_VECTOR,
        )  # fmt: skip
        (z,) = _blocks(z_ptr, (z_b, z_c, z_p), rows, P, count, block, C, 1, dtype, CHANNELS_LAST, VECTOR)
        scale = exp(log_scale)
        y = _do(z, scale, t, ORDER)
        # Outside the data z and g are zero, but a scale may be infinite, and their product NaN.
        x = (tl.where(transformed & here, y, z),)
        grad_matrix, grad_shift = _add_to_sums(grad_matrix, grad_shift, grad, x, PARTS, BLOCKS, 1, PRECISION)

        grad_x = _transposed_product(grad, matrix_ptr, matrix_i, matrix_j, channels, C, BLOCKS, PRECISION)
        grad_z = grad_x * scale
        sample = (rows // of_sample).to(tl.int64)
        grad_log_det = tl.load(grad_log_det_ptr + sample * grad_log_det_b, rows < count, other=0.0)[None, :]
        grad_t, grad_log_scale = _forward_gradients(grad_x, grad_z, y, t, grad_log_det, ORDER)
        out_at = row_pointers(grad_z_ptr, (out_b, out_c, out_p), rows, P, channels, CHANNELS_LAST, VECTOR, True)
        store(out_at, tl.where(transformed, grad_z, grad_x), (channels < C)[:, None] & here)
        store_row_pairs(
            grad_h_ptr, (grad_h_b, grad_h_c, grad_h_p), grad_log_scale * of_u, grad_t, rows, P, count, block * 16,
            C, FIRST, 16, INTERLEAVED, SCALE_FIRST, H_CHANNELS_LAST, H_VECTOR,
        )  # fmt: skip
    _store_columns(partial_ptr, share, grad_matrix, grad_shift, channels, C, BLOCKS)


@triton.jit
def _store_columns(partial_ptr, share, grad_matrix, grad_shift, channels, C, BLOCKS: tl.constexpr):
    """Store these columns of ``dM``, and in the first program of a share also ``dv``."""
    at = partial_ptr + share.to(tl.int64) * (C * (C + 1))
    # All programs of a share have the sums of g; one stores them.
    end = tl.where(tl.min(channels, 0) == 0, C, 0)
    for i in tl.static_range(BLOCKS):
        to = i * 16 + tl.arange(0, 16)
        total = tl.sum(grad_matrix[i], 0)
        tl.store(at + to[:, None] * C + channels[None, :], total, (to < C)[:, None] & (channels < C)[None, :])
        tl.store(at + C * C + to, grad_shift[i], to < end)


@triton.jit
def _conditions(
    h_ptr, h_strides, rows, P, count, start, C, FIRST, dtype: tl.constexpr,
    SCALE_MAP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Shift, ``log s`` and its derivative with respect to the raw scale, (16, rows), for 16 channels from ``start`` on.

    Also (16, 1), which of these channels the coupling transforms.
    """
    u, t = load_row_pairs(
        h_ptr, h_strides, rows, P, count, start, C, FIRST, dtype, 16, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR
    )
    log_scale, of_u, _ = _scale_map(u, 1.0, SCALE_MAP, False)
    channels = start + tl.arange(0, 16)
    return t, log_scale, of_u, ((channels >= FIRST) & (channels < C))[:, None]


@triton.jit
def _transposed_product(
    grad, matrix_ptr, matrix_i, matrix_j, channels, C, BLOCKS: tl.constexpr, PRECISION: tl.constexpr
):
    """The given channels of ``M^T g``."""
    result = tl.zeros(grad[0].shape, grad[0].dtype)
    for i in tl.static_range(BLOCKS):
        of = i * 16 + tl.arange(0, 16)
        at = matrix_ptr + (channels[:, None] * matrix_j + of[None, :] * matrix_i)
        columns = tl.load(at, (channels < C)[:, None] & (of < C)[None, :], other=0.0)
        result = _dot(columns, grad[i], result, PRECISION)
    return result
