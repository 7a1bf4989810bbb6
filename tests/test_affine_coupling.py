"""The affine and the additive coupling, on every backend that can run here.

Proven against plain formulas in float64: values, log-determinants and gradients of both directions for every kind of
ScaleMap with all its parameters, every layout and every order; the formulas of other libraries; saturated scales.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    INTERPRETED,
    LARGE_DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    PROPERTY,
    Case,
    DifferentiableProperties,
    ResultProperties,
    any_shape,
    assert_accurate,
    assert_same_bits,
    check_gradients,
    check_results,
    combinations,
    gradcheck,
    in_layout,
)
from torch import Tensor

import glow_kernels as gk
from glow_kernels import ScaleMap
from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops.affine_coupling import KINDS, ORDERS, in_place_backward, reversible_backward
from glow_kernels.ops.affine_coupling import LAYOUTS as CHANNEL_LAYOUTS

MAPS = {kind: ScaleMap(kind) for kind in KINDS}
MAPS["glow"] = ScaleMap("sigmoid", offset=2.0)
MAPS["sigmoid_with_gain"] = ScaleMap("sigmoid", slope=0.7, gain=1.5)
MAPS |= {f"{kind}_with_everything": ScaleMap(kind, 0.7, -0.3, 1.5, 0.1, low=-0.6, high=0.9) for kind in KINDS}


def plain_split(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Raw scale and shift."""
    half = h.shape[1] // 2
    return {
        "chunk_scale_shift": (h[:, :half], h[:, half:]),
        "chunk_shift_scale": (h[:, half:], h[:, :half]),
        "interleaved_scale_shift": (h[:, 0::2], h[:, 1::2]),
        "interleaved_shift_scale": (h[:, 1::2], h[:, 0::2]),
    }[layout]


def plain_scale(u: Tensor, scale_map: ScaleMap, learned_gain: Tensor | None) -> Tensor:
    """The scale s, not its logarithm."""
    v = scale_map.slope * u + scale_map.offset
    if scale_map.kind == "sigmoid":
        return scale_map.gain * torch.sigmoid(v) + scale_map.floor
    bounded = {
        "exp": lambda: v,
        "tanh": lambda: torch.tanh(v),
        "atan": lambda: torch.atan(v),
        "softsign": lambda: v / (1 + v.abs()),
        "clip": lambda: torch.clip(v, scale_map.low, scale_map.high),
    }[scale_map.kind]()
    log_scale = scale_map.gain * bounded
    if learned_gain is not None:
        log_scale = log_scale * learned_gain.reshape(-1, *[1] * (u.dim() - 2))
    return log_scale.exp() + scale_map.floor


def plain_forward(scale_map, layout, order, x, h, learned_gain=None):
    """The coupling x -> y, written with the scale itself."""
    u, t = plain_split(h, layout)
    s = plain_scale(u, scale_map, learned_gain)
    y = {"shift_scale": (x + t) * s, "scale_shift": x * s + t, "unshift_scale": (x - t) * s}[order]
    return y, s.log().flatten(1).sum(1)


def plain_inverse(scale_map, layout, order, y, h, learned_gain=None):
    """The coupling y -> x, written with the scale itself."""
    u, t = plain_split(h, layout)
    s = plain_scale(u, scale_map, learned_gain)
    x = {"shift_scale": y / s - t, "scale_shift": (y - t) / s, "unshift_scale": y / s + t}[order]
    return x, -s.log().flatten(1).sum(1)


def like_h(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the network's output."""
    return (shape[0], 2 * shape[1], *shape[2:])


def affine_case(
    direction: str, scale_map: ScaleMap, layout: str, order: str, learned_gain: bool = False, name: str = ""
) -> Case:
    """One direction of ``affine_coupling`` with these options."""

    def operator(function, data, h, gain=None):
        return function(data, h, scale_map, layout, order, gain)

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        gain = (0.5 + torch.rand(shape[1], dtype=torch.float64),) if learned_gain else ()
        return (
            torch.randn(tuple(shape), dtype=torch.float64),
            torch.randn(like_h(shape), dtype=torch.float64),
            *gain,
        )

    directions = [
        (functools.partial(operator, gk.affine_coupling), functools.partial(plain_forward, scale_map, layout, order)),
        (
            functools.partial(operator, gk.affine_coupling_inverse),
            functools.partial(plain_inverse, scale_map, layout, order),
        ),
    ]
    here, back = directions if direction == "forward" else reversed(directions)
    return Case(f"{direction}_{name or scale_map.kind}", *here, inputs, batched=2, undo=back)


def plain_reversible_backward(scale_map, layout, order, y, grad, h, grad_log_det, learned_gain=None):
    """The inverse, and autograd through the plain forward."""
    x, _ = plain_inverse(scale_map, layout, order, y, h, learned_gain)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, h, learned_gain) if tensor is not None]
    with torch.enable_grad():
        results = plain_forward(scale_map, layout, order, *leaves)
    return (x, *torch.autograd.grad(results, leaves, (grad, grad_log_det)))


def reversible_case(scale_map: ScaleMap, layout: str, order: str, learned_gain: bool = False) -> Case:
    """``affine_coupling_reversible_backward`` with these options."""

    def operator(y, grad, h, grad_log_det, gain=None):
        results = gk.ops.affine_coupling_reversible_backward(grad, grad_log_det, y, h, scale_map, layout, order, gain)
        return tuple(result for result in results if result is not None)

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        gain = (0.5 + torch.rand(shape[1], dtype=torch.float64),) if learned_gain else ()
        y, grad = torch.randn(2, *shape, dtype=torch.float64)
        h = torch.randn(like_h(shape), dtype=torch.float64)
        return y, grad, h, torch.randn(shape[0], dtype=torch.float64), *gain

    formula = functools.partial(plain_reversible_backward, scale_map, layout, order)
    types = (0, 0, 2, 4) if learned_gain else (0, 0, 2)
    return Case(f"reversible_{scale_map.kind}", operator, formula, inputs, batched=2, data_arguments=2, types=types)


def additive_cases() -> list[Case]:
    """Both directions of ``additive_coupling``."""

    def formula(sign, x, h):
        return x + sign * h, x.new_zeros(x.shape[0])

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.randn(tuple(shape), dtype=torch.float64), torch.randn(tuple(shape), dtype=torch.float64)

    there = (gk.additive_coupling, functools.partial(formula, 1))
    back = (gk.additive_coupling_inverse, functools.partial(formula, -1))
    return [
        Case("forward_additive", *there, inputs, batched=2, undo=back),
        Case("inverse_additive", *back, inputs, batched=2, undo=there),
    ]


def opcheck_arguments(shape, lay):
    """Arguments of the registered operators."""
    x, h = lay(torch.randn(shape)).requires_grad_(), lay(torch.randn(like_h(shape))).requires_grad_()
    gain = torch.rand(shape[1], dtype=compute_dtype(x)).requires_grad_()
    return x, h, gain, "clip", [0.7, -0.3, 1.5, 0.1, -math.inf, 0.9], "interleaved_scale_shift", "scale_shift"


def backward_arguments(shape, lay):
    """Arguments of the registered backwards, which have no derivative themselves."""
    y, h, gain, *options = opcheck_arguments(shape, lay)
    grad, grad_log_det = lay(torch.randn(shape).to(y.dtype)), torch.randn(shape[0]).to(compute_dtype(y))
    return grad, grad_log_det, y.detach(), h.detach(), gain.detach(), *options


def in_place_arguments(shape, lay):
    """Arguments of the backwards in place, without a gain; tensors that are overwritten have memory of their own."""
    grad, grad_log_det, y, h, _, *options = backward_arguments(shape, lambda x: lay(x).contiguous())
    return grad, grad_log_det, y, h, *options


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator, for a selection of the options."""

    module = "affine_coupling"
    arguments: ClassVar = {
        "forward": opcheck_arguments,
        "inverse": opcheck_arguments,
        "backward": backward_arguments,
        "inverse_backward": backward_arguments,
        "reversible_backward": backward_arguments,
        "in_place_backward": in_place_arguments,
    }
    cases = [
        affine_case(direction, *options)
        for direction in ("forward", "inverse")
        for options in [
            (MAPS["glow"], "interleaved_shift_scale", "shift_scale"),
            (MAPS["tanh_with_everything"], "chunk_scale_shift", "scale_shift", True),
            (MAPS["softsign"], "chunk_shift_scale", "unshift_scale"),
        ]
    ] + additive_cases()


class TestReversibleBackward(ResultProperties):
    """What holds for the results of every operator, for a selection of the options."""

    module = "affine_coupling"
    cases: ClassVar = [
        reversible_case(MAPS["glow"], "interleaved_shift_scale", "shift_scale"),
        reversible_case(MAPS["tanh_with_everything"], "chunk_scale_shift", "scale_shift", True),
        reversible_case(MAPS["softsign"], "chunk_shift_scale", "unshift_scale"),
    ]


@pytest.mark.parametrize("name", MAPS)
def test_reversible_backward_of_every_map_in_every_layout_and_order(backend, name):
    gains = (False,) if MAPS[name].kind == "sigmoid" else (False, True)
    options = (CHANNEL_LAYOUTS, ORDERS, gains, list(DTYPES.values()))
    for layout, order, learned_gain, dtypes in combinations(*options, few=backend == "triton"):
        case = reversible_case(MAPS[name], layout, order, learned_gain)
        check_results(case, case.draw((3, 4, 5, 2), dtypes))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_h", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtypes", ["float32", "float32_with_bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(3, 6, 4, 8), (2, 5, 3, 7), (2, 20, 16, 16)], ids=str)
def test_in_place_on_half_of_a_tensor_equals_out_of_place(backend, shape, dtypes, of_h, memory_format):
    """Also if a sigmoid is out of range; neither the other half of the tensor nor h changes."""
    batch, channels, *spatial = shape
    dtype, h_dtype = DTYPES[dtypes]
    y, grad = torch.randn(2, batch, 2 * channels, *spatial, dtype=dtype)
    y, grad = (tensor.to(memory_format=memory_format) for tensor in (y, grad))
    h = torch.randn(like_h(shape)).to(h_dtype).to(memory_format=of_h)
    h[0, 0, 0, 0] = h[0, 1, 0, 0] = -95.0
    options = ("sigmoid", MAPS["glow"].parameters, "interleaved_shift_scale", "shift_scale")
    lam = torch.randn(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = [tensor.clone() for tensor in (y, grad, h)]
    halves = [tensor[:, channels:] for tensor in (grad, y)]
    x, grad_x, of_scale, _ = reversible_backward(halves[0], lam, halves[1], h, None, *options)
    grad_h = in_place_backward(halves[0], lam, halves[1], h, *options)
    for one, other in ((y, before[0]), (grad, before[1])):
        assert torch.equal(one[:, :channels], other[:, :channels])
    assert torch.equal(h, before[2])
    for one, other in ((halves[1], x), (halves[0], grad_x), (grad_h, of_scale)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert grad_h.stride() == of_scale.stride()


@pytest.mark.parametrize("size", LARGE_SHAPES, ids=str)
def test_large_samples(backend, size):
    everything, glow = MAPS["tanh_with_everything"], MAPS["glow"]
    cases = (
        affine_case("forward", glow, "interleaved_shift_scale", "shift_scale"),
        affine_case("inverse", everything, "chunk_scale_shift", "scale_shift", learned_gain=True),
        reversible_case(everything, "interleaved_scale_shift", "unshift_scale", learned_gain=True),
    )
    options = (cases, ("contiguous", "channels_last"), LARGE_DTYPES)
    for case, layout, dtypes in combinations(*options, few=backend == "triton"):
        inputs = in_layout(case.draw(size, DTYPES[dtypes]), *[layout] * case.batched)
        check_results(case, inputs)
        if case.undo:
            check_gradients(case, inputs)


# h as of networks whose images lie channels last, with channels beside it, as of a convolution that was padded: read in
# vectors of 16 bytes, in shorter ones and in single elements.
@pytest.mark.parametrize(
    ("channels", "before", "of", "width"),
    [(3, 0, 16, 8), (6, 0, 16, 8), (12, 0, 32, 8), (20, 0, 48, 8), (6, 2, 16, 8), (6, 0, 13, 2)],
)
def test_channels_last_h_of_contiguous_data(backend, channels, before, of, width):
    for layout, order, dtypes, learned_gain in (
        ("interleaved_shift_scale", "shift_scale", "float32_with_bfloat16", False),
        ("chunk_scale_shift", "scale_shift", "float32_with_bfloat16", True),
        ("interleaved_scale_shift", "unshift_scale", "float32", False),
    ):
        scale_map = MAPS["tanh_with_everything" if learned_gain else "glow"]
        options = (scale_map, layout, order, learned_gain)
        for case in (affine_case("forward", *options), affine_case("inverse", *options), reversible_case(*options)):
            inputs = case.draw((3, channels, 10, width), DTYPES[dtypes])
            at = case.data_arguments
            padded = torch.full((3, of, 10, width), torch.nan, dtype=inputs[at].dtype)
            padded = padded.to(memory_format=torch.channels_last)
            inputs[at] = padded[:, before : before + 2 * channels].copy_(inputs[at])
            check_results(case, inputs)
            if case.undo is not None:
                check_gradients(case, inputs)


def test_h_of_a_network_over_the_last_dimension(backend):
    case = reversible_case(MAPS["glow"], "interleaved_shift_scale", "shift_scale")
    y, grad, h, grad_log_det = case.draw((3, 8, 12))
    check_results(case, [y, grad, h.mT.contiguous().mT, grad_log_det])


# More and fewer channels than a tile has, tiles that end within positions and within vectors, dense and padded h.
@pytest.mark.parametrize(
    "size",
    [(2, 1, 4096), (3, 1, 5), (5, 3, 49), (2, 6, 1156), (4, 24, 1), (3, 24, 49), (2, 40, 36), (1, 50, 13)],
    ids=str,
)
def test_channels_last_h_at_all_sizes(backend, size):
    cases = [
        of(MAPS["glow"], layout, "scale_shift", False)
        for layout in ("interleaved_shift_scale", "chunk_scale_shift", "chunk_shift_scale")
        for of in (
            functools.partial(affine_case, "forward"),
            functools.partial(affine_case, "inverse"),
            reversible_case,
        )
    ]
    options = (
        cases,
        ("float32_with_bfloat16", "float32", "bfloat16", "float64"),
        ("channels_last", "last_half_channels_last"),
    )
    for case, dtypes, layout in combinations(*options, few=backend == "triton"):
        inputs = case.draw((*size, 1), DTYPES[dtypes])
        at = case.data_arguments
        inputs[at] = LAYOUTS[layout](inputs[at])
        check_results(case, inputs)
        if case.undo is not None:
            check_gradients(case, inputs)


@pytest.mark.parametrize("positions", [4, 8, 16])
@pytest.mark.parametrize("offset", [2.0, -30.0])
def test_rows_of_one_vector(backend, positions, offset):
    # One vector of some instruction set and dtype. A product of several exp(30) overflows float32, one factor does not.
    scale_map = ScaleMap("sigmoid", offset=offset)
    cases = (
        affine_case("forward", scale_map, "interleaved_shift_scale", "shift_scale"),
        affine_case("inverse", scale_map, "chunk_scale_shift", "scale_shift"),
        reversible_case(scale_map, "interleaved_scale_shift", "unshift_scale"),
    )
    for case, dtypes in combinations(cases, ("float32", "float64", "float32_with_bfloat16"), few=backend == "triton"):
        inputs = case.draw((3, 7, positions // 2, 2), DTYPES[dtypes])
        check_results(case, inputs)
        if case.undo:
            check_gradients(case, inputs)


# More than the caches hold is written past them, where rows begin at whole vectors: rows of a tile, parts of one.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(2100, 16, 8, 8), (3, 8, 300, 300), (3, 8, 299, 301)], ids=str)
def test_native_data_beyond_the_caches_is_what_its_samples_are(size, layout):
    TestProperties().require_native()
    options = (MAPS["glow"], "chunk_scale_shift", "scale_shift")
    for case in (affine_case("forward", *options), reversible_case(*options)):
        inputs = in_layout(case.draw(size, DTYPES["float64"]), *[layout] * 3)

        def results(*parts, case=case):
            if case.undo is None:
                return case.operator(*parts)
            leaves = [part.clone().requires_grad_() for part in parts]
            y, log_det = case.operator(*leaves)
            return y.detach(), log_det.detach(), *torch.autograd.grad((y, log_det), leaves, (parts[0], log_det))

        with gk.use_backend("native"):
            halves = map(results, *(tensor.chunk(2) for tensor in inputs))
            for whole, *parts in zip(results(*inputs), *halves, strict=True):
                torch.testing.assert_close(whole, torch.cat(parts))


@pytest.mark.parametrize("learned_gain", [False, True])
def test_a_scale_that_overflows_is_more_than_any_floor(backend, learned_gain):
    scale_map = ScaleMap("exp", floor=0.1)
    case = affine_case("inverse", scale_map, "chunk_scale_shift", "scale_shift", learned_gain)
    inputs = case.draw((3, 4, 5, 2))
    inputs[1][:, ::3] *= 200.0
    check_results(case, inputs, unit=200.0)
    check_gradients(case, inputs, unit=200.0)


def all_options():
    """Every map in both directions, without and with a learned gain."""
    for (name, scale_map), learned_gain in itertools.product(MAPS.items(), (False, True)):
        if scale_map.kind == "sigmoid" and learned_gain:
            continue
        for direction in ("forward", "inverse"):
            label = f"{direction}_{name}" + "_learned_gain" * learned_gain
            yield pytest.param(direction, scale_map, learned_gain, id=label)


@pytest.mark.parametrize(("direction", "scale_map", "learned_gain"), list(all_options()))
def test_every_map_in_every_layout_and_order(backend, direction, scale_map, learned_gain):
    options = (CHANNEL_LAYOUTS, ORDERS, ("float32", "float64"))
    for layout, order, dtypes in combinations(*options, few=backend == "triton"):
        case = affine_case(direction, scale_map, layout, order, learned_gain)
        inputs = case.draw((3, 4, 5, 2), DTYPES[dtypes])
        check_results(case, inputs)
        check_gradients(case, inputs)


@pytest.mark.skipif(INTERPRETED, reason="the test above has gradients of every map in float64")
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", MAPS)
def test_gradcheck_of_every_map(backend, direction, name):
    learned_gain = MAPS[name].kind != "sigmoid"
    case = affine_case(direction, MAPS[name], "chunk_shift_scale", "shift_scale", learned_gain)
    inputs = [tensor.requires_grad_() for tensor in case.draw((2, 2, 2), DTYPES["float64"])]
    assert gradcheck(case.operator, inputs)


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_anything_is_as_accurate_as_eager(backend, data, shape):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    kind = choose(*KINDS)
    scale_map = ScaleMap(
        kind,
        slope=choose(1.0, 0.7, -1.3),
        offset=choose(0.0, 2.0, -0.4),
        gain=choose(1.0, 0.3, 1.7),
        floor=choose(0.0, 1e-3, 0.4),
        low=choose(-math.inf, -0.61),
        high=choose(math.inf, 0.93),
    )
    learned_gain = kind != "sigmoid" and choose(False, True)
    case = affine_case(choose("forward", "inverse"), scale_map, choose(*CHANNEL_LAYOUTS), choose(*ORDERS), learned_gain)
    inputs = in_layout(case.draw(shape, choose(*DTYPES.values())), choose(*LAYOUTS), choose(*LAYOUTS))
    check_results(case, inputs)
    check_gradients(case, inputs)


def even(h: Tensor) -> Tensor:
    return h[:, 0::2]


def odd(h: Tensor) -> Tensor:
    return h[:, 1::2]


def first(h: Tensor) -> Tensor:
    return h.chunk(2, dim=1)[0]


def second(h: Tensor) -> Tensor:
    return h.chunk(2, dim=1)[1]


ALPHA = torch.tensor([0.3, 1.0, -0.7], dtype=torch.float64)
CLAMP = 1.9
LOG_SLOPE = math.log(1e-3)

# For each library: where raw scale u and shift t come from, its scale s(u) and its formula, then our options.
LIBRARIES = {
    "openai_glow": (
        (odd, even, lambda u: torch.sigmoid(u + 2), lambda x, s, t: (x + t) * s),
        ("sigmoid", "interleaved_shift_scale", "shift_scale"),
    ),
    "rosinality": (
        (first, second, lambda u: torch.sigmoid(u + 2), lambda x, s, t: (x + t) * s),
        ("sigmoid", "chunk_scale_shift", "shift_scale"),
    ),
    "chrischute": (
        (
            even,
            odd,
            lambda u: (ALPHA.to(u.device).view(-1, 1, 1) * u.tanh()).exp(),
            lambda x, s, t: (x + t) * s,
        ),
        (ScaleMap("tanh"), "interleaved_scale_shift", "shift_scale", ALPHA),
    ),
    "kamenbliznashki": (
        (odd, even, lambda u: torch.sigmoid(u + 2), lambda x, s, t: x * s + t),
        ("sigmoid", "interleaved_shift_scale", "scale_shift"),
    ),
    "normflows": (
        (odd, even, lambda u: torch.sigmoid(u + 2), lambda x, s, t: (x - t) * s),
        ("sigmoid", "interleaved_shift_scale", "unshift_scale"),
    ),
    "nflows": (
        (second, first, lambda u: torch.sigmoid(u + 2) + 1e-3, lambda x, s, t: x * s + t),
        (ScaleMap("sigmoid", offset=2, floor=1e-3), "chunk_shift_scale", "scale_shift"),
    ),
    "srflow": (
        (odd, even, lambda u: torch.sigmoid(u + 2) + 1e-4, lambda x, s, t: (x + t) * s),
        (ScaleMap("sigmoid", offset=2, floor=1e-4), "interleaved_shift_scale", "shift_scale"),
    ),
    "glow_tts": (
        (second, first, lambda u: 1e-6 + torch.sigmoid(u + 2), lambda x, s, t: x * s + t),
        (ScaleMap("sigmoid", offset=2, floor=1e-6), "chunk_shift_scale", "scale_shift"),
    ),
    "waveglow": (
        (second, first, lambda u: torch.exp(u), lambda x, s, t: x * s + t),
        ("exp", "chunk_shift_scale", "scale_shift"),
    ),
    "realnvp": (
        (first, second, lambda u: torch.exp(torch.tanh(u)), lambda x, s, t: x * s + t),
        ("tanh", "chunk_scale_shift", "scale_shift"),
    ),
    "survae": (
        (even, odd, lambda u: torch.exp(2 * torch.tanh(u / 2)), lambda x, s, t: x * s + t),
        (ScaleMap("tanh", slope=0.5, gain=2), "interleaved_scale_shift", "scale_shift"),
    ),
    "freia_atan": (
        (first, second, lambda u: torch.exp(CLAMP * 0.636 * torch.atan(u)), lambda x, s, t: x * s + t),
        (ScaleMap("atan", gain=0.636 * CLAMP), "chunk_scale_shift", "scale_shift"),
    ),
    "freia_tanh": (
        (first, second, lambda u: torch.exp(CLAMP * torch.tanh(u)), lambda x, s, t: x * s + t),
        (ScaleMap("tanh", gain=CLAMP), "chunk_scale_shift", "scale_shift"),
    ),
    "freia_sigmoid": (
        (first, second, lambda u: torch.exp(CLAMP * 2 * (torch.sigmoid(u) - 0.5)), lambda x, s, t: x * s + t),
        (ScaleMap("tanh", slope=0.5, gain=CLAMP), "chunk_scale_shift", "scale_shift"),
    ),
    "freia_all_in_one": (
        (first, second, lambda u: torch.exp(CLAMP * torch.tanh(0.1 * u / CLAMP)), lambda x, s, t: x * s + t),
        (ScaleMap("tanh", slope=0.1 / CLAMP, gain=CLAMP), "chunk_scale_shift", "scale_shift"),
    ),
    "pyro": (
        (second, first, lambda u: torch.exp(torch.clip(u, -5, 3)), lambda x, s, t: x * s + t),
        (ScaleMap("clip", low=-5, high=3), "chunk_shift_scale", "scale_shift"),
    ),
    "zuko": (
        (second, first, lambda u: torch.exp(u / (1 + abs(u / LOG_SLOPE))), lambda x, s, t: x * s + t),
        (ScaleMap("softsign", slope=-1 / LOG_SLOPE, gain=-LOG_SLOPE), "chunk_shift_scale", "scale_shift"),
    ),
    "bounded_sigmoid": (
        (odd, even, lambda u: 0.2 + 0.8 * torch.sigmoid(u + 2), lambda x, s, t: (x + t) * s),
        (ScaleMap("sigmoid", offset=2, gain=0.8, floor=0.2), "interleaved_shift_scale", "shift_scale"),
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_reproduces_the_formula_of(backend, library):
    (raw_scale, shift, scale, step), options = LIBRARIES[library]
    x, h = torch.randn(4, 3, 5, 7, dtype=torch.float64), 4 * torch.randn(4, 6, 5, 7, dtype=torch.float64)
    options = [option.to(x.device) if isinstance(option, Tensor) else option for option in options]
    s, t = scale(raw_scale(h)), shift(h)
    log_det = s.log().sum((1, 2, 3))

    y, actual_log_det = gk.affine_coupling(x, h, *options)
    assert_accurate(y, step(x, s, t), step(x, s, t), "y")
    assert_accurate(actual_log_det, log_det, log_det, "log_det")

    restored, actual_log_det = gk.affine_coupling_inverse(x, h, *options)
    assert_accurate(step(restored, s, t), x, x, "the library's step of the inverse")
    assert_accurate(actual_log_det, -log_det, -log_det, "log_det of the inverse")


def saturated(u: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` and ``h`` (2, 3, 5) whose raw scale, the first chunk, is ``u`` everywhere."""
    x, t = torch.randn(2, 2, 3, 5).to(dtype)
    return x, torch.cat((torch.full_like(x, u), t), dim=1)


@pytest.mark.parametrize("u", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_saturated_sigmoid_keeps_log_det_and_its_gradient(backend, u, dtype):
    # log(sigmoid(v)) is within exp(-|v|) of min(v, 0); the logarithm of a float32 sigmoid is -inf below v = -104.
    x, h = saturated(u, dtype)
    h.requires_grad_()
    log_det = gk.affine_coupling(x, h, layout="chunk_scale_shift")[1]
    inverse_log_det = gk.affine_coupling_inverse(x, h, layout="chunk_scale_shift")[1]
    expected = torch.full((2,), 15 * min(u + 2.0, 0.0), dtype=torch.float64)
    assert ((log_det.double() - expected).abs() <= 15 * math.exp(-98.0)).all()
    assert ((inverse_log_det.double() + expected).abs() <= 15 * math.exp(-98.0)).all()
    (grad,) = torch.autograd.grad(log_det.sum(), h)
    assert ((grad[:, :3].double() - float(u < 0)).abs() <= math.exp(-98.0)).all()
    assert (grad[:, 3:] == 0).all()


@pytest.mark.parametrize("place", range(0, 64, 7))
def test_one_scale_out_of_range_among_many(backend, place):
    case = affine_case("forward", MAPS["glow"], "chunk_scale_shift", "shift_scale")
    x, h = case.draw((1, 1, 64))
    h[0, 0, place] = -95.0
    check_results(case, [x, h])
    check_gradients(case, [x, h])


def test_a_product_of_hundreds_of_mantissas_near_two(backend):
    # 1 + exp(-v) is 1.9 everywhere; 1.9 to the power of 255 is beyond float32.
    case = affine_case("forward", ScaleMap("sigmoid"), "chunk_scale_shift", "shift_scale")
    x, h = case.draw((2, 90, 12))
    h[:, :90] = -math.log(0.9)
    check_results(case, [x, h])


def test_bfloat16_is_rounded_to_even(backend):
    x = (1 + torch.arange(128) / 128).bfloat16()[None]
    h = torch.cat((torch.zeros_like(x), torch.full_like(x, 2**-8)), dim=1)
    y, _ = gk.affine_coupling(x, h, "exp", "chunk_scale_shift")
    assert torch.equal(y, (x.float() + 2**-8).bfloat16())


def test_nan_of_any_bits_stays_nan_in_bfloat16(backend):
    x, h = torch.randn(1, 2), torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    nan = torch.full((1, 2), -1, dtype=torch.int32).view(torch.float32)
    (grad,) = torch.autograd.grad(gk.affine_coupling(x, h, "exp", "chunk_scale_shift")[0], h, nan)
    assert grad.isnan().all()


@pytest.mark.parametrize("kind", ["tanh", "atan", "softsign", "clip"])
@pytest.mark.parametrize("u", [-1e4, -100.0, 100.0, 1e4])
def test_bounded_maps_stay_within_their_bounds(backend, kind, u):
    scale_map = ScaleMap(kind, gain=1.5, low=-2.0, high=2.0)
    bound = {"tanh": 1.0, "atan": math.pi / 2, "softsign": 1.0, "clip": 2.0}[kind]
    case = affine_case("forward", scale_map, "chunk_scale_shift", "scale_shift")
    x, h = saturated(u, torch.float32)
    check_results(case, [x, h])
    check_gradients(case, [x, h])
    log_det = case.operator(x, h)[1]
    assert (log_det.abs() <= 15 * 1.5 * bound * (1 + 1e-6)).all()
    assert (log_det * u > 0).all()


def test_floor_bounds_the_inverse(backend):
    y, h = torch.randn(2, 3, 5), torch.full((2, 6, 5), -1e4)
    h[:, 3:] = 0.0
    x, log_det = gk.affine_coupling_inverse(y, h, ScaleMap("sigmoid", gain=0.9, floor=0.1), "chunk_scale_shift")
    torch.testing.assert_close(x, 10 * y)
    torch.testing.assert_close(log_det, torch.full((2,), 15 * math.log(10.0)))


def test_learned_gain_has_one_value_per_channel(backend):
    h = torch.cat((torch.ones(1, 3, 2), torch.zeros(1, 3, 2)), dim=1)
    gain = torch.tensor([1.0, 0.0, -2.0])
    y, log_det = gk.affine_coupling(torch.ones(1, 3, 2), h, "exp", "chunk_scale_shift", "scale_shift", gain)
    torch.testing.assert_close(y, gain.exp().view(1, 3, 1).expand(1, 3, 2))
    torch.testing.assert_close(log_det, torch.tensor([-2.0]))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 2)], ids=str)
def test_learned_gain_may_lie_anywhere_in_memory(backend, shape):
    case = affine_case("forward", MAPS["tanh"], "chunk_scale_shift", "scale_shift", learned_gain=True)
    x, h, gain = case.draw(shape)
    for laid_out in (gain.repeat_interleave(2)[::2], gain[:1].expand(5)):
        check_results(case, [x, h, laid_out])
        check_gradients(case, [x, h, laid_out])


def test_names_of_scale_maps_and_the_default_options(backend):
    x, h = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    named = {"sigmoid": ScaleMap("sigmoid", offset=2.0), "exp": ScaleMap("exp"), "tanh": ScaleMap("tanh")}
    for name, scale_map in named.items():
        assert_same_bits(gk.affine_coupling(x, h, name), gk.affine_coupling(x, h, scale_map))
    for function in (gk.affine_coupling, gk.affine_coupling_inverse):
        assert_same_bits(function(x, h), function(x, h, "sigmoid", "interleaved_shift_scale", "shift_scale", None))


X, H = torch.zeros(2, 3, 5), torch.zeros(2, 6, 5)
LAYOUT_NAMES = "'chunk_scale_shift', 'chunk_shift_scale', 'interleaved_scale_shift', 'interleaved_shift_scale'"

# Arguments, the type of the error and its message; NAME is x for the forward and y for the inverse.
BAD_ARGUMENTS = {
    "data_no_tensor": (([1.0], H), TypeError, "NAME must be a tensor, got list"),
    "data_integer": ((X.int(), H), TypeError, "NAME must be a floating-point tensor, got int32"),
    "data_bool": ((X.bool(), H), TypeError, "NAME must be a floating-point tensor, got bool"),
    "data_complex": ((X.cfloat(), H), TypeError, "NAME must be a floating-point tensor, got complex64"),
    "data_one_dimension": (
        (X[0, 0], H),
        ValueError,
        "NAME must be (B, C, *spatial) with 0 to 3 spatial dimensions, got shape (5,)",
    ),
    "data_six_dimensions": (
        (X[..., None, None, None], H),
        ValueError,
        "NAME must be (B, C, *spatial) with 0 to 3 spatial dimensions, got shape (2, 3, 5, 1, 1, 1)",
    ),
    "h_no_tensor": ((X, None), TypeError, "h must be a tensor, got NoneType"),
    "h_shape": ((X, X), ValueError, "h must be (B, 2 C, *spatial) for this NAME = (2, 6, 5), got (2, 3, 5)"),
    "h_broadcast": ((X, H[:1]), ValueError, "h must be (B, 2 C, *spatial) for this NAME = (2, 6, 5), got (1, 6, 5)"),
    "h_integer": ((X, H.long()), TypeError, "h must be a floating-point tensor, got int64"),
    "h_device": ((X, H.to("meta")), ValueError, f"h must be on the device of the data, {X.device}, got meta"),
    "scale_map_name": (
        (X, H, "softplus"),
        ValueError,
        "scale_map must be a ScaleMap or one of 'sigmoid', 'exp', 'tanh', got 'softplus'",
    ),
    "scale_map_type": ((X, H, 3), TypeError, "scale_map must be a name or a ScaleMap, got int"),
    "layout": ((X, H, "exp", "chunk"), ValueError, f"layout must be one of {LAYOUT_NAMES}, got 'chunk'"),
    "order": (
        (X, H, "exp", CHANNEL_LAYOUTS[0], "scale"),
        ValueError,
        "order must be one of 'shift_scale', 'scale_shift', 'unshift_scale', got 'scale'",
    ),
    "gain_shape": (
        (X, H, "exp", CHANNEL_LAYOUTS[0], ORDERS[0], torch.ones(6)),
        ValueError,
        "log_scale_gain must be (C,) with C = NAME.shape[1] = (3,), got (6,)",
    ),
    "gain_integer": (
        (X, H, "exp", CHANNEL_LAYOUTS[0], ORDERS[0], torch.ones(3).int()),
        TypeError,
        "log_scale_gain must be a floating-point tensor, got int32",
    ),
    "gain_of_a_sigmoid": (
        (X, H, "sigmoid", CHANNEL_LAYOUTS[0], ORDERS[0], torch.ones(3)),
        ValueError,
        "log_scale_gain must be None for a sigmoid scale map, got a tensor",
    ),
}


@pytest.mark.parametrize(("function", "name"), [(gk.affine_coupling, "x"), (gk.affine_coupling_inverse, "y")])
@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(function, name, bad):
    arguments, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message.replace("NAME", name)


@pytest.mark.parametrize(("function", "name"), [(gk.additive_coupling, "x"), (gk.additive_coupling_inverse, "y")])
def test_bad_arguments_of_the_additive_coupling_are_named(function, name):
    with pytest.raises(ValueError, match="h must be the shape of") as caught:
        function(X, H)
    assert str(caught.value) == f"h must be the shape of {name} = (2, 3, 5), got (2, 6, 5)"
    with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor, got int64"):
        function(X.long(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relu"}, f"kind must be one of {', '.join(map(repr, KINDS))}, got 'relu'"),
        ({"kind": "exp", "floor": -0.1}, "floor must be at least 0, got -0.1"),
        ({"kind": "exp", "floor": math.nan}, "floor must be at least 0, got nan"),
        ({"kind": "sigmoid", "gain": 0.0}, "gain of a sigmoid scale map must be above 0, got 0.0"),
        ({"kind": "clip", "low": 1.0, "high": 0.0}, "low must not be above high, got low=1.0, high=0.0"),
    ],
)
def test_impossible_scale_maps_are_refused(options, message):
    with pytest.raises(ValueError, match="must") as caught:
        ScaleMap(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["slope", "offset", "gain", "floor", "low", "high"])
@pytest.mark.parametrize("value", ["a", None, torch.ones((), requires_grad=True)])
def test_scale_maps_of_other_things_than_numbers_are_refused(name, value):
    """A learnable tensor would get no gradient."""
    with pytest.raises(TypeError, match=f"^{name} must be a number, got {re.escape(repr(value))}$"):
        ScaleMap("exp", **{name: value})
