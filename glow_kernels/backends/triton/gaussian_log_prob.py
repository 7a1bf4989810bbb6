"""Triton kernels of ``gaussian_log_prob``; the mathematics is in ``glow_kernels.ops.gaussian_log_prob``.

A program covers one tile of one sample. Per element of z every kernel reads z or eps, 2 elements of h and, in backward,
the gradient, and writes at most one element of z and 2 of h. The log-density is summed in two stages, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.backends.triton.device_functions import (
    ARITHMETIC,
    exp,
    kernel,
    load_pair,
    pointers,
    store,
    store_pair,
    tile_of_program,
)
from glow_kernels.backends.triton.launch import launch, planes, strided, tiles_of
from glow_kernels.backends.triton.sums import sum_partial


def forward(z: Tensor, h: Tensor, layout: str) -> Tensor:
    """Log-density (B,) of z (B, C, *spatial)."""
    dtype = compute_dtype(z)
    if z.numel() == 0:
        return z.new_zeros(z.shape[0], dtype=dtype)
    data, conditions = planes(z), planes(h)
    tiles = tiles_of((data,), (conditions,))
    partial = z.new_empty((tiles.samples, tiles.per_sample), dtype=dtype)
    launch(
        _log_prob_kernel,
        tiles.count,
        z,
        *(*strided(data, conditions), partial),
        *data.shape[1:],
        INTERLEAVED=layout.startswith("interleaved"),
        **tiles.options,
    )
    return sum_partial(partial, 1)


def backward(grad: Tensor, z: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in z and h."""
    return _gradients(grad, z, h, layout, _LOG_PROB)


def sample(eps: Tensor, h: Tensor, layout: str) -> Tensor:
    """``mean + exp(log_sd) * eps``."""
    return _map(eps, h, layout, inverse=False)


def sample_backward(grad: Tensor, eps: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``sample`` in eps and h."""
    return _gradients(grad, eps, h, layout, _SAMPLE)


def standardize(z: Tensor, h: Tensor, layout: str) -> Tensor:
    """``(z - mean) * exp(-log_sd)``."""
    return _map(z, h, layout, inverse=True)


def standardize_backward(grad: Tensor, eps: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``standardize`` in z and h."""
    return _gradients(grad, eps, h, layout, _STANDARDIZE)


_LOG_PROB = tl.constexpr(0)
_SAMPLE = tl.constexpr(1)
_STANDARDIZE = tl.constexpr(2)


def _map(data: Tensor, h: Tensor, layout: str, inverse: bool) -> Tensor:
    result = torch.empty_like(data, memory_format=output_format(data))
    if data.numel() == 0:
        return result
    x, conditions, out = planes(data), planes(h), planes(result)
    tiles = tiles_of((x, out), (conditions,))
    launch(
        _map_kernel,
        tiles.count,
        data,
        *strided(x, conditions, out),
        *x.shape[1:],
        INTERLEAVED=layout.startswith("interleaved"),
        INVERSE=inverse,
        DTYPE=ARITHMETIC[compute_dtype(data)],
        **tiles.options,
    )
    return result


def _gradients(grad: Tensor, data: Tensor, h: Tensor, layout: str, function: tl.constexpr) -> tuple[Tensor, Tensor]:
    grad_data = torch.empty_like(data, memory_format=output_format(data))
    grad_h = torch.empty_like(h, memory_format=output_format(h))
    if data.numel() == 0:
        return grad_data, grad_h
    x, conditions, dx, dh = map(planes, (data, h, grad_data, grad_h))
    # The gradient of a log-density is one number per sample.
    g = grad[:, None, None].expand_as(x) if function is _LOG_PROB else planes(grad)
    tiles = tiles_of((x, dx) if function is _LOG_PROB else (x, g, dx), (conditions, dh))
    launch(
        _gradient_kernel,
        tiles.count,
        data,
        *strided(g, x, conditions, dx, dh),
        *x.shape[1:],
        INTERLEAVED=layout.startswith("interleaved"),
        FUNCTION=function.value,
        DTYPE=ARITHMETIC[compute_dtype(data)],
        **tiles.options,
    )
    return grad_data, grad_h


@kernel
def _log_prob_kernel(
    z_ptr, z_b, z_c, z_p, h_ptr, h_b, h_c, h_p, partial_ptr, C: tl.int32, P: tl.int32,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Reads z, mean and log_sd once, writes one partial sum per program."""
    sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    z, mean, log_sd = _load(
        z_ptr, (z_b, z_c, z_p), h_ptr, (h_b, h_c, h_p), sample, outer, inner, mask, C, partial_ptr.dtype.element_ty,
        INTERLEAVED, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    standardized = (z - mean) * exp(-log_sd)
    # log(2 pi) / 2
    log_prob = -0.91893853320467274178 - log_sd - 0.5 * standardized * standardized
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, log_prob, 0.0)))


@kernel
def _map_kernel(
    x_ptr, x_b, x_c, x_p, h_ptr, h_b, h_c, h_p, out_ptr, out_b, out_c, out_p, C: tl.int32, P: tl.int32,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sample or standardize: reads eps or z, mean and log_sd once, writes z or eps once."""
    sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    x, mean, log_sd = _load(
        x_ptr, (x_b, x_c, x_p), h_ptr, (h_b, h_c, h_p), sample, outer, inner, mask, C, DTYPE,
        INTERLEAVED, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    if INVERSE:
        out = (x - mean) * exp(-log_sd)
    else:
        out = mean + exp(log_sd) * x
    store(pointers(out_ptr, (out_b, out_c, out_p), sample, outer, inner, CHANNELS_LAST, VECTOR), out, mask)


@kernel
def _gradient_kernel(
    grad_ptr, grad_b, grad_c, grad_p, x_ptr, x_b, x_c, x_p, h_ptr, h_b, h_c, h_p,
    grad_x_ptr, grad_x_b, grad_x_c, grad_x_p, grad_h_ptr, grad_h_b, grad_h_c, grad_h_p, C: tl.int32, P: tl.int32,
    INTERLEAVED: tl.constexpr, FUNCTION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Backward of one of the three functions: reads x, the gradient, mean and log_sd once, writes dx and dh once."""
    sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    x, mean, log_sd = _load(
        x_ptr, (x_b, x_c, x_p), h_ptr, (h_b, h_c, h_p), sample, outer, inner, mask, C, DTYPE,
        INTERLEAVED, CHANNELS_LAST, VECTOR,
    )  # fmt: skip
    if FUNCTION == _LOG_PROB:
        weight = tl.load(grad_ptr + sample.to(tl.int64) * grad_b).to(DTYPE)
        inverse_sd = exp(-log_sd)
        standardized = (x - mean) * inverse_sd
        grad_mean = weight * standardized * inverse_sd
        grad_x = -grad_mean
        grad_log_sd = weight * (standardized * standardized - 1.0)
    else:
        grad_at = pointers(grad_ptr, (grad_b, grad_c, grad_p), sample, outer, inner, CHANNELS_LAST, VECTOR)
        grad = tl.load(grad_at, mask, other=0.0).to(DTYPE)
        if FUNCTION == _SAMPLE:
            grad_x = grad * exp(log_sd)
            grad_mean = grad
            grad_log_sd = grad_x * x
        else:
            grad_x = grad * exp(-log_sd)
            grad_mean = -grad_x
            grad_log_sd = -grad * x
    grad_x_at = pointers(grad_x_ptr, (grad_x_b, grad_x_c, grad_x_p), sample, outer, inner, CHANNELS_LAST, VECTOR)
    store(grad_x_at, grad_x, mask)
    store_pair(
        grad_h_ptr, (grad_h_b, grad_h_c, grad_h_p), grad_mean, grad_log_sd, sample, outer, inner, mask, C,
        INTERLEAVED, True, CHANNELS_LAST, VECTOR,
    )  # fmt: skip


@triton.jit
def _load(
    x_ptr, x_strides, h_ptr, h_strides, sample, outer, inner, mask, C, dtype: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Elements of x, with their means and logarithms of standard deviations."""
    at = pointers(x_ptr, x_strides, sample, outer, inner, CHANNELS_LAST, VECTOR)
    mean, log_sd = load_pair(
        h_ptr, h_strides, sample, outer, inner, mask, C, dtype, INTERLEAVED, True, CHANNELS_LAST, VECTOR
    )
    return tl.load(at, mask, other=0.0).to(dtype), mean, log_sd
