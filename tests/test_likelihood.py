"""Dequantisation can be undone, and bits per dimension follow their definition.

Dequantised pixels stay in their own level for every possible noise. For a density that is constant within a level, the
bound on the discrete code length is tight, so it can be checked by computing the code length directly.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glow_kernels.models import Glow, bits_per_dim, dequantize, quantize

BINS = [2, 17, 32, 256]
INTEGERS = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]
# The smallest and the largest numbers of torch.rand in float32, and their neighbours.
EXTREME_NOISE = [0.0, 2**-24, 2**-23, 0.5, 1 - 2**-16, 1 - 2**-17, 1 - 2**-23, 1 - 2**-24]


def every_level(n_bins: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Every level once, in the shape (1, 1, 1, n_bins)."""
    return torch.arange(n_bins).to(dtype).view(1, 1, 1, -1)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("n_bins", BINS)
def test_dequantised_pixels_stay_in_their_level(n_bins, dtype):
    levels = every_level(n_bins, dtype).expand(64, 3, 8, -1)
    before = levels.clone()
    x = dequantize(levels, n_bins)
    assert torch.equal(levels, before)
    assert x.shape == levels.shape
    assert x.dtype == torch.float32
    assert x.min() >= -0.5
    assert x.max() < 0.5
    assert torch.equal(quantize(x, n_bins), levels.to(torch.uint8))
    # Uniform noise in units of a level: mean 1/2 and variance 1/12, within five standard deviations.
    noise = (x.double() + 0.5) * n_bins - levels.double()
    count = noise.numel()
    assert abs(noise.mean().item() - 1 / 2) < 5 / (12 * count) ** 0.5
    assert abs(noise.var().item() - 1 / 12) < 5 / (180 * count) ** 0.5


@pytest.mark.parametrize("noise", EXTREME_NOISE)
@pytest.mark.parametrize("n_bins", BINS)
def test_the_next_level_is_never_reached(monkeypatch, n_bins, noise):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, **_: tensor.fill_(noise))
    levels = every_level(n_bins)
    x = dequantize(levels, n_bins)
    assert x.min() >= -0.5
    assert x.max() < 0.5
    assert torch.equal(quantize(x, n_bins), levels.to(torch.uint8))
    # A level has the width of 2^15 or more ulps of x, and rounding costs a few ulps.
    assert (x - ((levels.double() + noise) / n_bins - 0.5)).abs().max() < 2**-21


def test_a_compiled_call_takes_another_number_of_images():
    """The number is symbolic from then on."""
    compiled = torch.compile(dequantize, fullgraph=True, backend="eager")
    for n in (2, 3):
        levels = torch.randint(0, 256, (n, 1, 2, 2), dtype=torch.uint8)
        assert torch.equal(quantize(compiled(levels, 256), 256), levels)


def test_noise_is_fresh_or_of_the_generator():
    levels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert not torch.equal(dequantize(levels, 256), dequantize(levels, 256))
    state = torch.get_rng_state()
    one, other = (dequantize(levels, 256, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_quantize_takes_every_float_and_clamps(dtype):
    x = torch.tensor([-torch.inf, -9.0, -0.5, 0.0, 0.25, 0.5, 9.0, torch.inf, torch.nan], dtype=dtype)
    levels = quantize(x, 256)
    assert levels.dtype == torch.uint8
    assert levels.tolist() == [0, 0, 0, 128, 192, 255, 255, 255, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_bins", BINS)
def test_bits_per_dim_is_the_definition(n_bins, dtype):
    log_prob = torch.randn(7, dtype=dtype) * 1000
    expected = [(-value + 48 * math.log(n_bins)) / (48 * math.log(2)) for value in log_prob.tolist()]
    actual = bits_per_dim(log_prob, 48, n_bins)
    assert actual.dtype == dtype
    # Three roundings of numbers that are no larger than the bits.
    scale = max(map(abs, expected)) + math.log2(n_bins)
    assert actual.tolist() == pytest.approx(expected, rel=0, abs=4 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("n_bins", BINS)
def test_a_uniform_density_needs_all_bits(n_bins):
    bits = bits_per_dim(torch.zeros(1, dtype=torch.float64), 3 * 8 * 8, n_bins)
    assert bits.item() == pytest.approx(math.log2(n_bins), rel=4 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("n_bins", BINS)
def test_bits_of_a_density_that_is_constant_within_levels_are_the_code_length(n_bins):
    # All values of an image have the same independent distribution over levels, so P(k) is a product.
    probabilities = torch.rand(n_bins, dtype=torch.float64).softmax(0)
    levels = torch.randint(0, n_bins, (5, 3, 4, 4))
    x = dequantize(levels, n_bins)
    density = probabilities[quantize(x, n_bins).long()] * n_bins
    bits = bits_per_dim(density.log().sum((1, 2, 3)), 48, n_bins)
    code_length = -probabilities[levels].log2().sum((1, 2, 3)) / 48
    torch.testing.assert_close(bits, code_length, rtol=0.0, atol=64 * torch.finfo(torch.float64).eps * 8)


def test_a_model_counts_every_value_of_an_image():
    model = Glow(3, (4, 8), steps=1, levels=1, hidden_channels=4, n_bins=32)
    levels = torch.randint(0, 32, (8, 3, 4, 8), dtype=torch.uint8)
    x = model.dequantize(levels, torch.Generator().manual_seed(0))
    assert torch.equal(x, dequantize(levels, 32, torch.Generator().manual_seed(0)))
    assert torch.equal(model.quantize(x), levels)
    assert model.dimensions == 96
    log_prob = model.log_prob(x).double()
    expected = (-log_prob + 96 * math.log(32)) / (96 * math.log(2))
    # Three roundings of bits of size log2(32) = 5 in float32.
    torch.testing.assert_close(model.bits_per_dim(x).double(), expected, rtol=0.0, atol=4 * 2**-23 * 5)


BAD_ARGUMENTS = {
    "levels must be a tensor, got list": (TypeError, lambda: dequantize([[1, 2]], 256)),
    "x must be a tensor, got int": (TypeError, lambda: quantize(3, 256)),
    "dimensions must be at least 1, got 0": (ValueError, lambda: bits_per_dim(torch.zeros(2), 0, 256)),
    "levels must be of an integer type, got float32": (TypeError, lambda: dequantize(torch.zeros(2), 256)),
    "levels must be of an integer type, got bool": (TypeError, lambda: dequantize(torch.zeros(2) > 0, 256)),
    "levels must be of an integer type, got complex64": (TypeError, lambda: dequantize(torch.zeros(2) * 1j, 256)),
    "x must be a floating-point tensor, got uint8": (
        TypeError,
        lambda: quantize(torch.zeros(2, dtype=torch.uint8), 256),
    ),
    "levels must be in 0 .. 31 with n_bins = 32, got 0 .. 255": (
        ValueError,
        lambda: Glow(1, 2, 1, 1, 1, n_bins=32).dequantize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)),
    ),
    "levels must be in 0 .. 255 with n_bins = 256, got -1 .. 3": (
        ValueError,
        lambda: dequantize(torch.tensor([-1, 3]), 256),
    ),
    "n_bins must be at least 2, got 1": (ValueError, lambda: dequantize(torch.zeros(2, dtype=torch.uint8), 1)),
    "n_bins must be at least 2, got 0": (ValueError, lambda: quantize(torch.zeros(2), 0)),
    "n_bins must be at least 2, got -2": (ValueError, lambda: bits_per_dim(torch.zeros(2), 4, -2)),
    "n_bins must be a whole number, got 2.5": (TypeError, lambda: dequantize(torch.zeros(2, dtype=torch.uint8), 2.5)),
    "n_bins must be at most 256 for 8-bit pictures, got 257": (ValueError, lambda: quantize(torch.zeros(2), 257)),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_errors_name_the_argument(message):
    error, call = BAD_ARGUMENTS[message]
    with pytest.raises(error, match=f"^{message}$"):
        call()
