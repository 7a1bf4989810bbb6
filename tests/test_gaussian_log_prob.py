"""The learned diagonal Gaussian, on every backend that can run here.

Proven against ``torch.distributions.Normal`` in float64: the log-density, sampling and its inverse, and their
gradients, in both layouts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    LARGE_DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    PROPERTY,
    Case,
    DifferentiableProperties,
    any_shape,
    assert_accurate,
    check_gradients,
    check_results,
    combinations,
    in_layout,
)
from torch import Tensor
from torch.distributions import Normal

import glow_kernels as gk
from glow_kernels.backends.numerics import compute_dtype

CHANNEL_LAYOUTS = ("chunk_mean_log_sd", "interleaved_mean_log_sd")


def plain_split(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation."""
    half = h.shape[1] // 2
    return (h[:, 0::2], h[:, 1::2]) if layout == "interleaved_mean_log_sd" else (h[:, :half], h[:, half:])


def plain_log_prob(layout, z, h):
    """The log-density of a sample."""
    mean, log_sd = plain_split(h, layout)
    return Normal(mean, log_sd.exp(), validate_args=False).log_prob(z).flatten(1).sum(1)


def plain_sample(layout, eps, h):
    """eps -> z."""
    mean, log_sd = plain_split(h, layout)
    return mean + log_sd.exp() * eps


def plain_standardize(layout, z, h):
    """z -> eps."""
    mean, log_sd = plain_split(h, layout)
    return (z - mean) / log_sd.exp()


def like_h(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of mean and log standard deviation together."""
    return (shape[0], 2 * shape[1], *shape[2:])


def gaussian_case(function: str, layout: str) -> Case:
    """One of the three functions with one layout."""

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.randn(tuple(shape), dtype=torch.float64), torch.randn(like_h(shape), dtype=torch.float64)

    def of(operator, formula):
        return functools.partial(operator, layout=layout), functools.partial(formula, layout)

    sample, standardize = of(gk.gaussian_sample, plain_sample), of(gk.gaussian_standardize, plain_standardize)
    here, back = {
        "log_prob": (of(gk.gaussian_log_prob, plain_log_prob), None),
        "sample": (sample, standardize),
        "standardize": (standardize, sample),
    }[function]
    return Case(f"{function}_{layout}", *here, inputs, batched=2, undo=back)


ALL_CASES = [
    gaussian_case(function, layout) for function in ("log_prob", "sample", "standardize") for layout in CHANNEL_LAYOUTS
]


def opcheck_arguments(shape, lay):
    """Arguments of the registered operators."""
    z, h = lay(torch.randn(tuple(shape))).requires_grad_(), lay(torch.randn(like_h(shape))).requires_grad_()
    return z, h, "interleaved_mean_log_sd"


def backward_arguments(shape, lay, per_sample=False):
    """Arguments of the registered backwards, which have no derivative themselves."""
    z, h, layout = opcheck_arguments(shape, lay)
    grad = torch.randn(shape[0]).to(compute_dtype(z)) if per_sample else torch.randn(tuple(shape)).to(z.dtype)
    return grad, z.detach(), h.detach(), layout


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator."""

    module = "gaussian_log_prob"
    arguments: ClassVar = {
        **dict.fromkeys(("forward", "sample", "standardize"), opcheck_arguments),
        "backward": functools.partial(backward_arguments, per_sample=True),
        **dict.fromkeys(("sample_backward", "standardize_backward"), backward_arguments),
    }
    cases = ALL_CASES


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_anything_is_as_accurate_as_eager(backend, data, shape):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    case = choose(*ALL_CASES)
    inputs = in_layout(case.draw(shape, choose(*DTYPES.values())), choose(*LAYOUTS), choose(*LAYOUTS))
    check_results(case, inputs)
    check_gradients(case, inputs)


# Pairs of neighbours, from one position to the next of which it is further than a pair.
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_one_channel_with_h_among_others(backend, case):
    z, h = case.draw((3, 1, 2, 4))
    others = torch.full((3, 16, 2, 4), torch.nan).to(memory_format=torch.channels_last)
    inputs = [z, others[:, :2].copy_(h)]
    check_results(case, inputs)
    check_gradients(case, inputs)


@pytest.mark.parametrize("size", LARGE_SHAPES, ids=str)
def test_large_samples(backend, size):
    options = (ALL_CASES, ("contiguous", "channels_last"), LARGE_DTYPES)
    for case, layout, dtypes in combinations(*options, few=backend == "triton"):
        inputs = in_layout(case.draw(size, DTYPES[dtypes]), layout, layout)
        check_results(case, inputs)
        check_gradients(case, inputs)


def test_a_standard_normal_at_its_mean(backend):
    log_prob = gk.gaussian_log_prob(torch.zeros(2, 3, 5), torch.zeros(2, 6, 5))
    torch.testing.assert_close(log_prob, torch.full((2,), -15 * 0.5 * math.log(2 * math.pi)))


@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
def test_log_prob_changes_variables_to_a_standard_normal(backend, layout):
    z, h = torch.randn(3, 4, 5, 2, dtype=torch.float64), torch.randn(3, 8, 5, 2, dtype=torch.float64)
    eps, log_sd = gk.gaussian_standardize(z, h, layout), plain_split(h, layout)[1]
    expected = Normal(0.0, 1.0).log_prob(eps).sum((1, 2, 3)) - log_sd.sum((1, 2, 3))
    assert_accurate(gk.gaussian_log_prob(z, h, layout), expected, expected, "log_prob")


@pytest.mark.parametrize("log_sd", [-60.0, -20.0, 20.0, 60.0])
@pytest.mark.parametrize("function", ["log_prob", "sample", "standardize"])
def test_narrow_and_wide_gaussians_keep_their_relative_accuracy(backend, function, log_sd):
    # exp(2 log_sd) would overflow float32 at 44. The data have the Gaussian's own scale, so nothing cancels.
    case = gaussian_case(function, "chunk_mean_log_sd")
    data = torch.randn(3, 4, 5) * (1.0 if function == "sample" else math.exp(log_sd))
    h = torch.cat((torch.zeros(3, 4, 5), torch.full((3, 4, 5), log_sd)), dim=1)
    check_results(case, [data, h], unit=0.0)
    check_gradients(case, [data, h], unit=0.0)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("function", ["log_prob", "sample", "standardize"])
def test_narrow_gaussians_far_from_zero_keep_their_accuracy(backend, function, dtypes):
    # z - mean has the error by which z was rounded: in bfloat16 that exceeds the standard deviation of exp(-5).
    of_h = gaussian_case(function, "chunk_mean_log_sd")

    def inputs(shape):
        mean, eps = 3.0 + torch.randn(tuple(shape), dtype=torch.float64), torch.randn(tuple(shape), dtype=torch.float64)
        data = eps if function == "sample" else mean + math.exp(-5.0) * eps
        return data, mean, torch.full_like(mean, -5.0)

    def of_both(of):
        return lambda data, mean, log_sd: of(data, torch.cat((mean, log_sd), dim=1))

    case = Case("narrow", of_both(of_h.operator), of_both(of_h.formula), inputs)
    drawn = case.draw((2, 3, 4, 5), dtypes)
    check_results(case, drawn, unit=0.0)
    check_gradients(case, drawn, unit=0.0)


def test_gradients_in_float32_parameters_are_float32_for_bfloat16_data(backend):
    case = gaussian_case("log_prob", "interleaved_mean_log_sd")
    check_gradients(case, case.draw((3, 4, 5, 7), (torch.bfloat16, torch.float32)), precision=torch.float32)


def test_the_default_layout_is_interleaved(backend):
    z, h = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    for function in (gk.gaussian_log_prob, gk.gaussian_sample, gk.gaussian_standardize):
        assert torch.equal(function(z, h), function(z, h, "interleaved_mean_log_sd"))


Z, H = torch.zeros(2, 3, 5), torch.zeros(2, 6, 5)
IMAGE = "must be (B, C, *spatial) with 0 to 3 spatial dimensions"

# Arguments, the type of the error and its message; NAME is the name of the data.
BAD_ARGUMENTS = {
    "data_no_tensor": ((1.0, H), TypeError, "NAME must be a tensor, got float"),
    "data_integer": ((Z.long(), H), TypeError, "NAME must be a floating-point tensor, got int64"),
    "data_bool": ((Z.bool(), H), TypeError, "NAME must be a floating-point tensor, got bool"),
    "data_complex": ((Z.cdouble(), H), TypeError, "NAME must be a floating-point tensor, got complex128"),
    "data_one_dimension": ((Z[0, 0], H), ValueError, f"NAME {IMAGE}, got shape (5,)"),
    "h_no_tensor": ((Z, [0.0]), TypeError, "h must be a tensor, got list"),
    "h_shape": ((Z, Z), ValueError, "h must be (B, 2 C, *spatial) for this NAME = (2, 6, 5), got (2, 3, 5)"),
    "h_bool": ((Z, H.bool()), TypeError, "h must be a floating-point tensor, got bool"),
    "h_device": ((Z, H.to("meta")), ValueError, f"h must be on the device of the data, {Z.device}, got meta"),
    "layout": (
        (Z, H, "interleaved"),
        ValueError,
        "layout must be one of 'chunk_mean_log_sd', 'interleaved_mean_log_sd', got 'interleaved'",
    ),
}


@pytest.mark.parametrize(
    ("function", "name"), [(gk.gaussian_log_prob, "z"), (gk.gaussian_sample, "eps"), (gk.gaussian_standardize, "z")]
)
@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(function, name, bad):
    arguments, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message.replace("NAME", name)
