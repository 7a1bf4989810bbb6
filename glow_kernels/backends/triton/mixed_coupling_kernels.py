"""The kernels of ``affine_coupling_kernels.py`` for contiguous data with channels-last ``h``.

A program covers BLOCK_C channels at BLOCK_P positions of one sample, so that it reads and writes both in vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.affine_coupling_kernels import (
    _do,
    _forward_gradients,
    _inverse_gradients,
    _scale_map,
    _undo,
)
from glow_kernels.backends.triton.device_functions import exp, kernel, multiple, row_pointers, store
from glow_kernels.backends.triton.row_pairs import load_row_pairs, store_row_pairs

# More positions than a sample can have: with this as P, all rows count as those of the first sample.
_ONE_SAMPLE = tl.constexpr(1 << 30)


@kernel
def mixed_map_kernel(
    x_ptr, x_b, x_c, x_p, h_ptr, h_b, h_c, h_p, out_ptr, out_b, out_c, out_p, gain_ptr, partial_ptr,
    C: tl.int32, P: tl.int32,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, VECTOR: tl.constexpr, H_VECTOR: tl.constexpr,
):  # fmt: skip
    """Forward or inverse: reads x, u and t once, writes y once, and one partial sum per program."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    sample, start, rows, P = _tile(C, P, BLOCK_C, BLOCK_P, VECTOR)
    t, log_scale, _, _ = _conditions(
        h_ptr + sample * h_b, h_c, h_p, gain_ptr, rows, P, start, C, dtype,
        SCALE_MAP, HAS_GAIN, BLOCK_C, INTERLEAVED, SCALE_FIRST, H_VECTOR,
    )  # fmt: skip
    at, there = _pointers(x_ptr + sample * x_b, x_c, x_p, rows, P, start, C, BLOCK_C, VECTOR)
    x = tl.load(at, there, other=0.0).to(dtype)
    if INVERSE:
        log_scale = -log_scale
        y = _undo(x, exp(log_scale), t, ORDER)
    else:
        y = _do(x, exp(log_scale), t, ORDER)
    out_at, _ = _pointers(out_ptr + sample * out_b, out_c, out_p, rows, P, start, C, BLOCK_C, VECTOR)
    store(out_at, y, there)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(there, log_scale, 0.0)))


@kernel
def mixed_gradient_kernel(
    grad_ptr, grad_b, grad_c, grad_p, y_ptr, y_b, y_c, y_p, h_ptr, h_b, h_c, h_p, grad_log_det_ptr, grad_log_det_b,
    undone_ptr, grad_x_ptr, out_b, out_c, out_p, grad_h_ptr, grad_h_b, grad_h_c, grad_h_p, gain_ptr, partial_ptr,
    B: tl.int32, C: tl.int32, P: tl.int32,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr, INVERSE: tl.constexpr, UNDO: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, VECTOR: tl.constexpr, H_VECTOR: tl.constexpr,
):  # fmt: skip
    """Backward of either direction from its output ``y``; with UNDO the input too. Reads and writes everything once."""
    dtype: tl.constexpr = grad_log_det_ptr.dtype.element_ty
    sample, start, rows, P = _tile(C, P, BLOCK_C, BLOCK_P, VECTOR)
    t, log_scale, of_u, of_gain = _conditions(
        h_ptr + sample * h_b, h_c, h_p, gain_ptr, rows, P, start, C, dtype,
        SCALE_MAP, HAS_GAIN, BLOCK_C, INTERLEAVED, SCALE_FIRST, H_VECTOR,
    )  # fmt: skip
    at, there = _pointers(grad_ptr + sample * grad_b, grad_c, grad_p, rows, P, start, C, BLOCK_C, VECTOR)
    grad = tl.load(at, there, other=0.0).to(dtype)
    y_at, _ = _pointers(y_ptr + sample * y_b, y_c, y_p, rows, P, start, C, BLOCK_C, VECTOR)
    y = tl.load(y_at, there, other=0.0).to(dtype)
    grad_log_det = tl.load(grad_log_det_ptr + sample * grad_log_det_b)
    if INVERSE:
        grad_x = grad * exp(-log_scale)
        grad_t, grad_log_scale = _inverse_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    else:
        grad_x = grad * exp(log_scale)
        grad_t, grad_log_scale = _forward_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    out_at, _ = _pointers(grad_x_ptr + sample * out_b, out_c, out_p, rows, P, start, C, BLOCK_C, VECTOR)
    store(out_at, grad_x, there)
    if UNDO:
        undone_at, _ = _pointers(undone_ptr + sample * out_b, out_c, out_p, rows, P, start, C, BLOCK_C, VECTOR)
        store(undone_at, _undo(y, exp(-log_scale), t, ORDER), there)
    grad_u = grad_log_scale * of_u
    store_row_pairs(
        grad_h_ptr + sample * grad_h_b, (0, grad_h_c, grad_h_p), grad_u, grad_t, rows, _ONE_SAMPLE, P, start, C, 0,
        BLOCK_C, INTERLEAVED, SCALE_FIRST, True, H_VECTOR,
    )  # fmt: skip
    if HAS_GAIN:
        channels = start + tl.arange(0, BLOCK_C)
        tiles = tl.cdiv(P, BLOCK_P)
        part = sample * tiles + tl.program_id(0) // tl.cdiv(C, BLOCK_C) % tiles
        of_channels = tl.sum(tl.where(there, grad_log_scale * of_gain, 0.0), 1)
        tl.store(partial_ptr + channels.to(tl.int64) * (B * tiles) + part, of_channels, channels < C)


@triton.jit
def _tile(C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, VECTOR: tl.constexpr):
    """Sample, first channel and positions of this program; P in a form that tells that no vector crosses its end."""
    across = tl.cdiv(C, BLOCK_C)
    each = across * tl.cdiv(P, BLOCK_P)
    sample = tl.program_id(0) // each
    tile = tl.program_id(0) % each
    rows = tile // across * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample.to(tl.int64), tile % across * BLOCK_C, rows, multiple(P, VECTOR)


@triton.jit
def _pointers(ptr, stride_c, stride_p, rows, P, start, C, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses in a sample (C, P) of the channels from ``start`` on, with their mask, (BLOCK_C, rows)."""
    channels = start + tl.arange(0, BLOCK_C)
    at = row_pointers(ptr, (0, stride_c, stride_p), rows, _ONE_SAMPLE, channels, False, VECTOR, True)
    return at, (channels < C)[:, None] & (rows < P)[None, :]


@triton.jit
def _conditions(
    h_ptr, h_c, h_p, gain_ptr, rows, P, start, C, dtype: tl.constexpr,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALE_FIRST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The shift, ``log s``, and its derivatives with respect to the raw scale and the learned gain."""
    u, t = load_row_pairs(
        h_ptr, (0, h_c, h_p), rows, _ONE_SAMPLE, P, start, C, 0, dtype, BLOCK_C, INTERLEAVED, SCALE_FIRST, True, VECTOR
    )
    learned = 1.0
    if HAS_GAIN:
        channels = start + tl.arange(0, BLOCK_C)
        learned = tl.load(gain_ptr + channels, channels < C, other=1.0)[:, None]
    log_scale, of_u, of_gain = _scale_map(u, learned, SCALE_MAP, HAS_GAIN)
    return t, log_scale, of_u, of_gain
