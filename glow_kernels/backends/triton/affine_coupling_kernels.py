"""Kernels of the coupling: its map and its gradients, which ``affine_coupling.py`` launches.

``SCALE_MAP`` is ``(kind, slope, offset, gain, log(gain), floor > 0, log(floor), low, high)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import (
    atan,
    exp,
    kernel,
    load_pair,
    log1p_of_fraction,
    pointers,
    reciprocal,
    store,
    store_pair,
    tanh,
    tile_of_program,
)

ORDERS = {"shift_scale": 0, "scale_shift": 1, "unshift_scale": 2}
_SHIFT_SCALE: tl.constexpr = tl.constexpr(0)
_SCALE_SHIFT: tl.constexpr = tl.constexpr(1)


@kernel
def map_kernel(
    x_ptr, x_b, x_c, x_p, h_ptr, h_b, h_c, h_p, out_ptr, out_b, out_c, out_p, gain_ptr, partial_ptr,
    C: tl.int32, P: tl.int32,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Forward or inverse: reads x, u and t once, writes y once, and one partial sum per program."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    x_at = pointers(x_ptr, (x_b, x_c, x_p), sample, outer, inner, CHANNELS_LAST, VECTOR)
    x = tl.load(x_at, mask, other=0.0).to(dtype)
    t, log_scale, _, _ = _conditions(
        h_ptr, (h_b, h_c, h_p), gain_ptr, sample, outer, inner, mask, C, dtype,
        SCALE_MAP, HAS_GAIN, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    if INVERSE:
        log_scale = -log_scale
        y = _undo(x, exp(log_scale), t, ORDER)
    else:
        y = _do(x, exp(log_scale), t, ORDER)
    store(pointers(out_ptr, (out_b, out_c, out_p), sample, outer, inner, CHANNELS_LAST, VECTOR), y, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, log_scale, 0.0)))


@kernel
def gradient_kernel(
    grad_ptr, grad_b, grad_c, grad_p, y_ptr, y_b, y_c, y_p, h_ptr, h_b, h_c, h_p, grad_log_det_ptr, grad_log_det_b,
    undone_ptr, grad_x_ptr, out_b, out_c, out_p, grad_h_ptr, grad_h_b, grad_h_c, grad_h_p, gain_ptr, partial_ptr,
    B: tl.int32, C: tl.int32, P: tl.int32,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr, INVERSE: tl.constexpr, UNDO: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Backward of either direction from its output ``y``; with UNDO the input too. Reads and writes everything once."""
    dtype: tl.constexpr = grad_log_det_ptr.dtype.element_ty
    if HAS_GAIN:
        sample, outer, inner, mask = _tile_of_channels(B, C, P, BLOCK, CHANNELS_LAST, VECTOR)
    else:
        sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    grad_at = pointers(grad_ptr, (grad_b, grad_c, grad_p), sample, outer, inner, CHANNELS_LAST, VECTOR)
    grad = tl.load(grad_at, mask, other=0.0).to(dtype)
    y_at = pointers(y_ptr, (y_b, y_c, y_p), sample, outer, inner, CHANNELS_LAST, VECTOR)
    y = tl.load(y_at, mask, other=0.0).to(dtype)
    t, log_scale, of_u, of_gain = _conditions(
        h_ptr, (h_b, h_c, h_p), gain_ptr, sample, outer, inner, mask, C, dtype,
        SCALE_MAP, HAS_GAIN, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    grad_log_det = tl.load(grad_log_det_ptr + sample.to(tl.int64) * grad_log_det_b, sample < B, other=0.0)

    if INVERSE:
        grad_x = grad * exp(-log_scale)
        grad_t, grad_log_scale = _inverse_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    else:
        grad_x = grad * exp(log_scale)
        grad_t, grad_log_scale = _forward_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    out = (out_b, out_c, out_p)
    store(pointers(grad_x_ptr, out, sample, outer, inner, CHANNELS_LAST, VECTOR), grad_x, mask)
    if UNDO:
        x = _undo(y, exp(-log_scale), t, ORDER)
        store(pointers(undone_ptr, out, sample, outer, inner, CHANNELS_LAST, VECTOR), x, mask)
    store_pair(
        grad_h_ptr, (grad_h_b, grad_h_c, grad_h_p), grad_log_scale * of_u, grad_t, sample, outer, inner, mask, C,
        INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    if HAS_GAIN:
        _store_of_channels(
            partial_ptr, tl.where(mask, grad_log_scale * of_gain, 0.0), outer, inner, C, CHANNELS_LAST, VECTOR
        )


@triton.jit
def _tile_of_channels(B, C, P, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Like :func:`tile_of_program`, but of one channel, or one vector of channels, at positions of all samples."""
    groups = C // VECTOR if CHANNELS_LAST else C
    each = P if CHANNELS_LAST else P // VECTOR
    group = tl.program_id(0) % groups
    vector = tl.program_id(0) // groups * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)[:, None]
    sample = vector // each
    if CHANNELS_LAST:
        return sample, vector % each, group * VECTOR, sample < B
    else:
        return sample, group, vector % each * VECTOR, sample < B


@triton.jit
def _store_of_channels(partial_ptr, values, outer, inner, C, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Store this program's part of the sums of its channels, in (C, programs per channel)."""
    groups = C // VECTOR if CHANNELS_LAST else C
    part = tl.program_id(0) // groups
    parts = tl.num_programs(0) // groups
    if CHANNELS_LAST:
        channels = inner + tl.arange(0, VECTOR)
        tl.store(partial_ptr + channels.to(tl.int64) * parts + part, tl.sum(values, 0))
    else:
        tl.store(partial_ptr + outer.to(tl.int64) * parts + part, tl.sum(values))


@triton.jit
def _conditions(
    h_ptr, h_strides, gain_ptr, sample, outer, inner, mask, C, dtype: tl.constexpr,
    SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The shift, ``log s``, and its derivatives with respect to the raw scale and the learned gain."""
    u, t = load_pair(
        h_ptr, h_strides, sample, outer, inner, mask, C, dtype, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR
    )
    learned = 1.0
    if HAS_GAIN:
        channels = inner + tl.arange(0, VECTOR)[None, :] if CHANNELS_LAST else outer
        learned = tl.load(gain_ptr + channels, channels < C, other=1.0)
    log_scale, of_u, of_gain = _scale_map(u, learned, SCALE_MAP, HAS_GAIN)
    return t, log_scale, of_u, of_gain


@triton.jit
def _do(x, scale, shift, ORDER: tl.constexpr):
    if ORDER == _SHIFT_SCALE:
        return (x + shift) * scale
    elif ORDER == _SCALE_SHIFT:
        return x * scale + shift
    else:
        return (x - shift) * scale


@triton.jit
def _undo(y, inverse_scale, shift, ORDER: tl.constexpr):
    if ORDER == _SHIFT_SCALE:
        return y * inverse_scale - shift
    elif ORDER == _SCALE_SHIFT:
        return (y - shift) * inverse_scale
    else:
        return y * inverse_scale + shift


@triton.jit
def _forward_gradients(grad, grad_x, y, shift, grad_log_det, ORDER: tl.constexpr):
    """Gradients with respect to shift and log-scale."""
    if ORDER == _SHIFT_SCALE:
        return grad_x, grad * y + grad_log_det
    elif ORDER == _SCALE_SHIFT:
        return grad, grad * (y - shift) + grad_log_det
    else:
        return -grad_x, grad * y + grad_log_det


@triton.jit
def _inverse_gradients(grad, grad_y, x, shift, grad_log_det, ORDER: tl.constexpr):
    """Gradients with respect to shift and log-scale."""
    if ORDER == _SHIFT_SCALE:
        return -grad, -grad * (x + shift) - grad_log_det
    elif ORDER == _SCALE_SHIFT:
        return -grad_y, -grad * x - grad_log_det
    else:
        return grad, -grad * (x - shift) - grad_log_det


@triton.jit
def _scale_map(u, learned, SCALE_MAP: tl.constexpr, HAS_GAIN: tl.constexpr):
    """``log s`` of the raw scale, and its derivatives with respect to the raw scale and the learned gain."""
    KIND: tl.constexpr = SCALE_MAP[0]
    SLOPE: tl.constexpr = SCALE_MAP[1]
    OFFSET: tl.constexpr = SCALE_MAP[2]
    GAIN: tl.constexpr = SCALE_MAP[3]
    LOG_GAIN: tl.constexpr = SCALE_MAP[4]
    HAS_FLOOR: tl.constexpr = SCALE_MAP[5]
    LOG_FLOOR: tl.constexpr = SCALE_MAP[6]
    v = SLOPE * u + OFFSET
    if KIND == "sigmoid":
        # exp(-|v|) never overflows, and log(1 + exp(-|v|)) is accurate where sigmoid(v) is close to 0 or 1.
        e = exp(-tl.abs(v))
        log_scale = tl.where(v < 0.0, v, 0.0) - log1p_of_fraction(e) + LOG_GAIN
        of_u = SLOPE * tl.where(v < 0.0, 1.0, e) * reciprocal(1.0 + e)
        of_gain = log_scale
    else:
        value, derivative = _bound(v, KIND, SCALE_MAP[7], SCALE_MAP[8])
        of_gain = GAIN * value
        log_scale = of_gain
        of_u = (GAIN * SLOPE) * derivative
        if HAS_GAIN:
            log_scale = log_scale * learned
            of_u = of_u * learned
    if HAS_FLOOR:
        # log(exp(log_scale) + floor), and the first summand's share of the sum.
        above = log_scale - LOG_FLOOR
        e = exp(-tl.abs(above))
        log_scale = tl.where(above < 0.0, LOG_FLOOR, log_scale) + log1p_of_fraction(e)
        share = tl.where(above < 0.0, e, 1.0) * reciprocal(1.0 + e)
        of_u = of_u * share
        of_gain = of_gain * share
    return log_scale, of_u, of_gain


@triton.jit
def _bound(v, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """f(v) of ``exp(gain * f(v))``, and its derivative."""
    if KIND == "tanh":
        value, derivative = tanh(v)
    elif KIND == "atan":
        value = atan(v)
        derivative = 1.0 / (1.0 + v * v)
    elif KIND == "softsign":
        inverse = reciprocal(1.0 + tl.abs(v))
        value = v * inverse
        derivative = inverse * inverse
    elif KIND == "clip":
        outside = (v < LOW) | (v > HIGH)
        value = tl.where(v < LOW, LOW, tl.where(v > HIGH, HIGH, v))
        derivative = tl.where(outside, 0.0, tl.full(v.shape, 1.0, v.dtype))
    else:
        value = v
        derivative = tl.full(v.shape, 1.0, v.dtype)
    return value, derivative
