"""Filters times a learned scale, on every backend that can run here.

Proven against the product written plainly in float64, values and gradients. The data of the properties are a weight
(O, I, *kernel); bias and scale are as many as its filters.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    LAYOUTS,
    PROPERTY,
    Case,
    DifferentiableProperties,
    any_shape,
    check_gradients,
    check_results,
    combinations,
    in_layout,
)
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops import scale_filters


def plain(weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """As a convolution's output would be scaled."""
    scale = torch.exp(factor * log_scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bias * scale


def inputs(shape) -> tuple[Tensor, ...]:
    draw = functools.partial(torch.randn, dtype=torch.float64)
    return draw(tuple(shape)), draw(shape[0]), 0.5 * draw(shape[0])


def case(factor: float) -> Case:
    """One factor."""
    operator, formula = (functools.partial(function, factor=factor) for function in (scale_filters, plain))
    return Case(f"factor_{factor:g}", operator, formula, inputs, types=(0, 0))


CASES = [case(1.0), case(3.0)]


def forward_arguments(shape, lay):
    """Arguments of the registered operator."""
    vectors = [torch.randn(shape[0]).requires_grad_() for _ in range(2)]
    return lay(torch.randn(tuple(shape))).requires_grad_(), *vectors, 3.0, torch.float32


def backward_arguments(shape, lay):
    """Arguments of its backward, which has no derivative itself."""
    weight = lay(torch.randn(tuple(shape)))
    bias, log_scale, grad_bias = (torch.randn(shape[0]).to(compute_dtype(weight)) for _ in range(3))
    return torch.randn(tuple(shape)), grad_bias, weight, bias, log_scale, 3.0


def dense(arguments):
    """The native kernels take dense filters in float32 and float64, which ``support.py`` sees to."""

    def of_shape(shape, lay):
        found = arguments(shape, lay)
        format_ = output_format(next(arg for arg in reversed(found) if isinstance(arg, Tensor) and arg.dim() > 1))
        return tuple(
            arg.detach().float().contiguous(memory_format=format_ if arg.dim() > 1 else torch.contiguous_format)
            if isinstance(arg, Tensor)
            else arg
            for arg in found
        )

    return of_shape


class TestProperties(DifferentiableProperties):
    """What holds for every differentiable operator."""

    module = "scale_filters"
    arguments: ClassVar = {
        "forward": forward_arguments,
        "backward": backward_arguments,
        "forward_native": dense(forward_arguments),
        "backward_native": dense(backward_arguments),
    }
    cases = CASES


@pytest.mark.parametrize("shape", [(24, 512, 3, 3), (512, 6, 3, 3), (40, 512, 1, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_filters_of_coupling_networks(backend, shape, channels_last):
    weight, *vectors = CASES[1].draw(shape)
    weight = weight.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    check_results(CASES[1], [weight, *vectors])
    check_gradients(CASES[1], [weight, *vectors])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_are_rounded_once_to_the_type_of_the_network(backend, dtype):
    masters = [tensor.requires_grad_() for tensor in CASES[1].draw((8, 4, 3, 3))]
    scaled = scale_filters(*masters, 3.0, dtype)
    expected = plain(*masters, 3.0)
    grads = [torch.randn(result.shape).to(dtype) for result in scaled]
    for one, other in zip(scaled, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=torch.finfo(dtype).eps, atol=1e-7)
    actual = torch.autograd.grad(scaled, masters, grads)
    for one, other in zip(
        actual, torch.autograd.grad(expected, masters, [grad.float() for grad in grads]), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "of_grad"), combinations(list(LAYOUTS), list(LAYOUTS)))
def test_gradients_of_every_memory_layout(backend, layout, of_grad):
    weight, *vectors = CASES[1].draw((3, 4, 2, 5))
    leaves = [tensor.detach().requires_grad_() for tensor in (*in_layout([weight], layout), *vectors)]
    grads = [LAYOUTS[of_grad](torch.randn(3, 4, 2, 5)), torch.randn(3)]
    actual = torch.autograd.grad(scale_filters(*leaves, 3.0), leaves, grads)
    expected = torch.autograd.grad(plain(*leaves, 3.0), leaves, grads)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_any_shape_layout_and_type(backend, data, shape):
    dtypes = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    layout = data.draw(st.sampled_from(sorted(LAYOUTS))) if len(shape) > 2 else "contiguous"
    drawn = in_layout(CASES[0].draw(shape, dtypes), layout)
    check_results(CASES[0], drawn)
    check_gradients(CASES[0], drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.zeros(2)), "weight must be a floating-point"),
        ((torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)), r"bias must be \(O,\) with O = weight.shape\[0\]"),
        ((torch.zeros(2, 3), torch.zeros(2), torch.zeros(())), r"log_scale must be \(O,\) with O = weight.shape\[0\]"),
        ((torch.zeros(2, 3), torch.zeros(2), None), "log_scale must be a tensor, got NoneType"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scale_filters(*arguments)
