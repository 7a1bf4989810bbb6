"""Triton kernels of ``bias_relu``; the mathematics stands in ``glow_kernels.ops.bias_relu``.

Forward reads x and writes y once. Backward reads the gradient and y and writes dx once; the gradient of the bias is
summed in the same pass, in two stages and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.backends.triton.device_functions import (
    channel_offsets,
    multiple,
    offsets,
    row_offsets,
    store,
    tile_of_program,
    wide,
)
from glow_kernels.backends.triton.launch import (
    elementwise_tile,
    is_channels_last,
    launch,
    multiprocessors,
    planes,
    power_of_two,
    rows_of,
)
from glow_kernels.backends.triton.sums import sum_partial

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """``max(x + bias, 0)``."""
    y = torch.empty_like(x, memory_format=output_format(x))
    if x.numel() == 0:
        return y
    data, out = planes(x), planes(y)
    tile = elementwise_tile((data, out), ())
    launch(
        _forward_kernel,
        tile.samples * tile.tiles,
        x,
        *(data, data.stride(), bias.contiguous(), out, out.stride()),
        *data.shape[1:],
        DTYPE=_DTYPES[compute_dtype(x)],
        **tile.options,
    )
    return y


def backward(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in x and in the bias, from its output."""
    grad_x = torch.empty_like(y, memory_format=output_format(y))
    channels, dtype = y.shape[1], compute_dtype(y)
    if y.numel() == 0:
        return grad_x, y.new_zeros(channels, dtype=dtype)
    block_c = min(max(8, power_of_two(channels)), 64) if is_channels_last(planes(y)) else 4
    rows = rows_of("statistics", (y, grad, grad_x), block_c)
    tiles_c = -(-channels // block_c)
    chunks = min(rows.tiles, -(-4 * multiprocessors(y.device) // tiles_c))
    partial = y.new_empty((chunks, channels), dtype=dtype)
    strided = (part for view in rows.planes for part in (view, view.stride()))
    launch(
        _backward_kernel,
        tiles_c * chunks,
        y,
        *strided,
        *(partial, channels, rows.planes[0].shape[2], rows.count, chunks),
        DTYPE=_DTYPES[dtype],
        **rows.options,
    )
    return grad_x, sum_partial(partial, 0)


@triton.jit
def _forward_kernel(
    x_ptr,
    x_strides,
    bias_ptr,
    y_ptr,
    y_strides,
    C,
    P,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of one sample: reads x once, writes y once."""
    sample, positions, first_channel, P, C = tile_of_program(C, P, BLOCK_P, BLOCK_C, CHANNELS_LAST, VECTOR)
    channels = first_channel + tl.arange(0, BLOCK_C)
    mask = (positions < P)[:, None] & (channels < C)[None, :]
    x = tl.load(x_ptr + offsets(sample, positions, channels, x_strides, CHANNELS_LAST, VECTOR), mask, other=0.0)
    bias = tl.load(bias_ptr + channels, channels < C, other=0.0)
    total = x.to(DTYPE) + bias.to(DTYPE)[None, :]
    # Not the maximum, which would lose NaN.
    y = tl.where(total < 0.0, 0.0, total)
    store(y_ptr + offsets(sample, positions, channels, y_strides, CHANNELS_LAST, VECTOR), y, mask)


@triton.jit
def _backward_kernel(
    y_ptr,
    y_strides,
    grad_ptr,
    grad_strides,
    grad_x_ptr,
    grad_x_strides,
    partial_ptr,
    C,
    P,
    count,
    chunks,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Every ``chunks``-th tile of some channels: reads y and the gradient once, writes dx once."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    chunk = tl.program_id(0) % chunks
    channels = tl.program_id(0) // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    y_channels = channel_offsets(channels, y_strides, CHANNELS_LAST, VECTOR)[None, :]
    grad_channels = channel_offsets(channels, grad_strides, CHANNELS_LAST, VECTOR)[None, :]
    grad_x_channels = channel_offsets(channels, grad_x_strides, CHANNELS_LAST, VECTOR)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), DTYPE)
    for tile in range(chunk, tl.cdiv(count, BLOCK_P), chunks):
        first = tile * BLOCK_P
        if WIDE:
            first = wide(tile) * BLOCK_P
        rows = first + tl.arange(0, BLOCK_P)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        y_at = row_offsets(rows, P, y_strides, CHANNELS_LAST, VECTOR)[:, None] + y_channels
        grad_at = row_offsets(rows, P, grad_strides, CHANNELS_LAST, VECTOR)[:, None] + grad_channels
        y = tl.load(y_ptr + y_at, mask, other=0.0)
        grad = tl.load(grad_ptr + grad_at, mask, other=0.0)
        grad = tl.where(y > 0.0, grad, 0.0)
        total += grad.to(DTYPE)
        grad_x_at = row_offsets(rows, P, grad_x_strides, CHANNELS_LAST, VECTOR)[:, None] + grad_x_channels
        store(grad_x_ptr + grad_x_at, grad, mask)
    at = partial_ptr + chunk.to(tl.int64) * C + channels
    tl.store(at, tl.sum(total, 0), channels < C)
