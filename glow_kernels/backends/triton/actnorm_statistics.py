"""Triton kernels of ``actnorm_statistics``; the mathematics is in ``glow_kernels.ops.actnorm_statistics``.

The first kernel reads every element once. It subtracts the mean of its first tile, so that nothing cancels however far
from zero the data are. Tiles, and then programs, are combined as in Chan, Golub and LeVeque, 1979.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.backends.triton.device_functions import ARITHMETIC, kernel, row_pointers, row_sizes
from glow_kernels.backends.triton.launch import channels_of_tile, launch, multiprocessors, rows_of, strided

# Enough chunks for every multiprocessor even if there is only one tile of channels.
_MAX_CHUNKS = 512


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (C,) of ``x`` (B, C, *spatial), over samples and positions."""
    channels = x.shape[1]
    mean = x.new_empty(channels, dtype=compute_dtype(x))
    if x.numel() == 0:
        mean.fill_(torch.nan)
        return mean, mean.clone()
    block_c = channels_of_tile(x)
    rows = rows_of("statistics", (x,), block_c)
    (view,) = rows.planes
    tiles_c = -(-channels // block_c)
    chunks = min(rows.tiles, _MAX_CHUNKS, -(-4 * multiprocessors(x.device) // tiles_c))
    # Mean, sum of squared deviations and number of elements, of every chunk and channel.
    partial = x.new_empty((3, chunks, channels), dtype=torch.float64)
    args = (*strided(view), partial, channels, view.shape[2], rows.count, chunks)
    launch(_chunk_kernel, tiles_c * chunks, x, *args, **rows.options, DTYPE=ARITHMETIC[mean.dtype])

    variance = torch.empty_like(mean)
    launch(
        _combine_kernel,
        channels,
        x,
        *(partial, mean, variance, channels, chunks),
        BLOCK_N=_MAX_CHUNKS,
        BLOCK_C=1,
        num_warps=4,
    )
    return mean, variance


@kernel
def _chunk_kernel(
    x_ptr, x_b, x_c, x_p, partial_ptr, C: tl.int32, P: tl.int32, count: tl.int32, chunks: tl.int32, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Every ``chunks``-th tile of a block of channels: reads x once."""
    C, P, count = row_sizes(C, P, count, CHANNELS_LAST, VECTOR)
    chunk = tl.program_id(0) % chunks
    channels = tl.program_id(0) // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = tl.zeros((BLOCK_C,), DTYPE)
    mean = tl.zeros((BLOCK_C,), DTYPE)
    deviations = tl.zeros((BLOCK_C,), DTYPE)
    seen = tl.zeros((), DTYPE)
    for tile in range(chunk, tl.cdiv(count, BLOCK_P), chunks):
        first = tile * BLOCK_P
        rows = first + tl.arange(0, BLOCK_P)
        mask = (rows < count)[:, None] & (channels < C)[None, :]
        at = row_pointers(x_ptr, (x_b, x_c, x_p), rows, P, channels, CHANNELS_LAST, VECTOR)
        x = tl.load(at, mask, other=0.0).to(DTYPE)

        n = tl.minimum(count - first, BLOCK_P).to(DTYPE)
        # Relative to the first row, so that the mean of a constant channel is exact and its deviation zero.
        row = tl.sum(tl.where((rows == first)[:, None], x, 0.0), 0)
        base = tl.where(seen == 0.0, row + tl.sum(tl.where(mask, x - row[None, :], 0.0), 0) / n, base)
        from_base = tl.where(mask, x - base[None, :], 0.0)
        tile_mean = tl.sum(from_base, 0) / n
        from_mean = tl.where(mask, from_base - tile_mean[None, :], 0.0)

        delta = tile_mean - mean
        weight = n / (seen + n)
        mean += delta * weight
        deviations += tl.sum(from_mean * from_mean, 0) + delta * delta * (seen * weight)
        seen += n
    at = partial_ptr + chunk.to(tl.int64) * C + channels
    plane = chunks.to(tl.int64) * C
    tl.store(at, base.to(tl.float64) + mean.to(tl.float64), channels < C)
    tl.store(at + plane, deviations.to(tl.float64), channels < C)
    tl.store(at + 2 * plane, tl.zeros((BLOCK_C,), tl.float64) + seen, channels < C)


@kernel
def _combine_kernel(
    partial_ptr, mean_ptr, variance_ptr, C: tl.int32, chunks: tl.int32, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Combine the chunks of a block of channels, in float64."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = tl.arange(0, BLOCK_N)
    mask = (chunk < chunks)[:, None] & (channels < C)[None, :]
    at = partial_ptr + chunk[:, None] * C + channels[None, :]
    means = tl.load(at, mask, other=0.0)
    deviations = tl.load(at + chunks * C, mask, other=0.0)
    counts = tl.load(at + 2 * chunks * C, mask, other=0.0)

    # Channels beyond C have no elements.
    total = tl.maximum(tl.sum(counts, 0), 1.0)
    first = tl.sum(tl.where((chunk == 0)[:, None], means, 0.0), 0)
    mean = first + tl.sum(counts * tl.where(mask, means - first[None, :], 0.0), 0) / total
    from_mean = tl.where(mask, means - mean[None, :], 0.0)
    variance = tl.sum(deviations + counts * from_mean * from_mean, 0) / total
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(mean_ptr + channels, mean.to(mean_ptr.dtype.element_ty), channels < C)
    tl.store(variance_ptr + channels, variance.to(variance_ptr.dtype.element_ty), channels < C)
