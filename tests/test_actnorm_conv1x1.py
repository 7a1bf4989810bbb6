"""ActNorm with the invertible 1x1 convolution, on every backend that can run here.

Proven against plain formulas in float64: values, log-determinants and gradients of both directions for every number
of channels that flows use, ill-conditioned, singular and LU-decomposed weights, and tiny and huge scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    PROPERTY,
    Case,
    DifferentiableProperties,
    ResultProperties,
    any_shape,
    assert_accurate,
    check_gradients,
    check_results,
    evaluate,
    gradcheck,
    gradients,
    in_layout,
    random_upstream,
    registered_operators,
)
from torch import Tensor

import glow_kernels as gk
from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops.folding import fold_inverse, invertible

# Around the sizes of the tiles in the interpreter.
CHANNELS = [1, 2, 3, 6, 15, 16, 17, 31, 33, 48, 64, 65] if INTERPRETED else list(range(1, 51))

OPERATORS = {"forward": gk.actnorm_conv1x1, "inverse": gk.actnorm_conv1x1_inverse}


def channels(vector: Tensor, like: Tensor) -> Tensor:
    """``vector`` (C,) in the shape that multiplies (B, C, *spatial)."""
    return vector.reshape(-1, *[1] * (like.dim() - 2))


def plain_log_det(x, log_scale, weight, weight_log_det):
    """The log-determinant of x -> z, (B,)."""
    if weight_log_det is None:  # PyTorch has no determinant in half precision
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_log_det = torch.linalg.slogdet(weight.to(wide)).logabsdet.to(weight.dtype)
    return math.prod(x.shape[2:]) * (log_scale.sum() + weight_log_det).expand(len(x))


def plain_forward(x, log_scale, bias, weight, weight_log_det=None):
    """x -> z, first ActNorm, then the convolution."""
    activated = channels(log_scale.exp(), x) * (x + channels(bias, x))
    z = torch.einsum("ij,bj...->bi...", weight, activated)
    return z, plain_log_det(x, log_scale, weight, weight_log_det)


def plain_inverse(z, log_scale, bias, weight, weight_log_det=None):
    """z -> x, first the inverse convolution, then the inverse ActNorm."""
    inverse = torch.linalg.inv(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype)
    activated = torch.einsum("ij,bj...->bi...", inverse, z)
    x = activated / channels(log_scale.exp(), z) - channels(bias, z)
    return x, -plain_log_det(z, log_scale, weight, weight_log_det)


FORMULAS = {"forward": plain_forward, "inverse": plain_inverse}


def random_weight(size: int) -> Tensor:
    """A well-conditioned matrix that is not orthogonal."""
    orthogonal = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return orthogonal + 0.2 * torch.randn(size, size, dtype=torch.float64) / size**0.5


def inputs_without_log_det(shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Data, log_scale, bias and weight."""
    log_scale, bias = 0.5 * torch.randn(2, shape[1], dtype=torch.float64)
    return torch.randn(tuple(shape), dtype=torch.float64), log_scale, bias, random_weight(shape[1])


def inputs_with_log_det(shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Data, log_scale, bias, weight and weight_log_det."""
    inputs = inputs_without_log_det(shape)
    return *inputs, torch.linalg.slogdet(inputs[-1]).logabsdet


def conv_case(direction: str, knows_log_det: bool = False) -> Case:
    """One direction."""
    back = "inverse" if direction == "forward" else "forward"
    return Case(
        f"{direction}_with_weight_log_det" if knows_log_det else direction,
        OPERATORS[direction],
        FORMULAS[direction],
        inputs_with_log_det if knows_log_det else inputs_without_log_det,
        undo=(OPERATORS[back], FORMULAS[back]),
    )


def plain_reversible_backward(z, grad, grad_log_det, *parameters):
    """The inverse, and autograd through the plain forward."""
    x, _ = plain_inverse(z, *parameters)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    with torch.enable_grad():
        results = plain_forward(*leaves)
    return (x, *torch.autograd.grad(results, leaves, (grad, grad_log_det)))


def reversible_case(knows_log_det: bool) -> Case:
    """``actnorm_conv1x1_reversible_backward``."""

    def operator(z, grad, grad_log_det, *parameters):
        results = gk.ops.actnorm_conv1x1_reversible_backward(grad, grad_log_det, z, *parameters)
        return tuple(result for result in results if result is not None)

    def inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
        z, *parameters = (inputs_with_log_det if knows_log_det else inputs_without_log_det)(shape)
        return z, torch.randn_like(z), torch.randn(shape[0], dtype=torch.float64), *parameters

    return Case(
        "reversible_with_weight_log_det" if knows_log_det else "reversible",
        operator,
        plain_reversible_backward,
        inputs,
        batched=2,
        data_arguments=2,
        types=(0, 0, 3, 4, 5, 6)[: 6 if knows_log_det else 5],
    )


def plain_lu_weight(lower, permutation, upper, log_diagonal, diagonal_sign):
    """W and log|det W| by the formulas of the paper."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype)
    unit_lower = lower * torch.ones_like(lower).tril(-1) + identity
    full_upper = upper * torch.ones_like(upper).triu(1) + identity * (diagonal_sign * log_diagonal.exp())[..., None, :]
    return permutation @ unit_lower @ full_upper, log_diagonal.sum(-1)


def lu_inputs(shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Random factors of matrices (*K, C, C), with random entries outside the triangles too."""
    *steps, size = shape
    lower, upper = torch.randn(2, *steps, size, size, dtype=torch.float64)
    permutation = torch.eye(size, dtype=torch.float64)[torch.randperm(size)].expand_as(lower)
    log_diagonal = 0.5 * torch.randn(*steps, size, dtype=torch.float64)
    return lower, permutation, upper, log_diagonal, torch.randn(*steps, size, dtype=torch.float64).sign()


LU_CASE = Case(
    "lu_weight",
    lambda lower, permutation, *others: gk.ops.lu_weight(permutation, lower, *others),
    plain_lu_weight,
    lu_inputs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (48,), (3, 5), (2, 3, 4), (0, 3), (2, 0), (2, 70)], ids=str)
def test_lu_weight_and_its_gradients(backend, shape, dtype):
    inputs = LU_CASE.draw(shape, (dtype, dtype))
    check_results(LU_CASE, inputs)
    check_gradients(LU_CASE, inputs, wanted=(0, 2, 3))


def test_lu_weight_with_more_than_a_permutation(backend):
    lower, _, *others = LU_CASE.draw((7,), (torch.float64, torch.float64))
    inputs = [lower, torch.randn_like(lower) * (torch.rand_like(lower) < 0.4), *others]
    check_results(LU_CASE, inputs)
    check_gradients(LU_CASE, inputs, wanted=(0, 2, 3))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("permutation", torch.eye(3), ValueError, "permutation must be the shape of lower = (4, 4), got (3, 3)"),
        ("permutation", None, TypeError, "permutation must be a tensor, got NoneType"),
        ("lower", torch.eye(4).int(), TypeError, "lower must be a floating-point tensor, got int32"),
        ("lower", [[1.0]], TypeError, "lower must be a tensor, got list"),
        ("lower", torch.zeros(4), ValueError, "lower must be (*K, C, C), got (4,)"),
        ("lower", torch.zeros(4, 3), ValueError, "lower must be (*K, C, C), got (4, 3)"),
        ("upper", torch.eye(4).bool(), TypeError, "upper must be a floating-point tensor, got bool"),
        ("log_diagonal", torch.zeros(3), ValueError, "log_diagonal must be (*K, C) for this lower = (4,), got (3,)"),
        ("diagonal_sign", torch.ones(3), ValueError, "diagonal_sign must be (*K, C) for this lower = (4,), got (3,)"),
    ],
)
def test_lu_weight_names_bad_arguments(name, value, error, message):
    arguments = dict.fromkeys(("permutation", "lower", "upper"), torch.eye(4))
    arguments |= {"log_diagonal": torch.zeros(4), "diagonal_sign": torch.ones(4), name: value}
    with pytest.raises(error) as caught:
        gk.ops.lu_weight(**arguments)
    assert str(caught.value) == message


def test_lu_weight_gradcheck(backend):
    lower, permutation, upper, log_diagonal, sign = lu_inputs((2, 3))

    def weight(lower, upper, log_diagonal):
        return gk.ops.lu_weight(permutation, lower, upper, log_diagonal, sign)

    assert gradcheck(weight, [tensor.requires_grad_() for tensor in (lower, upper, log_diagonal)])


DIRECTIONS = pytest.mark.parametrize("case", [conv_case("forward"), conv_case("inverse")], ids=lambda case: case.name)
ALL_CASES = [conv_case(direction, knows) for direction in OPERATORS for knows in (False, True)]


def fold_arguments(shape, lay):
    """Arguments of the folding of a step, or of as many steps as there are samples."""
    steps, size = tuple(shape[:1]) if len(shape) > 2 else (), shape[1]
    log_scale, bias = (lay(torch.randn(*steps, size)) if steps else torch.randn(size) for _ in range(2))
    weight = random_weight(size).float().expand(*steps, size, size)
    if steps and lay is not LAYOUTS["one_element"]:  # matrices in that layout would be singular
        weight = lay(weight)
    weight_log_det = torch.randn(steps) if len(shape) == 4 else None
    tensors = (log_scale, bias, weight, weight_log_det)
    dtype = compute_dtype(log_scale)  # these parameters are never in half precision
    return tuple(None if tensor is None else tensor.to(dtype).requires_grad_() for tensor in tensors)


def apply_arguments(shape, lay):
    """Arguments of the application to data."""
    x, size = lay(torch.randn(tuple(shape))).requires_grad_(), shape[1]
    matrix, shift = random_weight(size).to(compute_dtype(x)), torch.randn(size, dtype=compute_dtype(x))
    return x, matrix.requires_grad_(), shift.requires_grad_()


def apply_backward_arguments(shape, lay):
    """Arguments of the backward of the application."""
    x, matrix, _ = (tensor.detach() for tensor in apply_arguments(shape, lay))
    return torch.randn_like(x), x, matrix, True


def reversible_arguments(shape, lay):
    """Arguments of the reversible backward of the application."""
    z, matrix, shift = (tensor.detach() for tensor in apply_arguments(shape, lay))
    return torch.randn_like(z), z, matrix, torch.linalg.inv(matrix).contiguous(), shift


def fold_backward_arguments(shape, lay):
    """Arguments of the backward of the folding."""
    inputs = [None if tensor is None else tensor.detach() for tensor in fold_arguments(shape, lay)]
    weight, steps = inputs[2], inputs[2].shape[:-2]
    return *(torch.randn(shape, dtype=weight.dtype) for shape in (weight.shape, weight.shape[:-1], steps)), *inputs


def whole_arguments(shape, lay):
    """Arguments of folding and applying in one call."""
    x = lay(torch.randn(tuple(shape))).requires_grad_()
    dtype = compute_dtype(x)
    parameters = [tensor.to(dtype).requires_grad_() for tensor in inputs_without_log_det(shape)[1:]]
    weight_log_det = torch.randn((), dtype=dtype, requires_grad=True) if len(shape) == 4 else None
    return x, *parameters, weight_log_det


def whole_reversible_arguments(shape, lay):
    """Arguments of the reversible backward of both."""
    inputs = [None if tensor is None else tensor.detach() for tensor in whole_arguments(shape, lay)]
    return torch.randn_like(inputs[0]), torch.randn(shape[0], dtype=inputs[1].dtype), *inputs


def whole_backward_arguments(shape, lay):
    """Arguments of the backward of both."""
    return *whole_reversible_arguments(shape, lay), True


def lu_arguments(shape, lay):
    """Arguments of the assembly of LU-decomposed weights."""
    steps, size = tuple(shape[:1]) if len(shape) > 2 else (), shape[1]
    lower, permutation, upper, log_diagonal, sign = (tensor.float() for tensor in lu_inputs((*steps, size)))
    if steps:
        lower, upper, log_diagonal = lay(lower), lay(upper), lay(log_diagonal)
    dtype = compute_dtype(lower)
    lower, upper, log_diagonal = (tensor.to(dtype).requires_grad_() for tensor in (lower, upper, log_diagonal))
    return permutation.to(dtype), lower, upper, log_diagonal, sign.to(dtype)


def lu_backward_arguments(shape, lay):
    """Arguments of the backward of the assembly."""
    inputs = [tensor.detach() for tensor in lu_arguments(shape, lay)]
    grads = (torch.randn(shape, dtype=inputs[0].dtype) for shape in (inputs[0].shape, inputs[0].shape[:-2]))
    return *grads, *inputs


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator."""

    module = "actnorm_conv1x1"
    arguments: ClassVar = {
        "forward": whole_arguments,
        "inverse": whole_arguments,
        "backward": whole_backward_arguments,
        "inverse_backward": whole_backward_arguments,
        "reversible_backward": whole_reversible_arguments,
        "lu_weight": lu_arguments,
        "lu_weight_backward": lu_backward_arguments,
        "fold": fold_arguments,
        "fold_backward": fold_backward_arguments,
        "fold_inverse": fold_arguments,
        "fold_inverse_backward": fold_backward_arguments,
        "apply": apply_arguments,
        "apply_backward": apply_backward_arguments,
        "apply_reversible_backward": reversible_arguments,
    }
    cases = ALL_CASES


class TestReversibleBackward(ResultProperties):
    """What holds for the results of every operator."""

    module = "actnorm_conv1x1"
    cases: ClassVar = [reversible_case(knows_log_det=False), reversible_case(knows_log_det=True)]


@pytest.mark.parametrize("size", [*CHANNELS, 96])
def test_reversible_backward_of_every_number_of_channels(backend, size):
    case = reversible_case(knows_log_det=True)
    # Positions that do not fill a vector, and those that do.
    for shape in ((2, size, 3, 5), (2, size, 4, 8)):
        check_results(case, case.draw(shape))


@given(data=st.data(), shape=any_shape())
@PROPERTY
def test_anything_is_as_accurate_as_eager(backend, data, shape):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    case = choose(*ALL_CASES)
    inputs = in_layout(case.draw(shape, choose(*DTYPES.values())), choose(*LAYOUTS))
    check_results(case, inputs)
    check_gradients(case, inputs)


@DIRECTIONS
@pytest.mark.parametrize("size", [*CHANNELS, 384])
def test_every_number_of_channels(backend, case, size):
    inputs = case.draw((2, size, 3, 5))
    check_results(case, inputs)
    check_gradients(case, inputs)


# More positions than a tile has: many samples of whole vectors, few samples of other sizes, many channels in two parts.
@DIRECTIONS
@pytest.mark.parametrize("shape", [(70, 5, 4, 4), (3, 5, 19, 23), (1, 100, 9, 16), (5, 80, 8, 8)], ids=str)
def test_tiles_and_parts_of_any_number_of_samples(backend, case, shape):
    inputs = case.draw(shape)
    check_results(case, inputs)
    check_gradients(case, inputs)


# Many parts of several tiles; and work beside the data, which a known determinant spares.
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [(3, 3, 173, 150), (1, 80, 9, 16)], ids=str)
def test_native_sums_of_many_parts_and_known_determinants_of_many_channels(case, shape):
    TestProperties().require_native()
    inputs = case.draw(shape)
    with gk.use_backend("native"):
        check_results(case, inputs)
        check_gradients(case, inputs)


# More than the caches hold is written past them, where rows begin at whole vectors.
@DIRECTIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(3, 8, 300, 300), (3, 8, 299, 301)], ids=str)
def test_native_data_beyond_the_caches_is_what_its_samples_are(case, size, layout):
    TestProperties().require_native()
    data, *parameters = in_layout(case.draw(size, DTYPES["float64"]), layout)

    def results(part):
        leaf = part.clone().requires_grad_()
        result = case.operator(leaf, *parameters)[0]
        return result.detach(), *torch.autograd.grad(result, leaf, part)

    with gk.use_backend("native"):
        for whole, *parts in zip(results(data), *map(results, data.chunk(2)), strict=True):
            torch.testing.assert_close(whole, torch.cat(parts))


# As of channels-last images without their first and last rows.
@DIRECTIONS
@pytest.mark.parametrize("size", [6, 16])
def test_samples_apart_from_each_other_whose_channels_lie_together(backend, case, size):
    data, *parameters = case.draw((3, size, 5, 7))
    room = torch.full((3, size, 9, 7), torch.nan).to(memory_format=torch.channels_last)
    inputs = [room[:, :, 2:7].copy_(data), *parameters]
    check_results(case, inputs)
    check_gradients(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("registered_apply", registered_operators("actnorm_conv1x1_apply"))
def test_the_matrix_of_a_map_may_lie_anywhere_in_memory(registered_apply, dtype):
    def among_nan(x):
        return torch.nn.functional.pad(x.repeat_interleave(2, -1), (0, 32), value=torch.nan)[..., :-32:2]

    operator, arguments = TestProperties().sample(registered_apply, (3, 4, 5), lambda x: x.to(dtype))
    apart = [among_nan(arg) if isinstance(arg, Tensor) and arg.dim() < 3 else arg for arg in arguments]
    for one, other in zip(evaluate(operator, apart), evaluate(operator, arguments), strict=True):
        torch.testing.assert_close(one, other)


@DIRECTIONS
def test_parameters_may_have_any_strides(backend, case):
    data, log_scale, bias, weight = case.draw((3, 4, 5, 2))
    column = torch.stack((log_scale, bias), dim=1)
    room = torch.full((5, 9), torch.nan)
    room[1:, 1::2] = weight
    for inputs in (
        [data, column[:, 0], column[:, 1], weight.T.contiguous().T],
        [data, log_scale[:1].expand(4), bias[:1].expand(4), room[1:, 1::2]],
    ):
        check_results(case, inputs)
        check_gradients(case, inputs)


@DIRECTIONS
def test_gradients_in_float32_parameters_are_float32_for_bfloat16_data(backend, case):
    check_gradients(case, case.draw((4, 6, 5, 7), (torch.bfloat16, torch.float32)), precision=torch.float32)


@DIRECTIONS
@pytest.mark.parametrize("log_scale", [-60.0, -20.0, 20.0, 60.0])
def test_tiny_and_huge_scales_keep_their_relative_accuracy(backend, case, log_scale):
    data, _, _, weight = case.draw((3, 4, 5, 2))
    inputs = [data, torch.full((4,), log_scale), torch.zeros(4), weight]
    check_results(case, inputs, unit=0.0)
    check_gradients(case, inputs, unit=0.0)


def test_gradient_of_the_determinant_where_the_inverse_leaves_single_precision(backend):
    # M^-1 has a factor of exp(100), but log|det W| and its gradient do not.
    data, _, bias, weight = conv_case("forward").draw((2, 80, 3))
    weight.requires_grad_()
    _, log_det = gk.actnorm_conv1x1(data, torch.full((80,), -100.0), bias, weight)
    (grad,) = torch.autograd.grad(log_det.sum(), weight)
    truth = 6 * torch.linalg.inv(weight.detach().double()).mT
    assert (grad - truth).abs().max() <= 1e-6 * truth.abs().max()


def ill_conditioned(size: int) -> Tensor:
    """A float32 matrix of condition 1e5."""
    left, right = torch.linalg.qr(torch.randn(2, size, size, dtype=torch.float64)).Q
    return (left * torch.logspace(0, -5, size, dtype=torch.float64) @ right).float()


@pytest.mark.parametrize("direction", OPERATORS)
def test_work_on_the_matrix_is_in_float64(backend, direction):
    # Only M, v and log_det are rounded to float32, so the condition of W does not enter: a product of C terms has a
    # relative error of C eps / 2 in |M| |x| + |v|, and W^-1 in float32 would have one of 1e5 eps.
    size, eps = 8, torch.finfo(torch.float32).eps
    data, log_scale, bias = torch.randn(3, size, 5), torch.randn(size), torch.randn(size)
    weight = ill_conditioned(size)
    scale = log_scale.double().exp()
    if direction == "forward":
        matrix = weight.double() * scale
        shift = matrix @ bias.double()
    else:
        matrix = torch.linalg.inv(weight.double()) / scale[:, None]
        shift = -bias.double()
    result, log_det = OPERATORS[direction](data, log_scale, bias, weight)
    truth = matrix @ data.double() + shift[:, None]
    bound = matrix.abs() @ data.double().abs() + shift.abs()[:, None]
    assert ((result.double() - truth).abs() <= (size + 2) * eps * bound).all()

    sign = 1 if direction == "forward" else -1
    true_log_det = sign * 5 * (log_scale.double().sum() + torch.linalg.slogdet(weight.double()).logabsdet)
    assert ((log_det.double() - true_log_det).abs() <= 2 * eps * true_log_det.abs()).all()


def test_a_weight_in_float64_is_not_rounded_before_it_is_inverted(backend):
    # As above; rounding W would change the inverse by 1e5 eps.
    size, eps = 8, torch.finfo(torch.float32).eps
    data, weight, zeros = torch.randn(3, size, 5), ill_conditioned(size).double(), torch.zeros(size)
    weight = (weight * (1 + 1e-8 * torch.randn(size, size, dtype=torch.float64))).requires_grad_()
    result, log_det = gk.actnorm_conv1x1_inverse(data, zeros, zeros, weight)
    (grad,) = torch.autograd.grad(result.sum() + log_det.sum(), weight)
    inverse = torch.linalg.inv(weight)
    truth, bound = inverse @ data.double(), inverse.abs() @ data.double().abs()
    true_log_det = -5 * torch.linalg.slogdet(weight).logabsdet.expand(3)
    (true_grad,) = torch.autograd.grad(truth.sum() + true_log_det.sum(), weight)
    assert result.dtype == log_det.dtype == torch.float32
    assert grad.dtype == torch.float64
    assert ((result.double() - truth).abs() <= (size + 2) * eps * bound).all()
    torch.testing.assert_close(log_det.double(), true_log_det, rtol=2 * eps, atol=0)
    torch.testing.assert_close(grad, true_grad, rtol=1e-5, atol=1e-5 * true_grad.abs().max().item())


def test_gradient_through_the_inverse_is_in_float64(backend):
    # As above: the sums over B P = 15 terms are in float32, but their products with W^-1 are not.
    size, eps = 8, torch.finfo(torch.float32).eps
    inputs = [torch.randn(3, size, 5), torch.zeros(size), torch.zeros(size), ill_conditioned(size)]
    upstream = [torch.randn(3, size, 5), torch.randn(3)]
    wide = [tensor.double() for tensor in inputs]
    truth = gradients(plain_inverse, wide, [grad.double() for grad in upstream])[3]
    actual = gradients(gk.actnorm_conv1x1_inverse, inputs, upstream)[3]
    inverse = torch.linalg.inv(wide[3]).abs()
    sums = torch.einsum("bip,bjp->ij", upstream[0].double().abs(), wide[0].abs())
    bound = inverse.T @ sums @ inverse.T + 5 * upstream[1].double().abs().sum() * inverse.T
    assert ((actual.double() - truth).abs() <= (15 + 4) * eps * bound).all()


def lu_weight(lower, upper, diagonal):
    """W = P L (U + diag(d)), with a fixed permutation P."""
    size = len(diagonal)
    L = lower.tril(-1) + torch.eye(size, dtype=lower.dtype)
    return (L @ (upper.triu(1) + diagonal.diag())).roll(1, dims=0)


@pytest.mark.parametrize("direction", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_reach_the_factors_of_an_lu_decomposed_weight(backend, direction, dtype):
    def operator(x, log_scale, bias, *factors):
        return OPERATORS[direction](x, log_scale, bias, lu_weight(*factors), factors[2].abs().log().sum())

    def formula(x, log_scale, bias, *factors):
        return FORMULAS[direction](x, log_scale, bias, lu_weight(*factors))

    def inputs(shape):
        lower, upper = 0.4 * torch.randn(2, shape[1], shape[1], dtype=torch.float64)
        diagonal = (1 + torch.rand(shape[1])) * (-1) ** torch.arange(shape[1])
        return *inputs_without_log_det(shape)[:3], lower, upper, diagonal

    case = Case("lu", operator, formula, inputs)
    drawn = case.draw((3, 6, 4, 5), (dtype, dtype))
    check_results(case, drawn)
    check_gradients(case, drawn)


@pytest.mark.parametrize(("direction", "sign"), [("forward", 1), ("inverse", -1)])
def test_given_weight_log_det_takes_the_place_of_the_computed_one(backend, direction, sign):
    data, log_scale, bias, weight = conv_case(direction).draw((2, 3, 4, 5))
    wrong = torch.tensor(7.0, requires_grad=True)
    weight.requires_grad_()
    log_det = OPERATORS[direction](data, log_scale, bias, weight, wrong)[1]
    torch.testing.assert_close(log_det, (sign * 20 * (log_scale.sum() + 7.0)).expand(2))
    of_given, of_weight = torch.autograd.grad(log_det.sum(), (wrong, weight))
    assert of_given == sign * 2 * 20
    assert (of_weight == 0).all()


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3).cumsum(0).tril(-1)],
    ids=["zero", "equal_rows", "nilpotent"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_singular_weight_has_no_log_det_and_no_inverse(backend, weight, dtype):
    data, log_scale, bias = torch.randn(2, 3, 4).to(dtype), torch.zeros(3), torch.zeros(3)
    weight = weight.to(data.device)
    z, log_det = gk.actnorm_conv1x1(data, log_scale, bias, weight)
    expected = weight.to(dtype) @ data
    assert_accurate(z, (weight.double() @ data.double()), expected, "z")
    assert (log_det == -torch.inf).all()
    if backend != "reference" and data.is_cuda:  # raises no error, which would have to wait for the device
        x, log_det = gk.actnorm_conv1x1_inverse(data, log_scale, bias, weight)
        assert (log_det == torch.inf).all()
        assert not x.isfinite().all()
        return
    with pytest.raises(ValueError, match="weight") as caught:
        gk.actnorm_conv1x1_inverse(data, log_scale, bias, weight)
    message = "weight must be invertible, got a singular (3, 3) matrix, or parameters that are not finite"
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weight_that_is_not_finite_has_no_inverse(backend, value):
    data, weight = torch.randn(2, 3, 4), torch.eye(3)
    weight[2, 1] = value
    if backend != "reference" and data.is_cuda:
        return
    with pytest.raises(ValueError, match="or parameters that are not finite"):
        gk.actnorm_conv1x1_inverse(data, torch.zeros(3), torch.zeros(3), weight)


def test_reversible_backward_of_a_singular_weight(backend):
    data, zeros = torch.randn(2, 3, 4), torch.zeros(3)
    if backend != "reference" and data.is_cuda:
        return
    with pytest.raises(ValueError, match="weight must be invertible"):
        gk.ops.actnorm_conv1x1_reversible_backward(data, zeros[:2], data, zeros, zeros, torch.ones(3, 3))


def test_one_singular_weight_among_many(backend):
    weights, zeros = torch.eye(3).repeat(4, 1, 1), torch.zeros(4, 3)
    weights[2] = 1.0
    if backend != "reference" and weights.is_cuda:
        return
    with pytest.raises(ValueError, match="weight must be invertible"):
        fold_inverse(zeros, zeros, weights, None)


def test_a_pivot_may_be_negative(backend):
    case = conv_case("inverse")
    data, log_scale, bias, _ = case.draw((3, 2, 5), DTYPES["float64"])
    check_results(case, [data, log_scale, bias, torch.tensor([[1e-18, 1.0], [-1.0, 1.0]], dtype=torch.float64)])


def test_errors_other_than_a_singular_weight_are_not_changed():
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        invertible(fail)


def long_double_log_det(weight):
    """log|det| of ``weight``, a NumPy array, in long double."""
    rest, log_det = weight.astype(np.longdouble), np.longdouble(0)
    for k in range(len(rest)):
        pivot = k + np.abs(rest[k:, k]).argmax()
        rest[[k, pivot]] = rest[[pivot, k]]
        log_det += np.log(np.abs(rest[k, k]))
        rest[k + 1 :, k:] -= np.outer(rest[k + 1 :, k] / rest[k, k], rest[k, k:])
    return log_det


def test_log_det_of_a_wide_rotation(backend):
    """The logarithms of its pivots cancel, but their partial sums are large."""
    data, zero = torch.randn(1, 192, 1, dtype=torch.float64), torch.zeros(192, dtype=torch.float64)
    for _ in range(3):
        weight = torch.linalg.qr(torch.randn(192, 192, dtype=torch.float64, device="cpu")).Q
        log_det = gk.actnorm_conv1x1(data, zero, zero, weight.to(data.device))[1]
        assert abs(log_det.item() - long_double_log_det(weight.numpy())) < 1e-14


FOLDS = [name for name in registered_operators("actnorm_conv1x1_fold_") if "backward" not in name]


@pytest.mark.parametrize("knows_log_det", [False, True])
@pytest.mark.parametrize("channels", [4, 70] if INTERPRETED else [4, 70, 130])
@pytest.mark.parametrize("registered_fold", FOLDS)
def test_folding_many_steps_is_folding_each(registered_fold, channels, knows_log_det):
    draw = inputs_with_log_det if knows_log_det else inputs_without_log_det
    steps = [draw((1, channels))[1:] for _ in range(6)]
    stacked = [torch.stack(tensors).unflatten(0, (2, 3)).requires_grad_() for tensors in zip(*steps, strict=True)]

    def formula(log_scale, bias, weight, known=None):
        matrix = weight * log_scale.exp().unsqueeze(-2)
        of_weight = weight.det().abs().log() if known is None else known
        return matrix, (matrix @ bias.unsqueeze(-1)).squeeze(-1), log_scale.sum(-1) + of_weight

    def inverse_formula(*tensors):
        matrix, _, log_det = formula(*tensors)
        return torch.linalg.inv(matrix), -tensors[1], -log_det

    plain = inverse_formula if "inverse" in registered_fold else formula

    def fold(log_scale, bias, weight, known=None):
        return getattr(torch.ops.glow_kernels, registered_fold)(log_scale, bias, weight, known)

    upstream = random_upstream(fold, stacked)
    for actual, truth in zip(
        [*evaluate(fold, stacked), *gradients(fold, stacked, upstream)],
        [*evaluate(plain, stacked), *gradients(plain, stacked, upstream)],
        strict=True,
    ):
        assert_accurate(actual, truth, truth, registered_fold)


X, C, W = torch.zeros(2, 3, 5), torch.zeros(3), torch.eye(3)
IMAGE = "must be (B, C, *spatial) with 0 to 3 spatial dimensions"

# Arguments, the type of the error and its message; NAME is x for the forward and z for the inverse.
BAD_ARGUMENTS = {
    "data_no_tensor": ((None, C, C, W), TypeError, "NAME must be a tensor, got NoneType"),
    "data_integer": ((X.int(), C, C, W), TypeError, "NAME must be a floating-point tensor, got int32"),
    "data_bool": ((X.bool(), C, C, W), TypeError, "NAME must be a floating-point tensor, got bool"),
    "data_complex": ((X.cfloat(), C, C, W), TypeError, "NAME must be a floating-point tensor, got complex64"),
    "data_one_dimension": ((X[0, 0], C, C, W), ValueError, f"NAME {IMAGE}, got shape (5,)"),
    "data_six_dimensions": ((X[None, None, None], C, C, W), ValueError, f"NAME {IMAGE}, got shape (1, 1, 1, 2, 3, 5)"),
    "log_scale_no_tensor": ((X, 0.0, C, W), TypeError, "log_scale must be a tensor, got float"),
    "log_scale_shape": (
        (X, torch.zeros(4), C, W),
        ValueError,
        "log_scale must be (C,) with C = NAME.shape[1] = (3,), got (4,)",
    ),
    "bias_shape": (
        (X, C, C.view(1, 3, 1), W),
        ValueError,
        "bias must be (C,) with C = NAME.shape[1] = (3,), got (1, 3, 1)",
    ),
    "bias_integer": ((X, C, C.long(), W), TypeError, "bias must be a floating-point tensor, got int64"),
    "bias_device": (
        (X, C, C.to("meta"), W),
        ValueError,
        f"bias must be on the device of the data, {X.device}, got meta",
    ),
    "weight_shape": (
        (X, C, C, torch.eye(4)),
        ValueError,
        "weight must be (C, C) with C = NAME.shape[1] = (3, 3), got (4, 4)",
    ),
    "weight_convolution": (
        (X, C, C, W[..., None, None]),
        ValueError,
        "weight must be (C, C) with C = NAME.shape[1] = (3, 3), got (3, 3, 1, 1)",
    ),
    "weight_complex": ((X, C, C, W.cfloat()), TypeError, "weight must be a floating-point tensor, got complex64"),
    "weight_device": (
        (X, C, C, W.to("meta")),
        ValueError,
        f"weight must be on the device of the data, {X.device}, got meta",
    ),
    "weight_log_det_number": ((X, C, C, W, 0.0), TypeError, "weight_log_det must be a tensor, got float"),
    "weight_log_det_shape": (
        (X, C, C, W, torch.zeros(1)),
        ValueError,
        "weight_log_det must be a tensor of one element and shape = (), got (1,)",
    ),
}


@pytest.mark.parametrize("channels", [0, 513])
def test_the_native_library_itself_refuses_what_it_has_no_kernels_for(channels):
    TestProperties().require_native()
    parameters = torch.zeros(channels), torch.zeros(channels), torch.eye(channels), None
    for function, *data in (("forward", torch.zeros(1, channels, 2)), ("fold",)):
        operator = getattr(torch.ops.glow_kernels, f"actnorm_conv1x1_{function}_native")
        with pytest.raises(RuntimeError, match=f"takes 1 to 512 channels, got {channels}"):
            operator(*data, *parameters)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("apply", (X, torch.eye(4), C), "matrix must be"),
        ("forward", (X, torch.zeros(4), C, W, None), "do not agree"),
        ("forward", (X, C.double(), C, W, None), "do not agree"),
        ("backward", (X, torch.zeros(3), X, C, C, W, None, True), "grad_log_det must be"),
        ("fold", (C, C, torch.zeros(3, 4), None), "weight must be"),
    ],
)
def test_the_native_library_itself_refuses_what_does_not_go_together(function, arguments, message):
    TestProperties().require_native()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.glow_kernels, f"actnorm_conv1x1_{function}_native")(*arguments)


@pytest.mark.parametrize(("direction", "name"), [("forward", "x"), ("inverse", "z")])
@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(direction, name, bad):
    arguments, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error) as caught:
        OPERATORS[direction](*arguments)
    assert str(caught.value) == message.replace("NAME", name)
