"""Device functions that the kernels share: addresses of tiles, and accurate elementary functions.

``VECTOR`` is the number of adjacent elements that are read at once: 16 bytes of the smallest type if every size, stride
and address allows it, else 1. Triton's float32 ``exp`` is one instruction with an error of ``|x|`` ulp; libdevice is
not available on every target, nor in the interpreter. So the functions here are built from ``exp2`` of small arguments,
``log`` and arithmetic, for float32 and float64.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from glow_kernels.backends.triton import INTERPRETED

# Triton's types for arithmetic, which kernels take as DTYPE.
ARITHMETIC = {torch.float32: tl.float32, torch.float64: tl.float64}

_INTERPRETED = tl.constexpr(INTERPRETED)


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for a kernel that is specialized only on types and compile-time arguments.

    By default Triton also compiles a variant for every combination of integers that are 1, divisible by 16 or wider
    than 31 bits, and of addresses divisible by 16. Here integers are int64 unless the kernel says otherwise, and
    ``VECTOR`` alone expresses alignment.
    """
    annotations = function.__annotations__
    passed = [name for name in inspect.signature(function).parameters if "constexpr" not in str(annotations.get(name))]
    numbers = [name for name in passed if not name.endswith("_ptr")]
    function.__annotations__ = dict.fromkeys(numbers, "i64") | annotations
    return triton.jit(function, do_not_specialize=passed)


@triton.jit
def tile_of_program(C, P, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Indices of the vectors of this program and which of them exist; BLOCK elements of one sample.

    They are consecutive in memory. Sample, outer index and first inner index of each, and a mask: the inner index
    counts positions, or channels if these are the last dimension in memory.
    """
    inner_size = (C if CHANNELS_LAST else P) // VECTOR
    vectors = inner_size * (P if CHANNELS_LAST else C)
    tiles = tl.cdiv(vectors, BLOCK // VECTOR)
    program = tl.program_id(0)
    vector = program % tiles * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)[:, None]
    return program // tiles, vector // inner_size, vector % inner_size * VECTOR, vector < vectors


@triton.jit
def pointers(ptr, strides, sample, outer, inner, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses (vectors, VECTOR) in (B, C, P)."""
    if CHANNELS_LAST:
        stride_outer = strides[2]
        stride_inner = strides[1]
    else:
        stride_outer = strides[1]
        stride_inner = strides[2]
    start = sample.to(tl.int64) * strides[0] + outer.to(tl.int64) * stride_outer
    if VECTOR == 1:
        return ptr + (start + inner.to(tl.int64) * stride_inner)
    else:
        return tl.multiple_of(ptr + (start + inner + tl.arange(0, VECTOR)[None, :]), (1, 16))


@triton.jit
def store(pointers, values, mask):
    """Store ``values``, rounded to the nearest value of the pointers' element type."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16 and values.dtype != tl.bfloat16:
        # The interpreter truncates to bfloat16 instead of rounding.
        values = values.to(tl.float32)
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    tl.store(pointers, values.to(dtype), mask)


@triton.jit
def exp(x):
    """``exp(x)`` within 2 ulp; 0 and infinity beyond the range of float32, NaN for NaN."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    # Comparisons are false for NaN, which then passes through.
    n, r = _halvings(tl.where(x < -105.0, -105.0, tl.where(x > 89.0, 89.0, x)))
    # Two factors, since 2^n itself may be subnormal or out of range.
    half = tl.floor(n * 0.5)
    return tl.exp2(r * 1.44269504088896341) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def _halvings(x):
    """``n`` and ``r`` with ``x = n ln 2 + r`` and ``|r| <= ln(2) / 2``."""
    n = tl.floor(x * 1.44269504088896341 + 0.5)
    # n ln 2 in two parts, the first of which is exact.
    return n, (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6


@triton.jit
def reciprocal(x):
    """``1 / x`` within 1 ulp for finite ``x``; a GPU's division of float32 is off by 2."""
    approximate = 1.0 / x
    return approximate + approximate * (1.0 - x * approximate)


@triton.jit
def log1p_of_fraction(x):
    """``log(1 + x)`` for 0 <= x <= 1, corrected for the rounding error of the sum."""
    w = 1.0 + x
    return tl.log(w) + (x - (w - 1.0)) / w


@triton.jit
def tanh(v):
    """``tanh(v)`` and its derivative, from ``e = exp(-2 |v|)`` and ``e - 1`` without cancellation."""
    y = -2.0 * tl.abs(v)
    n, r = _halvings(tl.where(y < -40.0, -40.0, y))
    # exp(r) - 1 by its Taylor series: the relative error of leaving out the rest is below 2e-8 and 3e-17.
    TERMS: tl.constexpr = 14 if v.dtype == tl.float64 else 7
    series = tl.full(r.shape, 1.0, r.dtype)
    for k in tl.static_range(TERMS - 1):
        series = 1.0 + r * series * (1.0 / (TERMS - k))
    power = tl.exp2(n)
    expm1 = power * (r * series) + (power - 1.0)
    e = power * (1.0 + r * series)
    inverse = reciprocal(1.0 + e)
    magnitude = -expm1 * inverse
    return tl.where(v < 0.0, -magnitude, magnitude), 4.0 * e * inverse * inverse


@triton.jit
def atan(v):
    """``atan(v)``: halve the angle twice, then a Taylor series whose argument is at most tan(pi / 16) = 0.2."""
    magnitude = tl.abs(v)
    inverted = magnitude > 1.0
    x = tl.where(inverted, 1.0 / tl.where(inverted, magnitude, 1.0), magnitude)
    x = x / (1.0 + tl.sqrt(1.0 + x * x))
    x = x / (1.0 + tl.sqrt(1.0 + x * x))
    square = x * x
    # The first term left out is below 0.2^(2 TERMS) / (2 TERMS + 1): 5e-10 and 2e-18 of the sum.
    TERMS: tl.constexpr = 12 if v.dtype == tl.float64 else 6
    series = tl.zeros_like(x)
    for k in tl.static_range(TERMS):
        series = 1.0 / (2 * (TERMS - 1 - k) + 1) - square * series
    angle = 4.0 * x * series
    angle = tl.where(inverted, 1.5707963267948966 - angle, angle)
    return tl.where(v < 0.0, -angle, angle)


@triton.jit
def load_pair(
    h_ptr, h_strides, sample, outer, inner, mask, C, dtype: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_ORDER: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The two values of ``h`` (B, 2 C, P) of every element; IN_ORDER in their order in memory, else reversed."""
    if INTERLEAVED and CHANNELS_LAST and VECTOR > 1:
        both = tl.load(pointers(h_ptr, h_strides, sample, outer, 2 * inner, True, 2 * VECTOR), mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], VECTOR, 2)))
    else:
        first_at, second_at = _pair_pointers(
            h_ptr, h_strides, sample, outer, inner, C, INTERLEAVED, CHANNELS_LAST, VECTOR
        )
        first = tl.load(first_at, mask, other=0.0)
        second = tl.load(second_at, mask, other=0.0)
    if IN_ORDER:
        return first.to(dtype), second.to(dtype)
    else:
        return second.to(dtype), first.to(dtype)


@triton.jit
def store_pair(
    h_ptr, h_strides, first, second, sample, outer, inner, mask, C,
    INTERLEAVED: tl.constexpr, IN_ORDER: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`load_pair`."""
    if not IN_ORDER:
        first, second = second, first
    if INTERLEAVED and CHANNELS_LAST and VECTOR > 1:
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * VECTOR))
        store(pointers(h_ptr, h_strides, sample, outer, 2 * inner, True, 2 * VECTOR), both, mask)
    else:
        first_at, second_at = _pair_pointers(
            h_ptr, h_strides, sample, outer, inner, C, INTERLEAVED, CHANNELS_LAST, VECTOR
        )
        store(first_at, first, mask)
        store(second_at, second, mask)


@triton.jit
def _pair_pointers(
    h_ptr, h_strides, sample, outer, inner, C,
    INTERLEAVED: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST:
        first = 2 * inner if INTERLEAVED else inner
        second = first + (1 if INTERLEAVED else C)
        return (
            pointers(h_ptr, h_strides, sample, outer, first, True, VECTOR),
            pointers(h_ptr, h_strides, sample, outer, second, True, VECTOR),
        )
    else:
        first = 2 * outer if INTERLEAVED else outer
        second = first + (1 if INTERLEAVED else C)
        return (
            pointers(h_ptr, h_strides, sample, first, inner, False, VECTOR),
            pointers(h_ptr, h_strides, sample, second, inner, False, VECTOR),
        )


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """``n``, a multiple of VECTOR, in a form that tells the compiler so."""
    return n // VECTOR * VECTOR


@triton.jit
def row_sizes(C, P, count, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Channels, positions and rows, in a form that tells the compiler that no vector crosses an end."""
    if CHANNELS_LAST:
        return multiple(C, VECTOR), P, count
    else:
        return C, multiple(P, VECTOR), multiple(count, VECTOR)


@triton.jit
def row_pointers(
    ptr, strides, rows, P, channels, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """Addresses (rows, channels), if TRANSPOSED (channels, rows), in (B, C, P); a row is a position of any sample."""
    samples = rows // P
    positions = (rows - samples * P).to(tl.int64)
    channels = channels.to(tl.int64)
    if VECTOR == 1 or CHANNELS_LAST:
        positions *= strides[2]
    if VECTOR == 1 or not CHANNELS_LAST:
        channels *= strides[1]
    positions += samples.to(tl.int64) * strides[0]
    if TRANSPOSED:
        at = ptr + (channels[:, None] + positions[None, :])
    else:
        at = ptr + (positions[:, None] + channels[None, :])
    if VECTOR == 1:
        return at
    else:
        return tl.multiple_of(at, (1, 16) if CHANNELS_LAST != TRANSPOSED else (16, 1))
