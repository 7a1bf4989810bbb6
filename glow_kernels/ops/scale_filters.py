"""Weight and bias of a convolution whose output is scaled by a learned number per channel.

``s conv(x, W, b) = conv(x, s W, s b)`` with ``s = exp(factor * log_scale)``: instead of a pass over the output, the
scale is folded into the filters, which are far smaller. This covers ActNorm after a convolution,
``exp(log_scale) * (conv(x) + b)``, and the scale of the convolution that starts at zero, ``exp(3 log_scale) * conv(x)``
(Kingma and Dhariwal, "Glow", 2018, section 4 and its published code). The results have the type of the convolution, so
master weights are converted in the same pass.

Backward, with ``g = dL/d(s W)`` and ``h = dL/d(s b)``: ``dW = s g``, ``db = s h``,
``dlog_scale = factor s (sum W g + b h)``, summed over all but the first dimension.

:func:`scale_all` and its backward include work that would take separate launches: they pad the filters with zeros for
convolutions that are faster with more channels, and add up the partial sums of bias gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, empty_filters, output_format
from glow_kernels.ops._checks import check_image, check_like, check_number
from glow_kernels.ops._registry import Operator


def scale_filters(
    weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``exp(factor * log_scale)`` times ``weight`` and ``bias``.

    Args:
        weight: ``(O, I, *kernel)`` of a convolution with 0 to 3 spatial dimensions, any floating-point type.
        bias, log_scale: ``(O,)``, any floating-point type.
        factor: factor of ``log_scale``.
        dtype: type of the results, by default that of ``weight``.

    Returns:
        The scaled weight and bias, with the shapes of ``weight`` and ``bias``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    check_image("weight", weight)
    check_like("bias", bias, weight.shape[:1], "(O,) with O = weight.shape[0]", weight)
    check_like("log_scale", log_scale, weight.shape[:1], "(O,) with O = weight.shape[0]", weight)
    check_number("factor", factor)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type, got {dtype!r}")
    scaled_weight, scaled_bias = _forward(weight, bias, log_scale, factor, dtype or weight.dtype)
    return scaled_weight, scaled_bias


def scale_all(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    factors: Sequence[float],
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """:func:`scale_filters` of several convolutions at once; not differentiable.

    For callers that define their own derivative and have checked the parameters.

    Args:
        weights: ``(O, I, *kernel)`` of every convolution, at least one; all of one type.
        biases, log_scales: ``(O,)`` of every convolution, of the type of the weights.
        factors: factor of ``log_scale`` for every convolution.
        dtype: type of the results.
        sizes: ``(O', I')`` of the results of every convolution, padded with zeros; by default its own ``(O, I)``.

    Returns:
        Scaled weight ``(O', I', *kernel)`` and bias ``(O',)`` of the first convolution, of the second, and so on.

    Raises:
        ValueError: the lists are empty or not of the same length, or a size is smaller than the weight.
    """
    _check_counts(weights, biases, log_scales, factors)
    flat = [size for weight in weights for size in weight.shape[:2]]
    if sizes is not None:
        _check_counts(weights, sizes)
        wanted = [size for pair in sizes for size in pair]
        if any(size < own for size, own in zip(wanted, flat, strict=True)):
            raise ValueError(f"sizes must be at least (O, I) of every weight, {flat}, got {wanted}")
        flat = wanted
    filters = (list(weights), list(biases), list(log_scales), list(factors))
    results: list[Tensor] = _forward_all(*filters, dtype, flat)
    return results


def scale_all_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    factors: Sequence[float],
) -> list[Tensor]:
    """Gradients of :func:`scale_all`; the arguments after ``grads`` are the same.

    Args:
        grads: gradients of all results of :func:`scale_all`, in their order and shapes. Those of the weights have the
            type of the results. That of a bias may instead have the type of arithmetic, and be ``(parts, O')``, which
            is summed over the parts.

    Returns:
        The gradients of the first weight (in the type of the weight), bias and ``log_scale`` (in the type of
        arithmetic, float32 or float64), then those of the second convolution, and so on.

    Raises:
        ValueError: as for :func:`scale_all`, or there are not two ``grads`` for every weight.
    """
    _check_counts(weights, biases, log_scales, factors)
    if len(grads) != 2 * len(weights):
        raise ValueError(f"grads must be two per weight, {2 * len(weights)}, got {len(grads)}")
    filters = (list(weights), list(biases), list(log_scales), list(factors))
    results: list[Tensor] = _backward_all(list(grads), *filters)
    return results


def _check_counts(*lists: Sequence[Any]) -> None:
    count = len(lists[0])
    for each in lists:
        if len(each) != count or count == 0:
            counts = [len(each) for each in lists]
            raise ValueError(
                f"weights, biases, log_scales and factors must have one length of at least 1, got {counts}"
            )


def _fake(weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(weight, dtype=dtype, memory_format=output_format(weight))
    return result, weight.new_empty(weight.shape[0], dtype=dtype)


def _backward_fake(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = [weight.new_empty(weight.shape[0], dtype=compute_dtype(weight)) for _ in range(2)]
    return torch.empty_like(weight, memory_format=output_format(weight)), vectors[0], vectors[1]


def _fake_all(
    weights: list[Tensor],
    biases: list[Tensor],
    log_scales: list[Tensor],
    factors: list[float],
    dtype: torch.dtype,
    sizes: list[int],
) -> list[Tensor]:
    results = []
    for weight, count, channels in zip(weights, sizes[::2], sizes[1::2], strict=True):
        results += [empty_filters(weight, count, channels, dtype), weight.new_empty(count, dtype=dtype)]
    return results


def _backward_fake_all(
    grads: list[Tensor], weights: list[Tensor], biases: list[Tensor], log_scales: list[Tensor], factors: list[float]
) -> list[Tensor]:
    filters = zip(grads[::2], grads[1::2], weights, biases, log_scales, factors, strict=True)
    return [result for each in filters for result in _backward_fake(*each)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.factor, _ = inputs
    ctx.save_for_backward(*tensors)


def _rule(backend: str, ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
    weight, bias, log_scale = ctx.saved_tensors
    arguments = (grad_weight, grad_bias, weight, bias, log_scale, ctx.factor)
    grad_weight, grad_bias, grad_log_scale = _backward.on(backend, *arguments)
    return grad_weight, grad_bias.to(bias.dtype), grad_log_scale.to(log_scale.dtype), None, None


_forward = Operator(
    "scale_filters",
    "forward",
    "(Tensor weight, Tensor bias, Tensor log_scale, float factor, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_rule,
)
_backward = Operator(
    "scale_filters",
    "backward",
    "(Tensor grad_weight, Tensor grad_bias, Tensor weight, Tensor bias, Tensor log_scale, float factor)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    plain_reference=True,
)
_forward_all = Operator(
    "scale_filters",
    "forward_all",
    "(Tensor[] weights, Tensor[] biases, Tensor[] log_scales, float[] factors, ScalarType dtype, int[] sizes)"
    " -> Tensor[]",
    fake=_fake_all,
    plain_reference=True,
)
_backward_all = Operator(
    "scale_filters",
    "backward_all",
    "(Tensor[] grads, Tensor[] weights, Tensor[] biases, Tensor[] log_scales, float[] factors) -> Tensor[]",
    fake=_backward_fake_all,
    plain_reference=True,
)
