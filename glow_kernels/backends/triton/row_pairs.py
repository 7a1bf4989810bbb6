"""Device functions that read and write ``h`` (B, 2 (C - FIRST), P) for a tile of rows of z, whose layout may differ.

A network in channels-last memory format gives a channels-last ``h`` for any z, so ``CHANNELS_LAST`` and ``VECTOR`` here
describe ``h`` alone. If the two values of a channel are adjacent, they are read together, in vectors of channels, and
brought to the layout of a tile of z (BLOCK_C channels, rows) through shared memory. The first ``FIRST`` channels of z
have no values in h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glow_kernels.backends.triton.device_functions import multiple, row_pointers, store


@triton.jit
def load_row_pairs(
    h_ptr, h_strides, rows, P, count, start, C, FIRST, dtype: tl.constexpr, BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_ORDER: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Both values of the channels of z from ``start`` on, or zero; IN_ORDER in their order in memory, else reversed."""
    if INTERLEAVED and CHANNELS_LAST and VECTOR > 1:
        at, there = _pointers_of_both(h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C, VECTOR)
        both = tl.load(at, there, other=0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_C, 2)))
        first = tl.trans(first)
        second = tl.trans(second)
    else:
        first_at, second_at, there = _pointers_of_each(
            h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C, INTERLEAVED, CHANNELS_LAST, VECTOR
        )
        first = tl.load(first_at, there, other=0.0)
        second = tl.load(second_at, there, other=0.0)
    if IN_ORDER:
        return first.to(dtype), second.to(dtype)
    else:
        return second.to(dtype), first.to(dtype)


@triton.jit
def store_row_pairs(
    h_ptr, h_strides, first, second, rows, P, count, start, C, FIRST, BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_ORDER: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`load_row_pairs`."""
    if not IN_ORDER:
        first, second = second, first
    if INTERLEAVED and CHANNELS_LAST and VECTOR > 1:
        at, there = _pointers_of_both(h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C, VECTOR)
        both = tl.join(tl.trans(first), tl.trans(second))
        store(at, tl.reshape(both, (both.shape[0], 2 * BLOCK_C)), there)
    else:
        first_at, second_at, there = _pointers_of_each(
            h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C, INTERLEAVED, CHANNELS_LAST, VECTOR
        )
        store(first_at, first, there)
        store(second_at, second, there)


@triton.jit
def _pointers_of_both(h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses and mask (rows, 2 BLOCK_C) of the channels of ``h``, two for each channel of z."""
    channels = 2 * start + tl.arange(0, 2 * BLOCK_C) - multiple(2 * FIRST, VECTOR)
    there = (channels >= 0) & (channels < multiple(2 * (C - FIRST), VECTOR))
    at = _pointers(h_ptr, h_strides, rows, P, channels, True, VECTOR, False)
    return at, (rows < count)[:, None] & there[None, :]


@triton.jit
def _pointers_of_each(
    h_ptr, h_strides, rows, P, count, start, C, FIRST, BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Addresses of the first and of the second values, and their mask, each (BLOCK_C channels of z, rows)."""
    pairs = C - FIRST
    if CHANNELS_LAST:
        FIRST = multiple(FIRST, VECTOR)
        pairs = multiple(pairs, VECTOR)
    channels = start + tl.arange(0, BLOCK_C) - FIRST
    there = ((channels >= 0) & (channels < pairs))[:, None] & (rows < count)[None, :]
    first = 2 * channels if INTERLEAVED else channels
    second = first + (1 if INTERLEAVED else pairs)
    first_at = _pointers(h_ptr, h_strides, rows, P, first, CHANNELS_LAST, VECTOR, True)
    return first_at, _pointers(h_ptr, h_strides, rows, P, second, CHANNELS_LAST, VECTOR, True), there


@triton.jit
def _pointers(
    h_ptr, h_strides, rows, P, channels, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """:func:`row_pointers` for vectors of channels, which may be shorter than 16 bytes."""
    if CHANNELS_LAST and VECTOR > 1:
        at = row_pointers(h_ptr, (h_strides[0], 1, h_strides[2]), rows, P, channels, True, 1, TRANSPOSED)
        BYTES: tl.constexpr = VECTOR * h_ptr.dtype.element_ty.primitive_bitwidth // 8
        return tl.multiple_of(at, (BYTES, 1) if TRANSPOSED else (1, BYTES))
    else:
        return row_pointers(h_ptr, h_strides, rows, P, channels, CHANNELS_LAST, VECTOR, TRANSPOSED)
