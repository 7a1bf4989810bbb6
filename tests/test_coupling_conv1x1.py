"""The coupling of a step with the linear map of the next, on every backend that can run here.

Proven against plain formulas in float64 and against the two operators in sequence: values, log-determinants and
gradients for every kind of ScaleMap, layout and order, and for every number of channels and of transformed channels;
and that a forward saves only its arguments for the backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    EMPTY_SHAPES,
    INTERPRETED,
    LARGE_DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    PROPERTY,
    SHAPES,
    Case,
    DifferentiableProperties,
    any_shape,
    assert_accurate,
    check_gradients,
    check_results,
    combinations,
    evaluate,
    gradients,
    in_layout,
    random_upstream,
    upstream_in_layout,
)
from test_actnorm_conv1x1 import CHANNELS, random_weight
from test_affine_coupling import MAPS, plain_forward
from torch import Tensor

import glow_kernels as gk
from glow_kernels import ScaleMap
from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops.affine_coupling import KINDS, ORDERS
from glow_kernels.ops.affine_coupling import LAYOUTS as CHANNEL_LAYOUTS
from glow_kernels.ops.coupling_conv1x1 import forward

# How many of C channels the coupling transforms.
SHARES: dict[str, Callable[[int], int]] = {
    "half": lambda channels: channels // 2,
    "one": lambda channels: 1,
    "all_but_one": lambda channels: channels - 1,
}


def at_least_two_channels(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` with at least two channels: one conditions and one is transformed."""
    return (shape[0], max(2, shape[1]), *shape[2:])


def plain(scale_map, layout, order, z, h, matrix, shift):
    """The coupling, the concatenation and the linear map in sequence."""
    untouched = z.shape[1] - h.shape[1] // 2
    y, log_det = plain_forward(scale_map, layout, order, z[:, untouched:], h)
    x = torch.cat((z[:, :untouched], y), dim=1)
    return torch.einsum("ij,bj...->bi...", matrix, x) + shift.reshape(-1, *[1] * (z.dim() - 2)), log_det


def make_case(
    scale_map: ScaleMap = MAPS["glow"],
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
    share: str = "half",
) -> Case:
    """The operator with these options."""

    def operator(z, h, matrix, shift):
        dtype = compute_dtype(z)
        return forward(z, h, matrix.to(dtype), shift.to(dtype), scale_map.kind, scale_map.parameters, layout, order)

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        batch, channels, *spatial = shape
        z = torch.randn(tuple(shape), dtype=torch.float64)
        h = torch.randn(batch, 2 * SHARES[share](channels), *spatial, dtype=torch.float64)
        return z, h, random_weight(channels), torch.randn(channels, dtype=torch.float64)

    formula = functools.partial(plain, scale_map, layout, order)
    return Case(f"{scale_map.kind}_{share}", operator, formula, inputs, batched=2)


def opcheck_arguments(shape, lay):
    """Arguments of the registered forward."""
    z, h, matrix, shift = make_case().inputs(at_least_two_channels(shape))
    z, h = (lay(tensor.float()).requires_grad_() for tensor in (z, h))
    matrix, shift = (tensor.to(compute_dtype(z)).requires_grad_() for tensor in (matrix, shift))
    options = ("clip", [0.7, -0.3, 1.5, 0.1, -math.inf, 0.9], "interleaved_scale_shift", "scale_shift")
    return z, h, matrix, shift, *options


def backward_arguments(shape, lay):
    """Arguments of the registered backward, which has no derivative itself."""
    z, h, matrix, _, *options = opcheck_arguments(shape, lay)
    grad, grad_log_det = lay(torch.randn(z.shape).to(z.dtype)), torch.randn(len(z)).to(matrix.dtype)
    return grad, grad_log_det, z.detach(), h.detach(), matrix.detach(), *options


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator, for a selection of the options."""

    module = "coupling_conv1x1"
    arguments: ClassVar = {"forward": opcheck_arguments, "backward": backward_arguments}
    cases: ClassVar = [
        make_case(),
        make_case(MAPS["tanh_with_everything"], "chunk_scale_shift", "scale_shift", "all_but_one"),
        make_case(MAPS["softsign"], "chunk_shift_scale", "unshift_scale", "one"),
    ]
    shapes: ClassVar = [at_least_two_channels(shape) for shape in SHAPES + EMPTY_SHAPES]


@pytest.mark.parametrize("name", MAPS)
def test_every_map_in_every_layout_and_order(backend, name):
    options = (CHANNEL_LAYOUTS, ORDERS, list(DTYPES.values()), list(SHARES))
    for layout, order, dtypes, share in combinations(*options, few=backend == "triton"):
        case = make_case(MAPS[name], layout, order, share)
        inputs = case.draw((3, 5, 5, 2), dtypes)
        check_results(case, inputs)
        check_gradients(case, inputs)


@pytest.mark.parametrize("channels", [*[size for size in CHANNELS if size > 1], 96])
def test_every_number_of_channels(backend, channels):
    # Positions that do not fill a vector, and those that do.
    for shape, share, layout, dtypes in (
        ((2, channels, 3, 5), "half", "channels_last", "float32"),
        ((2, channels, 4, 8), "one", "contiguous", "float32_with_bfloat16"),
        ((3, channels, 8), "all_but_one", "contiguous", "float32"),
    ):
        case = make_case(share=share)
        inputs = in_layout(case.draw(shape, DTYPES[dtypes]), layout, layout)
        check_results(case, inputs)
        upstream = [upstream_in_layout(grad, layout) for grad in random_upstream(case.operator, inputs)]
        check_gradients(case, inputs, upstream)


# h as a channels-last network makes it, perhaps a view of a convolution's output with padded channels: read in vectors
# of 16 bytes, in shorter ones and in single elements.
@pytest.mark.parametrize("channels", [6, 9, 12, 24, 48])
def test_channels_last_h_of_contiguous_data(backend, channels):
    for layout, dtypes, share in (
        ("interleaved_shift_scale", "float32_with_bfloat16", "half"),
        ("chunk_scale_shift", "float32_with_bfloat16", "half"),
        ("interleaved_scale_shift", "float32", "one"),
    ):
        case = make_case(layout=layout, share=share)
        z, h, *parameters = case.draw((3, channels, 4, 4), DTYPES[dtypes])
        padded = torch.full((3, -(-h.shape[1] // 16) * 16, 4, 4), torch.nan, dtype=h.dtype)
        padded[:, : h.shape[1]] = h
        h = padded.to(memory_format=torch.channels_last)[:, : h.shape[1]]
        check_results(case, [z, h, *parameters])
        check_gradients(case, [z, h, *parameters])


# In the interpreter: a few tiles per sample, and more tiles than programs.
@pytest.mark.parametrize("size", [(2, 8, 16, 12), (3, 5, 13, 11)] if INTERPRETED else LARGE_SHAPES, ids=str)
def test_large_samples(backend, size):
    cases = (
        make_case(),
        make_case(MAPS["tanh_with_everything"], "chunk_scale_shift", "scale_shift", "one"),
        make_case(MAPS["softsign"], "interleaved_scale_shift", "unshift_scale", "all_but_one"),
    )
    options = (cases, ("contiguous", "channels_last"), LARGE_DTYPES)
    for case, layout, dtypes in combinations(*options, few=backend == "triton"):
        inputs = in_layout(case.draw(size, DTYPES[dtypes]), layout, layout)
        check_results(case, inputs)
        check_gradients(case, inputs)


@pytest.mark.parametrize("size", [(64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4)], ids=str)
@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
def test_the_levels_of_a_glow(backend, size):
    case = make_case()
    for layout in ("contiguous", "channels_last"):
        inputs = in_layout(case.draw(size, DTYPES["float32_with_bfloat16"]), layout, layout)
        check_results(case, inputs)
        check_gradients(case, inputs)


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_anything_is_as_accurate_as_eager(backend, data, shape):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    scale_map = ScaleMap(
        choose(*KINDS),
        slope=choose(1.0, 0.7, -1.3),
        offset=choose(0.0, 2.0, -0.4),
        gain=choose(1.0, 0.3, 1.7),
        floor=choose(0.0, 1e-3, 0.4),
        low=choose(-math.inf, -0.61),
        high=choose(math.inf, 0.93),
    )
    case = make_case(scale_map, choose(*CHANNEL_LAYOUTS), choose(*ORDERS), choose(*SHARES))
    inputs = in_layout(
        case.draw(at_least_two_channels(shape), choose(*DTYPES.values())), choose(*LAYOUTS), choose(*LAYOUTS)
    )
    check_results(case, inputs)
    check_gradients(case, inputs)


def test_parameters_may_have_any_strides(backend):
    case = make_case()
    z, h, matrix, shift = case.draw((3, 6, 5, 2))
    room = torch.full((7, 13), torch.nan)
    room[1:, 1::2] = matrix
    for inputs in ([z, h, matrix.T.contiguous().T, shift[:1].expand(6)], [z, h, room[1:, 1::2], room[1:, 1]]):
        check_results(case, inputs)
        check_gradients(case, inputs)


@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_is_the_two_operators_one_after_the_other(backend, layout, order):
    case = make_case(MAPS["tanh"], layout, order)

    def composed(z, h, matrix, shift):
        untouched = z.shape[1] - h.shape[1] // 2
        with gk.use_backend("reference"):
            y, log_det = gk.affine_coupling(z[:, untouched:], h, "tanh", layout, order)
            bias = torch.linalg.solve(matrix, shift)
            x = torch.cat((z[:, :untouched], y), dim=1)
            return gk.actnorm_conv1x1(x, torch.zeros_like(bias), bias, matrix)[0], log_det

    inputs = case.draw((3, 7, 4, 5), DTYPES["float64"])
    upstream = random_upstream(case.operator, inputs)
    actual = [*evaluate(case.operator, inputs), *gradients(case.operator, inputs, upstream)]
    expected = [*evaluate(composed, inputs), *gradients(composed, inputs, upstream)]
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_accurate(one, other, other, f"result or gradient {index}")


def test_keeps_its_arguments_for_the_backward_and_nothing_else(backend):
    dtype = torch.float32
    z, h, matrix, shift = (tensor.to(dtype).requires_grad_() for tensor in make_case().inputs((2, 4, 3, 5)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        forward(z, h, matrix, shift, "sigmoid", MAPS["glow"].parameters, "interleaved_shift_scale", "shift_scale")
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (z, h, matrix)]
