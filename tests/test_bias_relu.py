"""Bias and ReLU in one pass, on every backend that can run here.

Proven against ``torch.relu(x + bias)`` in float64, values and gradients.
"""

from __future__ import annotations

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
    check_gradients,
    check_results,
    combinations,
    in_layout,
)
from torch import Tensor

from glow_kernels.ops import bias_relu
from glow_kernels.ops.bias_relu import backward, bias_backward, pad


def plain(x: Tensor, bias: Tensor) -> Tensor:
    """Bias and ReLU in two passes."""
    return torch.relu(x + bias.view(-1, *(1,) * (x.dim() - 2)))


def inputs(shape) -> tuple[Tensor, Tensor]:
    # Sums of multiples of 1/8 are exact in every dtype: they never have the wrong sign, and are 0 where the truth is 0.
    x = torch.randint(-32, 33, tuple(shape), dtype=torch.float64) / 8
    return x, torch.randint(-8, 9, (shape[1],), dtype=torch.float64) / 8


CASE = Case("bias_relu", bias_relu, plain, inputs, types=(0,))


def forward_arguments(shape, lay):
    """Arguments of the registered operator."""
    return lay(torch.randn(tuple(shape))).requires_grad_(), torch.randn(shape[1]).requires_grad_()


def backward_arguments(shape, lay):
    """Arguments of the registered backward, which has no derivative itself."""
    y = lay(torch.randn(tuple(shape))).relu()
    return torch.randn(tuple(shape), dtype=y.dtype), y, 3


def pad_arguments(shape, lay):
    """Arguments of the padding, which takes four dimensions."""
    x = lay(torch.randn(tuple(shape)))
    x = x.flatten(3) if x.dim() > 4 else x.view(*x.shape, *(1,) * (4 - x.dim()))
    return x, x.shape[1] + 3, x.dtype, True, 2


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator."""

    module = "bias_relu"
    arguments: ClassVar = {
        "forward": forward_arguments,
        "backward": backward_arguments,
        "bias_backward": lambda shape, lay: (lay(torch.randn(tuple(shape))), 3),
        "pad": pad_arguments,
    }
    cases: ClassVar = [CASE]


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", LARGE_DTYPES)
def test_several_tiles(backend, dtypes, shape):
    check_results(CASE, CASE.draw(shape, DTYPES[dtypes]))
    check_gradients(CASE, CASE.draw(shape, DTYPES[dtypes]))


@pytest.mark.parametrize(("layout", "of_grad"), combinations(list(LAYOUTS), list(LAYOUTS)))
def test_gradients_of_every_memory_layout(backend, layout, of_grad):
    x, bias = CASE.draw((3, 4, 2, 5))
    (x,) = in_layout([x], layout)
    leaves = [x.detach().requires_grad_(), bias.requires_grad_()]
    grad = LAYOUTS[of_grad](torch.randn(3, 4, 2, 5))
    actual = torch.autograd.grad(bias_relu(*leaves), leaves, grad)
    expected = torch.autograd.grad(plain(*leaves), leaves, grad)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_bias_is_summed_in_float32(backend, dtype):
    x = torch.ones(64, 3, 16, 16, dtype=dtype)
    bias = torch.zeros(3, dtype=torch.float32, requires_grad=True)
    (grad,) = torch.autograd.grad(bias_relu(x, bias).sum(dtype=torch.float32), bias)
    assert torch.equal(grad, torch.full((3,), 64.0 * 16 * 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [*(((2, 33, 9, 7), layout) for layout in LAYOUTS), ((5, 3), "contiguous"), ((0, 4, 2, 2), "contiguous")],
    ids=str,
)
def test_gradient_of_a_bias_without_relu(backend, shape, layout, dtype):
    # Multiples of 1/8, whose sums are exact in float32.
    grad = LAYOUTS[layout](torch.randint(-32, 33, shape).to(dtype) / 8)
    expected = grad.double().sum([d for d in range(grad.dim()) if d != 1])
    for parts in (1, 2, 7 if grad[:, 0].numel() > 7 else 50):
        sums = bias_backward(grad, parts)
        assert sums.shape == (parts, shape[1])
        assert torch.equal(sums.double().sum(0), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 33, 9, 7), "contiguous"), ((2, 16, 9, 7), "channels_last"), ((0, 4, 2, 2), "offset")]
)
def test_gradient_of_the_bias_in_parts(backend, shape, layout, dtype):
    grad, y = (LAYOUTS[layout](torch.randint(-32, 33, shape).to(dtype) / 8) for _ in range(2))
    whole, (expected,) = backward(grad, y, 1)
    for parts in (2, 7):
        grad_x, sums = backward(grad, y, parts)
        assert sums.shape == (parts, shape[1])
        assert torch.equal(grad_x, whole)
        assert torch.equal(sums.sum(0), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("layout", "dtypes", "channels_last"),
    combinations(list(LAYOUTS), [t for t in DTYPES if t != "bfloat16_with_float32"], [True, False]),
)
@pytest.mark.parametrize(("shape", "channels"), [((2, 6, 9, 7), 16), ((3, 12, 8, 4), 24), ((2, 5, 1, 1), 5)], ids=str)
def test_padding_converts_and_sums(backend, shape, channels, layout, dtypes, channels_last):
    dtype, result = DTYPES[dtypes]
    x = LAYOUTS[layout](torch.randint(-32, 33, shape).to(dtype) / 8)
    for parts in (0, 1, 7):
        padded, sums = pad(x, channels, result, channels_last, parts)
        format_ = torch.channels_last if channels_last else torch.contiguous_format
        assert padded.is_contiguous(memory_format=format_)
        assert (padded.dtype, padded.shape) == (result, (shape[0], channels, *shape[2:]))
        assert torch.equal(padded[:, : shape[1]], x.to(result))
        assert padded[:, shape[1] :].count_nonzero() == 0
        assert sums.shape == (parts, shape[1])
        assert not parts or torch.equal(sums.double().sum(0), x.double().sum((0, 2, 3)))


def test_nan_comes_through_and_nothing_passes_at_zero(backend):
    x = torch.tensor([[torch.nan, 0.0, -1.0, torch.inf]]).T.requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    y = bias_relu(x, bias)
    assert torch.equal(y.detach().nan_to_num(7.0, posinf=8.0), torch.tensor([[7.0, 0.0, 0.0, 8.0]]).T)
    assert torch.autograd.grad(y.sum(), x)[0].flatten()[1:].tolist() == [0.0, 0.0, 1.0]


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_any_shape_layout_and_type(backend, data, shape):
    dtypes = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    layout = data.draw(st.sampled_from(sorted(LAYOUTS))) if len(shape) > 2 else "contiguous"
    drawn = in_layout(CASE.draw(shape, dtypes), layout)
    check_results(CASE, drawn)
    check_gradients(CASE, drawn)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), r"x must be a floating-point tensor, got int64"),
        (torch.zeros(2, 3, 4), torch.zeros(4), r"bias must be \(C,\) with C = x.shape\[1\] = \(3,\), got \(4,\)"),
        (torch.zeros(2, 3), [0.0] * 3, r"bias must be a tensor, got list"),
        (torch.zeros(3), torch.zeros(3), r"x must be \(B, C, \*spatial\)"),
    ],
)
def test_bad_arguments(x, bias, message):
    with pytest.raises((TypeError, ValueError), match=message):
        bias_relu(x, bias)
