"""Reference of ``affine_coupling``; the mathematics is in ``glow_kernels.ops.affine_coupling``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format, without_autocast


@without_autocast
def forward(
    x: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``y`` like x and ``log_det`` (B,) of x -> y."""
    dtype = compute_dtype(x)
    raw_scale, shift = split(h.to(dtype), layout)
    log_scale = scale_map(raw_scale, log_scale_gain, kind, scale_parameters)
    scale, wide_x = log_scale.exp(), x.to(dtype)
    if order == "shift_scale":
        y = (wide_x + shift) * scale
    elif order == "scale_shift":
        y = wide_x * scale + shift
    else:
        y = (wide_x - shift) * scale
    return y.to(x.dtype).contiguous(memory_format=output_format(x)), log_scale.flatten(1).sum(1)


@without_autocast
def inverse(
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``x`` like y and ``log_det`` (B,) of y -> x."""
    dtype = compute_dtype(y)
    raw_scale, shift = split(h.to(dtype), layout)
    log_scale = scale_map(raw_scale, log_scale_gain, kind, scale_parameters)
    inverse_scale, wide_y = (-log_scale).exp(), y.to(dtype)
    if order == "shift_scale":
        x = wide_y * inverse_scale - shift
    elif order == "scale_shift":
        x = (wide_y - shift) * inverse_scale
    else:
        x = wide_y * inverse_scale + shift
    return x.to(y.dtype).contiguous(memory_format=output_format(y)), -log_scale.flatten(1).sum(1)


@without_autocast
def backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in x, h and log_scale_gain (empty if there is none)."""
    dtype = compute_dtype(y)
    raw_scale, shift = split(h.to(dtype), layout)
    scale = scale_map(raw_scale, log_scale_gain, kind, scale_parameters).exp()
    wide_grad, wide_y = grad.to(dtype), y.to(dtype)
    grad_x = wide_grad * scale
    if order == "shift_scale":
        grad_shift, scaled = grad_x, wide_y
    elif order == "scale_shift":
        grad_shift, scaled = wide_grad, wide_y - shift
    else:
        grad_shift, scaled = -grad_x, wide_y
    grad_log_scale = wide_grad * scaled + _per_sample(grad_log_det, y)
    grad_raw, grad_gain = scale_map_backward(grad_log_scale, raw_scale, log_scale_gain, kind, scale_parameters)
    return grad_x.to(y.dtype), merge(grad_raw, grad_shift, layout).to(h.dtype), grad_gain


@without_autocast
def inverse_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``inverse`` in y, h and log_scale_gain (empty if there is none)."""
    dtype = compute_dtype(x)
    raw_scale, shift = split(h.to(dtype), layout)
    inverse_scale = (-scale_map(raw_scale, log_scale_gain, kind, scale_parameters)).exp()
    wide_grad, wide_x = grad.to(dtype), x.to(dtype)
    grad_y = wide_grad * inverse_scale
    if order == "shift_scale":
        grad_shift, scaled = -wide_grad, wide_x + shift
    elif order == "scale_shift":
        grad_shift, scaled = -grad_y, wide_x
    else:
        grad_shift, scaled = wide_grad, wide_x - shift
    grad_log_scale = -wide_grad * scaled - _per_sample(grad_log_det, x)
    grad_raw, grad_gain = scale_map_backward(grad_log_scale, raw_scale, log_scale_gain, kind, scale_parameters)
    return grad_y.to(x.dtype), merge(grad_raw, grad_shift, layout).to(h.dtype), grad_gain


@without_autocast
def reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input x of ``forward`` and the gradients in x, h and log_scale_gain (empty if there is none)."""
    options = (log_scale_gain, kind, scale_parameters, layout, order)
    x, _ = inverse(y, h, *options)
    grad_x, grad_h, grad_gain = backward(grad, grad_log_det, y, h, *options)
    return (
        x,
        grad_x.contiguous(memory_format=output_format(y)),
        grad_h.contiguous(memory_format=output_format(h)),
        grad_gain,
    )


@without_autocast
def in_place_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> Tensor:
    """Gradient in h; y and ``grad`` are overwritten with the input x of ``forward`` and its gradient."""
    options = (None, kind, scale_parameters, layout, order)
    x, grad_x, grad_h, _ = reversible_backward(grad, grad_log_det, y, h, *options)
    y.copy_(x)
    grad.copy_(grad_x)
    return grad_h


def split(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Raw scale u and shift t, each (B, C, *spatial), from ``h`` (B, 2 C, *spatial)."""
    if layout.startswith("chunk"):
        first, second = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    else:
        first, second = h[:, 0::2], h[:, 1::2]
    return (first, second) if layout.endswith("scale_shift") else (second, first)


def merge(raw_scale: Tensor, shift: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`split`."""
    pair = (raw_scale, shift) if layout.endswith("scale_shift") else (shift, raw_scale)
    if layout.startswith("chunk"):
        return torch.cat(pair, dim=1)
    return torch.stack(pair, dim=2).flatten(1, 2)


def scale_map(raw: Tensor, log_scale_gain: Tensor | None, kind: str, parameters: Sequence[float]) -> Tensor:
    """``log s`` of the raw scale (B, C, *spatial)."""
    slope, offset, gain, floor, low, high = parameters
    v = slope * raw + offset
    log_scale = F.logsigmoid(v) + math.log(gain) if kind == "sigmoid" else gain * _bound(v, kind, low, high)
    if log_scale_gain is not None:
        log_scale = log_scale * _per_channel(log_scale_gain, raw)
    return torch.logaddexp(log_scale, log_scale.new_full((), math.log(floor))) if floor > 0.0 else log_scale


def scale_map_backward(
    grad: Tensor, raw: Tensor, log_scale_gain: Tensor | None, kind: str, parameters: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``scale_map`` in the raw scale and in log_scale_gain (empty if there is none), given dL/dlog_s."""
    slope, offset, gain, floor, low, high = parameters
    v = slope * raw + offset
    if floor > 0.0:
        without_floor = scale_map(raw, log_scale_gain, kind, (slope, offset, gain, 0.0, low, high))
        grad = grad * torch.sigmoid(without_floor - math.log(floor))
    if kind == "sigmoid":
        return grad * slope * torch.sigmoid(-v), grad.new_empty(0)
    grad_raw = grad * (slope * gain) * _bound_derivative(v, kind, low, high)
    if log_scale_gain is None:
        return grad_raw, grad.new_empty(0)
    grad_gain = (grad * gain * _bound(v, kind, low, high)).transpose(0, 1).flatten(1).sum(1)
    return grad_raw * _per_channel(log_scale_gain, raw), grad_gain


def _bound(v: Tensor, kind: str, low: float, high: float) -> Tensor:
    if kind == "tanh":
        return torch.tanh(v)
    if kind == "atan":
        return torch.atan(v)
    if kind == "softsign":
        return F.softsign(v)
    return v.clamp(low, high) if kind == "clip" else v


def _bound_derivative(v: Tensor, kind: str, low: float, high: float) -> Tensor:
    if kind == "tanh":
        return 1.0 - torch.tanh(v).square()
    if kind == "atan":
        return 1.0 / (1.0 + v.square())
    if kind == "softsign":
        return 1.0 / (1.0 + v.abs()).square()
    return ((v >= low) & (v <= high)).to(v.dtype) if kind == "clip" else torch.ones_like(v)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (like.dim() - 2))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
