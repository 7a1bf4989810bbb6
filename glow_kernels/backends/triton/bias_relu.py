"""Triton kernels of ``bias_relu``; the mathematics is in ``glow_kernels.ops.bias_relu``.

Forward reads x and writes y once. Backward reads the gradient and y and writes dx once; the gradient of the bias is
summed in the same pass, in a fixed order and in two stages, the second of which may be left to the caller.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, empty_padded, output_format
from glow_kernels.backends.triton.device_functions import (
    ARITHMETIC,
    kernel,
    pointers,
    row_pointers,
    row_sizes,
    store,
    tile_of_program,
)
from glow_kernels.backends.triton.launch import (
    channels_of_tile,
    launch,
    multiprocessors,
    planes,
    rows_of,
    strided,
    tiles_of,
)
from glow_kernels.backends.triton.sums import sum_partial

# Positions and channels of a tile of the copy kernel, whose tensors are small and not read in vectors.
BLOCK_P, BLOCK_C = tl.constexpr(64), tl.constexpr(16)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """``max(x + bias, 0)``."""
    y = torch.empty_like(x, memory_format=output_format(x))
    if x.numel() == 0:
        return y
    data, out = planes(x), planes(y)
    tiles = tiles_of((data, out), ())
    args = (*strided(data, out), bias.contiguous(), *data.shape[1:])
    launch(_bias_relu_kernel, tiles.count, x, *args, **tiles.options, DTYPE=ARITHMETIC[compute_dtype(x)])
    return y


def backward(grad: Tensor, y: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` in x and in the bias, given its output; the latter in ``parts`` partial sums."""
    grad_x = torch.empty_like(y, memory_format=output_format(y))
    channels, dtype = y.shape[1], compute_dtype(y)
    if y.numel() == 0:
        return grad_x, y.new_zeros((parts, channels), dtype=dtype)
    block_c = channels_of_tile(y)
    rows = rows_of("bias_relu", (y, grad, grad_x), block_c)
    tiles_c = -(-channels // block_c)
    chunks = parts if parts > 1 else min(rows.tiles, -(-4 * multiprocessors(y.device) // tiles_c))
    partial = y.new_empty((chunks, channels), dtype=dtype)
    args = (*strided(*rows.planes), partial, channels, rows.planes[0].shape[2], rows.count, chunks)
    options = {**rows.options, "DTYPE": ARITHMETIC[dtype], "ALL_REGISTERS": True}
    launch(_bias_relu_backward_kernel, tiles_c * chunks, y, *args, **options)
    return grad_x, partial if parts > 1 else sum_partial(partial, 0)[None]


def bias_backward(grad: Tensor, parts: int) -> Tensor:
    """Gradient in a bias that was added without ReLU, in ``parts`` partial sums; PyTorch computes a single one."""
    if parts == 1:
        others = [dimension for dimension in range(grad.dim()) if dimension != 1]
        return grad.sum(others, dtype=compute_dtype(grad), keepdim=True).view(1, -1)
    return _copy(grad, None, parts)


def pad(x: Tensor, channels: int, dtype: torch.dtype, channels_last: bool, parts: int) -> tuple[Tensor, Tensor]:
    """``x`` padded with zeros to ``channels`` channels, and its sums per channel in ``parts`` partial sums."""
    padded = empty_padded(x, channels, dtype, channels_last)
    return padded, _copy(x, padded, parts)


def _copy(x: Tensor, padded: Tensor | None, parts: int) -> Tensor:
    """Return ``parts`` partial sums of ``x`` per channel, and copy it to ``padded`` if given, with zeros beyond it."""
    sums = x.new_empty((parts, x.shape[1]), dtype=compute_dtype(x))
    if x.numel() == 0:
        sums.zero_()
        if padded is not None:
            padded.zero_()
        return sums
    data = planes(x)
    out = data if padded is None else planes(padded)
    count = data.shape[0] * data.shape[2]
    chunks = parts or min(-(-count // BLOCK_P.value), 4 * multiprocessors(x.device))
    args = (*strided(data, out), sums, data.shape[1], out.shape[1], data.shape[2], count, chunks)
    programs = -(-out.shape[1] // BLOCK_C.value) * chunks
    options = {"DTYPE": ARITHMETIC[compute_dtype(x)], "COPIES": padded is not None, "SUMS": parts > 0}
    launch(_copy_kernel, programs, x, *args, **options, num_warps=4, ALL_REGISTERS=True)
    return sums


@kernel
def _bias_relu_kernel(
    x_ptr, x_b, x_c, x_p, y_ptr, y_b, y_c, y_p, bias_ptr, C: tl.int32, P: tl.int32, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile of one sample: reads x once, writes y once."""
    sample, outer, inner, mask = tile_of_program(C, P, BLOCK, CHANNELS_LAST, VECTOR)
    x = tl.load(pointers(x_ptr, (x_b, x_c, x_p), sample, outer, inner, CHANNELS_LAST, VECTOR), mask, other=0.0)
    channels = inner + tl.arange(0, VECTOR)[None, :] if CHANNELS_LAST else outer
    total = x.to(DTYPE) + tl.load(bias_ptr + channels, mask, other=0.0).to(DTYPE)
    # Not a maximum, which would drop NaN.
    y = tl.where(total < 0.0, 0.0, total)
    store(pointers(y_ptr, (y_b, y_c, y_p), sample, outer, inner, CHANNELS_LAST, VECTOR), y, mask)


@kernel
def _bias_relu_backward_kernel(
    y_ptr, y_b, y_c, y_p, grad_ptr, grad_b, grad_c, grad_p, grad_x_ptr, grad_x_b, grad_x_c, grad_x_p, partial_ptr,
    C: tl.int32, P: tl.int32, count: tl.int32, chunks: tl.int32, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Every ``chunks``-th tile of a block of channels: reads y and the gradient once, writes dx once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    chunk = tl.program_id(0) % chunks
    channels = tl.program_id(0) // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), DTYPE)
    for tile in range(chunk, tl.cdiv(count, BLOCK_P), chunks):
        rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        y_at = row_pointers(y_ptr, (y_b, y_c, y_p), rows, P, channels, CHANNELS_LAST, VECTOR)
        grad_at = row_pointers(grad_ptr, (grad_b, grad_c, grad_p), rows, P, channels, CHANNELS_LAST, VECTOR)
        y = tl.load(y_at, mask, other=0.0)
        grad = tl.load(grad_at, mask, other=0.0)
        grad = tl.where(y > 0.0, grad, 0.0)
        total += grad.to(DTYPE)
        at = row_pointers(grad_x_ptr, (grad_x_b, grad_x_c, grad_x_p), rows, P, channels, CHANNELS_LAST, VECTOR)
        store(at, grad, mask)
    tl.store(partial_ptr + chunk.to(tl.int64) * C + channels, tl.sum(total, 0), channels < C)


@kernel
def _copy_kernel(
    x_ptr, x_b, x_c, x_p, out_ptr, out_b, out_c, out_p, partial_ptr, C: tl.int32, C_OUT: tl.int32, P: tl.int32,
    count: tl.int32, chunks: tl.int32, DTYPE: tl.constexpr, COPIES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Every ``chunks``-th tile of a block of channels: reads x once, writes it padded with channels of zeros."""
    chunk = tl.program_id(0) % chunks
    channels = tl.program_id(0) // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), DTYPE)
    for tile in range(chunk, tl.cdiv(count, BLOCK_P), chunks):
        rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        there = (rows < count)[:, None]
        at = row_pointers(x_ptr, (x_b, x_c, x_p), rows, P, channels, False, 1)
        x = tl.load(at, there & (channels < C)[None, :], other=0.0)
        if SUMS:
            total += x.to(DTYPE)
        if COPIES:
            out_at = row_pointers(out_ptr, (out_b, out_c, out_p), rows, P, channels, False, 1)
            store(out_at, x.to(DTYPE), there & (channels < C_OUT)[None, :])
    if SUMS:
        tl.store(partial_ptr + chunk.to(tl.int64) * C + channels, tl.sum(total, 0), channels < C)
