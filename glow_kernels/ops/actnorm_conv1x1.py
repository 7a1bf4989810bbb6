"""ActNorm and the invertible 1x1 convolution: one linear map per position.

ActNorm ``a = s * (x + b)`` with ``s = exp(log_scale)``, followed by ``z = W a``, is ``z = M x + v`` with
``M = W diag(s)`` and ``v = M b`` (Kingma and Dhariwal, "Glow", 2018, sections 3.1 and 3.2). The work has two parts:

* *folding*, C x C work that does not depend on the batch: ``M``, ``v``, ``M^-1`` and, per position,
  ``log_det = sum(log_scale) + log|det W|``;
* *applying*, one pass over the data.

Backward of applying, with ``g = dL/dz``: ``dx = M^T g``, ``dM = sum_{b,p} g x^T``, ``dv = sum_{b,p} g``. The reversible
backward computes these in one pass over the output ``z``, from which it computes ``x = M^-1 z - b`` on the fly.

The LU-decomposed W (also section 3.2) is assembled by :func:`glow_kernels.ops.folding.lu_weight`.

Backward of folding, with ``A = dL/dM + dL/dv b^T`` and ``l = dL/dlog_det``:
``dW = A diag(s) + l W^-T``, ``dlog_scale_j = s_j sum_i W_ij A_ij + l``, ``db = M^T dL/dv``.

Backward of assembling, with ``A = P^T dL/dW``: ``dL = A (U + diag(s))^T`` below the diagonal, ``dU = L^T A`` above it,
and ``dlog|s_j| = s_j (L^T A)_jj + l``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_image, check_like, positions
from glow_kernels.ops._registry import Operator
from glow_kernels.ops.folding import (
    PARAMETERS,
    _fold_backward,
    _fold_backward_fake,
    _fold_inverse_backward,
    fold,
    fold_inverse,
    invertible,
)


def actnorm_conv1x1(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ActNorm followed by an invertible 1x1 convolution: ``z = W (exp(log_scale) * (x + bias))``.

    Arithmetic is in float32 (float64 for float64 ``x``), even under autocast; C x C work is in float64.

    Args:
        x: ``(B, C, *spatial)`` with 0 to 3 spatial dimensions, any floating-point type.
        log_scale: ``(C,)``, logarithm of the scale of ActNorm.
        bias: ``(C,)``, added before scaling.
        weight: ``(C, C)``, the matrix W.
        weight_log_det: ``log|det W|`` as a tensor with shape ``()``, if known, as for an LU-decomposed W. The gradient
            of the log-determinant then goes to this tensor instead of ``weight``. By default computed from ``weight``.

    Returns:
        ``z`` with the shape and type of ``x``, and ``log_det`` ``(B,)`` of the map x -> z, float32 or float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
    """
    _check("x", x, log_scale, bias, weight, weight_log_det)
    z, log_det = _forward(x, *_in_compute_dtype(x, log_scale, bias, weight, weight_log_det))
    return z, log_det


def actnorm_conv1x1_inverse(
    z: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`actnorm_conv1x1`: ``x = exp(-log_scale) * (W^-1 z) - bias``.

    The inverse of W is computed in float64 and then rounded. Unlike in the forward, a ``weight`` in float64 is not
    rounded before: that would change the inverse by as many ulps as the condition number of W.

    Args:
        z: ``(B, C, *spatial)``; the other arguments as for :func:`actnorm_conv1x1`.

    Returns:
        ``x`` with the shape and type of ``z``, and ``log_det`` ``(B,)`` of the map z -> x.

    Raises:
        TypeError, ValueError: as for :func:`actnorm_conv1x1`; also if ``weight`` is singular. Kernels on a GPU do not
            check that, since it would wait for the device: there ``log_det`` is infinite and ``x`` not finite.
    """
    _check("z", z, log_scale, bias, weight, weight_log_det)
    dtype = compute_dtype(z)
    if weight.dtype == torch.float64 != dtype:
        parameters = (log_scale.double(), bias.double(), weight)
        folded = fold_inverse(*parameters, None if weight_log_det is None else weight_log_det.double())
        matrix, shift, log_det = (tensor.to(dtype) for tensor in folded)
        return _apply(z, matrix, shift), log_det.expand(z.shape[0]) * positions(z)
    x, log_det = invertible(_inverse, z, *_in_compute_dtype(z, log_scale, bias, weight, weight_log_det))
    return x, log_det


def actnorm_conv1x1_reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Invert and differentiate :func:`actnorm_conv1x1` in one pass over the data, given its output.

    Args:
        grad: ``(B, C, *spatial)``, gradient of the output ``z``, of its type.
        grad_log_det: ``(B,)``, gradient of ``log_det``.
        z: ``(B, C, *spatial)``, the output; the other arguments as for :func:`actnorm_conv1x1`.

    Returns:
        The input ``x``, its gradient, and the gradients of ``log_scale``, ``bias``, ``weight`` and, if it was given,
        ``weight_log_det``. They cannot be differentiated again.

    Raises:
        TypeError, ValueError: as for :func:`actnorm_conv1x1`; also if ``weight`` is singular. Kernels on a GPU do not
            check that, since it would wait for the device: there ``x`` is not finite.
    """
    _check("z", z, log_scale, bias, weight, weight_log_det)
    check_like("grad", grad, z.shape, "the shape of z", z)
    check_like("grad_log_det", grad_log_det, z.shape[:1], "(B,) with B = z.shape[0]", z)
    parameters = _in_compute_dtype(z, log_scale, bias, weight, weight_log_det)
    grads_of_results = grad.to(z.dtype), grad_log_det.to(compute_dtype(z))
    x, grad_x, *grads = invertible(_reversible_backward, *grads_of_results, z, *parameters)
    grad_log_scale, grad_bias, grad_weight, grad_weight_log_det = (
        None if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(grads, (log_scale, bias, weight, weight_log_det), strict=True)
    )
    return x, grad_x, grad_log_scale, grad_bias, grad_weight, grad_weight_log_det  # type: ignore[return-value]


def apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z = M x + v`` at every position of ``x`` (B, C, *spatial), for a caller that has folded M and v.

    They must be results of :func:`glow_kernels.ops.folding.fold` in the type of arithmetic for ``x``; not checked here.
    """
    z: Tensor = _apply(x, matrix, shift)
    return z


def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`apply` in ``x`` (empty if not needed), ``matrix`` and ``shift``, without a graph."""
    grad_x, grad_matrix, grad_shift = _apply_backward(grad.to(x.dtype), x, matrix, needs_grad_x)
    return grad_x, grad_matrix, grad_shift


def apply_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x`` of :func:`apply`, its gradient, and those of ``matrix`` and ``shift``, in one pass."""
    x, grad_x, grad_matrix, grad_shift = _apply_reversible_backward(grad.to(z.dtype), z, matrix, inverse, inverse_shift)
    return x, grad_x, grad_matrix, grad_shift


def _check(
    name: str, x: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> None:
    check_image(name, x)
    channels = x.shape[1]
    meaning = f"(C,) with C = {name}.shape[1]"
    check_like("log_scale", log_scale, (channels,), meaning, x)
    check_like("bias", bias, (channels,), meaning, x)
    check_like("weight", weight, (channels, channels), f"(C, C) with C = {name}.shape[1]", x)
    if weight_log_det is not None:
        check_like("weight_log_det", weight_log_det, (), "a tensor of one element and shape", x)


def _in_compute_dtype(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = compute_dtype(x)
    # Checking first is cheaper than a conversion that does nothing.
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _composed_forward(x: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    matrix, shift, log_det = fold(*parameters)
    return _apply(x, matrix, shift), log_det.expand(x.shape[0]) * positions(x)


def _composed_inverse(z: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
    matrix, shift, log_det = fold_inverse(*parameters)
    return _apply(z, matrix, shift), log_det.expand(z.shape[0]) * positions(z)


def _composed_backward(
    folding: Callable[..., Any],
    folding_backward: Callable[..., Any],
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *parameters, needs_grad_x = arguments
    matrix, _, _ = folding(*parameters)
    grad_x, *grad_folded = _apply_backward(grad, x, matrix, needs_grad_x)
    return grad_x, *folding_backward(*grad_folded, positions(x) * grad_log_det.sum(), *parameters)


def _composed_reversible_backward(
    grad: Tensor, grad_log_det: Tensor, z: Tensor, *parameters: Any
) -> tuple[Tensor, ...]:
    matrix, _, _ = fold(*parameters)
    inverse, inverse_shift, _ = fold_inverse(*parameters)
    x, grad_x, *grad_folded = _apply_reversible_backward(grad, z, matrix, inverse, inverse_shift)
    return x, grad_x, *_fold_backward(*grad_folded, positions(z) * grad_log_det.sum(), *parameters)


def _fake(x: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=output_format(x)), x.new_empty(x.shape[0], dtype=compute_dtype(x))


def _backward_fake(
    grad: Tensor, grad_log_det: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *parameters, needs_grad_x = arguments
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    return grad_x, *_fold_backward_fake(grad, grad, grad_log_det, *parameters)


def _reversible_backward_fake(grad: Tensor, grad_log_det: Tensor, z: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    x = torch.empty_like(z, memory_format=output_format(z))
    return x, *_backward_fake(grad, grad_log_det, z, *parameters, True)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _forward_rule(backend: str, ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _backward.on, backend, grad, grad_log_det)


def _inverse_rule(backend: str, ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _inverse_backward.on, backend, grad, grad_log_det)


def _gradients(ctx: Any, operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
    # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
    saved, needs_grad_x = ctx.saved_tensors, ctx.needs_input_grad[0]
    grad_x, *grads = operator(*arguments, *saved, needs_grad_x)
    return grad_x if needs_grad_x else None, *grads[:3], None if saved[4] is None else grads[3]


def _apply_fake(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))


def _apply_backward_fake(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(matrix, memory_format=torch.contiguous_format), matrix.new_empty(x.shape[1])


def _apply_reversible_backward_fake(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty_like(z, memory_format=output_format(z))
    return x, *_apply_backward_fake(grad, z, matrix, True)


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, matrix, _ = inputs
    ctx.save_for_backward(x, matrix)


def _apply_rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, matrix = ctx.saved_tensors
    needs_grad_x = ctx.needs_input_grad[0]
    grad_x, grad_matrix, grad_shift = _apply_backward.on(backend, grad, x, matrix, needs_grad_x)
    return grad_x if needs_grad_x else None, grad_matrix, grad_shift


_MODULE = "actnorm_conv1x1"

_apply = Operator(
    _MODULE,
    "apply",
    "(Tensor x, Tensor matrix, Tensor shift) -> Tensor",
    fake=_apply_fake,
    setup_context=_apply_setup,
    backward=_apply_rule,
)
_apply_backward = Operator(
    _MODULE,
    "apply_backward",
    "(Tensor grad, Tensor x, Tensor matrix, bool needs_grad_x) -> (Tensor, Tensor, Tensor)",
    fake=_apply_backward_fake,
    plain_reference=True,
)
_apply_reversible_backward = Operator(
    _MODULE,
    "apply_reversible_backward",
    "(Tensor grad, Tensor z, Tensor matrix, Tensor inverse, Tensor inverse_shift) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_apply_reversible_backward_fake,
)

# Folding and applying in one call, for backends that implement it.
_GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"
_BACKWARD_SCHEMA = f"(Tensor grad, Tensor grad_log_det, Tensor x, {PARAMETERS}, bool needs_grad_x) -> ({_GRADS})"

_forward = Operator(
    _MODULE,
    "forward",
    f"(Tensor x, {PARAMETERS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_forward_rule,
    composed=_composed_forward,
)
_inverse = Operator(
    _MODULE,
    "inverse",
    f"(Tensor z, {PARAMETERS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_inverse_rule,
    composed=_composed_inverse,
)
_backward = Operator(
    _MODULE,
    "backward",
    _BACKWARD_SCHEMA,
    fake=_backward_fake,
    composed=functools.partial(_composed_backward, fold, _fold_backward),
)
_inverse_backward = Operator(
    _MODULE,
    "inverse_backward",
    _BACKWARD_SCHEMA,
    fake=_backward_fake,
    composed=functools.partial(_composed_backward, fold_inverse, _fold_inverse_backward),
)
_reversible_backward = Operator(
    _MODULE,
    "reversible_backward",
    f"(Tensor grad, Tensor grad_log_det, Tensor z, {PARAMETERS}) -> (Tensor, {_GRADS})",
    fake=_reversible_backward_fake,
    composed=_composed_reversible_backward,
)
