"""Kernels of the coupling: its map and its gradients, which ``affine_coupling.py`` launches."""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import (
    atan,
    exp,
    load_pair,
    log1p_of_fraction,
    offsets,
    store,
    store_pair,
    tanh,
    tile_of_program,
)

ORDERS = {"shift_scale": 0, "scale_shift": 1, "unshift_scale": 2}
_SHIFT_SCALE: tl.constexpr = tl.constexpr(0)
_SCALE_SHIFT: tl.constexpr = tl.constexpr(1)


@triton.jit
def map_kernel(
    x_ptr,
    x_strides,
    h_ptr,
    h_strides,
    gain_ptr,
    out_ptr,
    out_strides,
    partial_ptr,
    C,
    P,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    LOG_GAIN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):
    """Forward or inverse: reads x, u and t once, writes y once, and one partial sum per program."""
    accumulate = partial_ptr.dtype.element_ty
    sample, positions, first_channel, P, C = tile_of_program(C, P, BLOCK_P, BLOCK_C, CHANNELS_LAST, VECTOR)
    channels = first_channel + tl.arange(0, BLOCK_C)
    mask = (positions < P)[:, None] & (channels < C)[None, :]

    x = tl.load(x_ptr + offsets(sample, positions, channels, x_strides, CHANNELS_LAST, VECTOR), mask, other=0.0)
    u, t = load_pair(
        h_ptr, h_strides, sample, positions, first_channel, P, C, accumulate,
        BLOCK_P, BLOCK_C, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    learned = tl.load(gain_ptr + channels, channels < C, other=1.0)[None, :] if HAS_GAIN else 1.0
    log_scale, _, _ = _scale_map(
        u, learned, KIND, SLOPE, OFFSET, GAIN, LOG_GAIN, HAS_FLOOR, LOG_FLOOR, LOW, HIGH, HAS_GAIN
    )
    x = x.to(accumulate)
    if INVERSE:
        log_scale = -log_scale
        y = _undo(x, exp(log_scale), t, ORDER)
    else:
        y = _do(x, exp(log_scale), t, ORDER)
    out = out_ptr + offsets(sample, positions, channels, out_strides, CHANNELS_LAST, VECTOR)
    store(out, y, mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, log_scale, 0.0)))


@triton.jit
def gradient_kernel(
    grad_ptr,
    grad_strides,
    grad_log_det_ptr,
    grad_log_det_stride,
    y_ptr,
    y_strides,
    h_ptr,
    h_strides,
    gain_ptr,
    undone_ptr,
    grad_x_ptr,
    out_strides,
    grad_h_ptr,
    grad_h_strides,
    partial_ptr,
    C,
    P,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    LOG_GAIN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    INVERSE: tl.constexpr,
    UNDO: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):
    """Backward of either direction from its output ``y``; with UNDO the input too. Reads and writes everything once."""
    accumulate = grad_log_det_ptr.dtype.element_ty
    sample, positions, first_channel, P, C = tile_of_program(C, P, BLOCK_P, BLOCK_C, CHANNELS_LAST, VECTOR)
    channels = first_channel + tl.arange(0, BLOCK_C)
    mask = (positions < P)[:, None] & (channels < C)[None, :]

    grad_at = offsets(sample, positions, channels, grad_strides, CHANNELS_LAST, VECTOR)
    grad = tl.load(grad_ptr + grad_at, mask, other=0.0).to(accumulate)
    y_at = offsets(sample, positions, channels, y_strides, CHANNELS_LAST, VECTOR)
    y = tl.load(y_ptr + y_at, mask, other=0.0).to(accumulate)
    u, t = load_pair(
        h_ptr, h_strides, sample, positions, first_channel, P, C, accumulate,
        BLOCK_P, BLOCK_C, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    learned = tl.load(gain_ptr + channels, channels < C, other=1.0)[None, :] if HAS_GAIN else 1.0
    log_scale, of_u, of_gain = _scale_map(
        u, learned, KIND, SLOPE, OFFSET, GAIN, LOG_GAIN, HAS_FLOOR, LOG_FLOOR, LOW, HIGH, HAS_GAIN
    )
    grad_log_det = tl.load(grad_log_det_ptr + sample.to(tl.int64) * grad_log_det_stride)

    if INVERSE:
        grad_x = grad * exp(-log_scale)
        grad_t, grad_log_scale = _inverse_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    else:
        grad_x = grad * exp(log_scale)
        grad_t, grad_log_scale = _forward_gradients(grad, grad_x, y, t, grad_log_det, ORDER)
    out_at = offsets(sample, positions, channels, out_strides, CHANNELS_LAST, VECTOR)
    store(grad_x_ptr + out_at, grad_x, mask)
    if UNDO:
        store(undone_ptr + out_at, _undo(y, exp(-log_scale), t, ORDER), mask)
    store_pair(
        grad_h_ptr, grad_h_strides, grad_log_scale * of_u, grad_t, sample, positions, first_channel, P, C,
        BLOCK_P, BLOCK_C, INTERLEAVED, SCALE_FIRST, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    if HAS_GAIN:
        tiles_p = tl.cdiv(P, BLOCK_P)
        column = sample * tiles_p + tl.program_id(0) % (tiles_p * tl.cdiv(C, BLOCK_C)) // tl.cdiv(C, BLOCK_C)
        row = channels.to(tl.int64) * (tl.num_programs(0) // tl.cdiv(C, BLOCK_C))
        tl.store(partial_ptr + row + column, tl.sum(tl.where(mask, grad_log_scale * of_gain, 0.0), 0), channels < C)


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
    """Gradients in shift and log-scale."""
    if ORDER == _SHIFT_SCALE:
        return grad_x, grad * y + grad_log_det
    elif ORDER == _SCALE_SHIFT:
        return grad, grad * (y - shift) + grad_log_det
    else:
        return -grad_x, grad * y + grad_log_det


@triton.jit
def _inverse_gradients(grad, grad_y, x, shift, grad_log_det, ORDER: tl.constexpr):
    """Gradients in shift and log-scale."""
    if ORDER == _SHIFT_SCALE:
        return -grad, -grad * (x + shift) - grad_log_det
    elif ORDER == _SCALE_SHIFT:
        return -grad_y, -grad * x - grad_log_det
    else:
        return grad, -grad * (x - shift) - grad_log_det


@triton.jit
def _scale_map(
    u,
    learned,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    LOG_GAIN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):
    """``log s`` of the raw scale, and its derivatives in the raw scale and in the learned gain."""
    v = SLOPE * u + OFFSET
    if KIND == "sigmoid":
        # exp(-|v|) never overflows, and log(1 + exp(-|v|)) loses nothing where sigmoid(v) is next to 0 or 1.
        e = exp(-tl.abs(v))
        log_scale = tl.where(v < 0.0, v, 0.0) - log1p_of_fraction(e) + LOG_GAIN
        of_u = SLOPE * tl.where(v < 0.0, 1.0, e) / (1.0 + e)
        of_gain = log_scale
    else:
        value, derivative = _bound(v, KIND, LOW, HIGH)
        of_gain = GAIN * value
        log_scale = of_gain
        of_u = (GAIN * SLOPE) * derivative
        if HAS_GAIN:
            log_scale = log_scale * learned
            of_u = of_u * learned
    if HAS_FLOOR:
        # log(exp(log_scale) + floor), and the share of the first of the two.
        above = log_scale - LOG_FLOOR
        e = exp(-tl.abs(above))
        log_scale = tl.where(above < 0.0, LOG_FLOOR, log_scale) + log1p_of_fraction(e)
        share = tl.where(above < 0.0, e, 1.0) / (1.0 + e)
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
        denominator = 1.0 + tl.abs(v)
        value = v / denominator
        derivative = 1.0 / (denominator * denominator)
    elif KIND == "clip":
        outside = (v < LOW) | (v > HIGH)
        value = tl.where(v < LOW, LOW, tl.where(v > HIGH, HIGH, v))
        derivative = tl.where(outside, 0.0, tl.full(v.shape, 1.0, v.dtype))
    else:
        value = v
        derivative = tl.full(v.shape, 1.0, v.dtype)
    return value, derivative
