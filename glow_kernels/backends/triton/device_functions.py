"""Device functions that the kernels share: addresses of tiles, and elementary functions that stay accurate.

A tile is ``(positions, channels)`` of one sample. ``VECTOR`` divides every size and stride that enters an address but
the stride of one, so that the compiler can load 16 bytes at a time. Triton's float32 ``exp`` is one instruction that
loses ``|x|`` ulp; libdevice is not there on every target and not in the interpreter. So the functions are built here
of ``exp2`` of small arguments, ``log`` and arithmetic, and hold for float32 and float64.
"""

import triton
import triton.language as tl

from glow_kernels.backends.triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """``n``, which VECTOR divides, in a form that shows it."""
    return n // VECTOR * VECTOR


@triton.jit
def wide(n):
    """``n`` as an int64, also if it is a number that the compiler knows."""
    return tl.zeros((), tl.int64) + n


@triton.jit
def tile_of_program(
    C, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr
):
    """Sample, positions, first channel, mask and channels of this program, of one that covers one tile of a sample."""
    if CHANNELS_LAST:
        C = multiple(C, VECTOR)
    else:
        P = multiple(P, VECTOR)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles = tiles_c * tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    tile = program % tiles
    positions = tile // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    first_channel = tile % tiles_c * BLOCK_C
    return program // tiles, positions, first_channel, P, C


@triton.jit
def offsets(sample, positions, channels, strides, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a tile in (B, C, P)."""
    if CHANNELS_LAST:
        stride_c = strides[1]
        stride_p = multiple(strides[2], VECTOR)
    else:
        stride_c = multiple(strides[1], VECTOR)
        stride_p = strides[2]
    start = sample.to(tl.int64) * multiple(strides[0], VECTOR)
    return start + positions.to(tl.int64)[:, None] * stride_p + channels.to(tl.int64)[None, :] * stride_c


@triton.jit
def store(pointers, values, mask):
    """Store ``values``, rounded to the nearest value of the type that the pointers point to."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if _INTERPRETED and dtype == tl.bfloat16 and values.dtype != tl.bfloat16:
        # The interpreter cuts off what bfloat16 cannot hold.
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
    # Comparisons that NaN fails keep x, so that it comes through.
    bounded = tl.where(x < -105.0, -105.0, tl.where(x > 89.0, 89.0, x))
    n = tl.floor(bounded * 1.44269504088896341 + 0.5)
    # n ln 2 in two parts, the first of which is exact.
    r = (bounded - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    # Two factors, since 2^n itself may be subnormal or out of range.
    half = tl.floor(n * 0.5)
    return tl.exp2(r * 1.44269504088896341) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def log1p_of_fraction(x):
    """``log(1 + x)`` for 0 <= x <= 1: what the sum rounds away is added again."""
    w = 1.0 + x
    return tl.log(w) + (x - (w - 1.0)) / w


@triton.jit
def tanh(v):
    """``tanh(v)`` and its derivative, from ``e = exp(-2 |v|)`` and ``e - 1`` without cancellation (W. Kahan)."""
    y = -2.0 * tl.abs(v)
    y = tl.where(y < -40.0, -40.0, y)
    e = exp(y)
    # (e - 1) / log(e) is smooth at e = 1, so the rounding of e does not matter.
    e_is_one = e == 1.0
    expm1 = tl.where(e_is_one, y, (e - 1.0) * y / tl.log(tl.where(e_is_one, 2.0, e)))
    magnitude = -expm1 / (2.0 + expm1)
    return tl.where(v < 0.0, -magnitude, magnitude), 4.0 * e / ((1.0 + e) * (1.0 + e))


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
    h_ptr,
    h_strides,
    sample,
    positions,
    first_channel,
    P,
    C,
    accumulate: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_ORDER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The two values of ``h`` (B, 2 C, P) of every element of a tile; IN_ORDER as they lie, else reversed."""
    if INTERLEAVED and CHANNELS_LAST:
        channels = 2 * first_channel + tl.arange(0, 2 * BLOCK_C)
        at = offsets(sample, positions, channels, h_strides, CHANNELS_LAST, VECTOR)
        both = tl.load(h_ptr + at, (positions < P)[:, None] & (channels < 2 * C)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(both, (BLOCK_P, BLOCK_C, 2)))
    else:
        channels = first_channel + tl.arange(0, BLOCK_C)
        mask = (positions < P)[:, None] & (channels < C)[None, :]
        if INTERLEAVED:
            first_channels = 2 * channels
            second_channels = first_channels + 1
        else:
            first_channels = channels
            second_channels = channels + C
        first_at = offsets(sample, positions, first_channels, h_strides, CHANNELS_LAST, VECTOR)
        second_at = offsets(sample, positions, second_channels, h_strides, CHANNELS_LAST, VECTOR)
        first = tl.load(h_ptr + first_at, mask, other=0.0)
        second = tl.load(h_ptr + second_at, mask, other=0.0)
    if IN_ORDER:
        return first.to(accumulate), second.to(accumulate)
    else:
        return second.to(accumulate), first.to(accumulate)


@triton.jit
def store_pair(
    h_ptr,
    h_strides,
    first,
    second,
    sample,
    positions,
    first_channel,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_ORDER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The inverse of :func:`load_pair`."""
    if not IN_ORDER:
        first, second = second, first
    if INTERLEAVED and CHANNELS_LAST:
        channels = 2 * first_channel + tl.arange(0, 2 * BLOCK_C)
        at = offsets(sample, positions, channels, h_strides, CHANNELS_LAST, VECTOR)
        both = tl.reshape(tl.join(first, second), (BLOCK_P, 2 * BLOCK_C))
        store(h_ptr + at, both, (positions < P)[:, None] & (channels < 2 * C)[None, :])
    else:
        channels = first_channel + tl.arange(0, BLOCK_C)
        mask = (positions < P)[:, None] & (channels < C)[None, :]
        if INTERLEAVED:
            first_channels = 2 * channels
            second_channels = first_channels + 1
        else:
            first_channels = channels
            second_channels = channels + C
        first_at = offsets(sample, positions, first_channels, h_strides, CHANNELS_LAST, VECTOR)
        second_at = offsets(sample, positions, second_channels, h_strides, CHANNELS_LAST, VECTOR)
        store(h_ptr + first_at, first, mask)
        store(h_ptr + second_at, second, mask)


@triton.jit
def row_offsets(rows, P, strides, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of rows, which count the positions of all samples, in (B, C, P)."""
    stride_p = strides[2]
    if CHANNELS_LAST:
        stride_p = multiple(stride_p, VECTOR)
    else:
        P = multiple(P, VECTOR)
    samples = rows // P
    positions = rows - samples * P
    return samples.to(tl.int64) * multiple(strides[0], VECTOR) + positions.to(tl.int64) * stride_p


@triton.jit
def channel_offsets(channels, strides, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of channels in (B, C, P)."""
    if CHANNELS_LAST:
        return channels * wide(strides[1])
    else:
        return channels * wide(multiple(strides[1], VECTOR))
