"""Filters times a learned scale, on every backend that can run here.

Proven against the plain product in float64, values and gradients. In the properties, the data are a weight
(O, I, *kernel), and bias and scale have one element per filter.
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
    assert_accurate,
    check_gradients,
    check_results,
    combinations,
    in_layout,
    unit_of_sum,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops import scale_filters
from glow_kernels.ops.scale_filters import scale_all, scale_all_backward


def plain(weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Filters and bias that scale a convolution's output by ``exp(factor * log_scale)``."""
    scale = torch.exp(factor * log_scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), bias * scale


def inputs(shape) -> tuple[Tensor, ...]:
    draw = functools.partial(torch.randn, dtype=torch.float64)
    return draw(tuple(shape)), draw(shape[0]), 0.5 * draw(shape[0])


def case(factor: float) -> Case:
    """The operator with one factor."""
    operator, formula = (functools.partial(function, factor=factor) for function in (scale_filters, plain))
    return Case(f"factor_{factor:g}", operator, formula, inputs, types=(0, 0))


CASES = [case(1.0), case(3.0)]


def forward_arguments(shape, lay):
    """Arguments of the registered operator."""
    vectors = [torch.randn(shape[0]).requires_grad_() for _ in range(2)]
    return lay(torch.randn(tuple(shape))).requires_grad_(), *vectors, 3.0, torch.float32


def backward_arguments(shape, lay):
    """Arguments of the registered backward, which has no derivative itself."""
    weight = lay(torch.randn(tuple(shape)))
    bias, log_scale, grad_bias = (torch.randn(shape[0]).to(compute_dtype(weight)) for _ in range(3))
    return torch.randn(tuple(shape)), grad_bias, weight, bias, log_scale, 3.0


def forward_all_arguments(shape, lay, zeros=0):
    """Arguments for two convolutions with factors 3 and 1, padded by ``zeros`` channels and filters."""
    weights = [lay(torch.randn(tuple(shape))), torch.randn(5, 3, 2).to(lay(torch.zeros(1, 1)).dtype)]
    biases, log_scales = ([torch.randn(len(weight)).to(weight.dtype) for weight in weights] for _ in range(2))
    sizes = [size + zeros for weight in weights for size in weight.shape[:2]]
    return weights, biases, log_scales, [3.0, 1.0], weights[0].dtype, sizes


def backward_all_arguments(shape, lay):
    """Arguments of the backward for two convolutions."""
    *filters, factors, dtype, _ = forward_all_arguments(shape, lay)
    grads = [grad for weight in filters[0] for grad in (weight.clone(), torch.randn(len(weight)).to(dtype))]
    return grads, *filters, factors


def dense(arguments):
    """Dense float32 arguments: ``support.py`` gives native kernels dense ones, of float32 or float64 on the CPU."""

    def of_shape(shape, lay):
        found = arguments(shape, lay)
        whole = [arg for arg in tree_leaves(found) if isinstance(arg, Tensor) and arg.dim() > 1]
        format_ = output_format(next(arg for arg in reversed(whole) if arg.shape == torch.Size(shape)))

        def prepare(arg):
            if isinstance(arg, torch.dtype):
                return torch.float32
            if not isinstance(arg, Tensor):
                return arg
            like_data = arg.shape == torch.Size(shape) and arg.dim() > 1
            return arg.detach().float().contiguous(memory_format=format_ if like_data else torch.contiguous_format)

        return tree_map(prepare, found)

    return of_shape


class TestProperties(DifferentiableProperties):
    """Properties of every differentiable operator."""

    module = "scale_filters"
    arguments: ClassVar = {
        "forward": forward_arguments,
        "backward": backward_arguments,
        "forward_all": functools.partial(forward_all_arguments, zeros=2),
        "backward_all": backward_all_arguments,
        "forward_native": dense(forward_arguments),
        "backward_native": dense(backward_arguments),
        "forward_all_native": dense(forward_all_arguments),
        "backward_all_native": dense(backward_all_arguments),
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


def test_vectors_may_lie_anywhere_in_memory(backend):
    weight, *vectors = CASES[1].draw((5, 4, 3))
    apart = [weight, *(vector.repeat_interleave(2)[::2] for vector in vectors)]
    check_results(CASES[1], apart)
    check_gradients(CASES[1], apart, [torch.randn(5, 4, 3), torch.randn(5, 2)[:, 0]])


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
        ((torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), torch.ones(())), "factor must be a number, got tensor"),
        ((torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), 1.0, torch.int32), "dtype must be a floating-point type"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scale_filters(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("forward_all", lambda w, v: ([w], [v], [v], [1.0], w.dtype, [4, 8]), "filters get no zeros"),
        ("forward", lambda w, v: (w, v, v, 1.0, torch.float64), "dtype must be that of weight"),
        ("forward", lambda w, v: (w.mT, v, v, 1.0, w.dtype), "weight must .* be contiguous or channels last"),
        ("backward", lambda w, v: (w.mT, v, w, v, v, 1.0), "grad_weight must .* be contiguous or channels last"),
        ("backward", lambda w, v: (w, v[1:], w, v, v, 1.0), "grad_bias must .* a number for every filter"),
    ],
)
def test_the_native_library_itself_refuses_what_it_has_no_kernels_for(function, arguments, message):
    TestProperties().require_native()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.glow_kernels, f"scale_filters_{function}_native")(
            *arguments(torch.zeros(4, 4, 3, 3), torch.zeros(4))
        )


# One convolution, the three of a network whose last has large filters, and seven: vectors, nothing, odd sizes.
SEVERAL = {
    "one": [(7, 5, 3, 3)],
    "network": [(16, 6, 3, 3), (16, 64, 1, 1), (3, 512, 3, 3)],
    "seven": [(5, 2), (3, 0, 2, 2), (0, 3, 3, 3), (4, 5, 3, 3), (2, 601, 3), (1, 1, 1, 1), (9, 33, 2, 1, 1)],
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("shapes", "types", "channels_last"), combinations(list(SEVERAL), list(DTYPES), [False, True]), ids=str
)
def test_several_convolutions_at_once(backend, shapes, types, channels_last):
    dtype, result = DTYPES[types]
    drawn = [inputs(shape) for shape in SEVERAL[shapes]]
    if channels_last:
        drawn = [(weight.to(memory_format=torch.channels_last) if weight.dim() == 4 else weight, *vectors)
                 for weight, *vectors in drawn]  # fmt: skip
    filters = [[tensor.to(dtype) for tensor in each] for each in drawn]
    factors = [1.0, 3.0, 0.3, -1.0, 2.0, 1.0, 3.0][: len(filters)]
    lists = [list(each) for each in zip(*filters, strict=True)]
    results = scale_all(*lists, factors, result)
    assert len(results) == 2 * len(filters)
    grads = [torch.randn_like(each) for each in results]
    grads[1::4] = [grad.to(compute_dtype(lists[0][0])) for grad in grads[1::4]]
    actual = scale_all_backward(tuple(grads), *map(tuple, lists), factors)
    assert len(actual) == 3 * len(filters)
    for index, (each, factor) in enumerate(zip(filters, factors, strict=True)):
        format_, weight = output_format(each[0]), each[0]
        ours, of_ours = results[2 * index :][:2], grads[2 * index :][:2]
        assert ours[0].is_contiguous(memory_format=format_)
        truths = plain(*(tensor.double() for tensor in each), factor)
        for one, truth, eager in zip(ours, truths, plain(*(tensor.to(result) for tensor in each), factor), strict=True):
            assert one.dtype == result
            assert_accurate(one, truth, eager, f"result of {index}")
        derived = actual[3 * index :][:3]
        assert derived[0].is_contiguous(memory_format=format_)
        assert [grad.dtype for grad in derived] == [dtype, *[compute_dtype(weight)] * 2]
        wide, eager = (
            derivatives(each, of_ours, factor, precision) for precision in (torch.float64, compute_dtype(weight))
        )
        for grad, truth, naive in zip(derived, wide, eager, strict=True):
            assert_accurate(grad, truth, naive.to(grad.dtype), f"gradient of {index}", unit_of_sum(grad, weight, 1.0))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("types", "parts"), combinations(list(DTYPES), [0, 1, 2, 97]))
def test_zeros_follow_and_parts_are_added(backend, types, parts, channels_last):
    dtype, result = DTYPES[types]
    shapes, sizes = [(16, 6, 3, 3), (9, 40, 1, 1), (3, 70, 3, 3), (5, 1, 2, 2)], [(16, 16), (9, 40), (8, 72), (7, 4)]
    filters = [[tensor.to(dtype) for tensor in inputs(shape)] for shape in shapes]
    if channels_last:
        filters = [[weight.to(memory_format=torch.channels_last), *vectors] for weight, *vectors in filters]
    lists, factors = [list(each) for each in zip(*filters, strict=True)], [1.0, 1.0, 3.0, 1.0]
    plain_results, results = (scale_all(*lists, factors, result, each) for each in (None, sizes))
    grads, of_padded = [], []
    for index, ((count, channels), shape) in enumerate(zip(sizes, shapes, strict=True)):
        scaled, own = results[2 * index], plain_results[2 * index]
        assert scaled.is_contiguous(memory_format=output_format(filters[index][0]))
        for one, other, whole in zip(results[2 * index :][:2], plain_results[2 * index :][:2],
                                     ((count, channels, *shape[2:]), (count,)), strict=True):  # fmt: skip
            assert one.shape == whole
            inside = tuple(map(slice, other.shape))
            torch.testing.assert_close(one[inside], other)
            assert one.count_nonzero() == other.count_nonzero()
        # Gradients of the padding must not count.
        grad = torch.full_like(scaled, torch.nan)
        grads += [torch.randn_like(own), torch.randn(max(parts, 1), shape[0]).to(compute_dtype(own))]
        grad[: shape[0], : shape[1]] = grads[-2]
        beyond = torch.full((max(parts, 1), count - shape[0]), torch.nan)
        of_padded += [grad, torch.cat((grads[-1], beyond.to(grads[-1].dtype)), 1)]
        grads[-1] = grads[-1].double().sum(0).to(grads[-1].dtype)
        if not parts:
            of_padded[-1] = of_padded[-1][0].to(result)
            grads[-1] = grads[-1].to(result)
    actual, expected = (scale_all_backward(each, *lists, factors) for each in (of_padded, grads))
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert index % 3 > 0 or one.is_contiguous(memory_format=output_format(filters[index // 3][0]))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def derivatives(filters, grads, factor, dtype):
    """Gradients of the plain formula in ``dtype``."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in filters]
    return torch.autograd.grad(plain(*leaves, factor), leaves, [grad.to(dtype) for grad in grads])


def test_scale_all_is_differentiable_by_the_reference_only(backend):
    lists = [
        [tensor.float().requires_grad_() for tensor in each]
        for each in zip(*map(inputs, [(3, 4), (2, 5)]), strict=True)
    ]
    results = scale_all(*lists, [1.0, 3.0], torch.float32)
    grads = [torch.randn_like(result) for result in results]
    leaves = [tensor for each in zip(*lists, strict=True) for tensor in each]
    if backend != "reference":
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            torch.autograd.grad(results, leaves, grads)
        return
    with torch.no_grad():
        expected = scale_all_backward(grads, *lists, [1.0, 3.0])
    for one, other in zip(torch.autograd.grad(results, leaves, grads), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_scale_all_needs_lists_of_one_length(backend):
    weight, vector = torch.zeros(2, 3), torch.zeros(2)
    for weights, factors in (([], []), ([weight], []), ([weight, weight], [1.0])):
        with pytest.raises(ValueError, match="factors must have one length of at least 1"):
            scale_all(weights, [vector], [vector], factors, torch.float32)
    with pytest.raises(ValueError, match="grads must be two per weight, 2, got 1"):
        scale_all_backward([weight], [weight], [vector], [vector], [1.0])
    with pytest.raises(ValueError, match=r"sizes must be at least \(O, I\) of every weight, \[2, 3\], got \[2, 2\]"):
        scale_all([weight], [vector], [vector], [1.0], torch.float32, [(2, 2)])


def test_several_convolutions_compile_into_one_graph(backend):
    torch._dynamo.reset()

    def there_and_back(weights, biases, log_scales):
        scaled = scale_all(weights, biases, log_scales, [1.0, 3.0], torch.float32)
        return scale_all_backward(scaled, weights, biases, log_scales, [1.0, 3.0])

    drawn = [[tensor.float() for tensor in inputs(shape)] for shape in [(4, 3, 3, 3), (2, 5)]]
    lists = [list(each) for each in zip(*drawn, strict=True)]
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*lists), there_and_back(*lists), strict=True):
        assert torch.equal(one, other)
