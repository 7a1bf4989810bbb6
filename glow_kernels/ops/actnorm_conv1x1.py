"""ActNorm and the invertible 1x1 convolution: one linear map per position.

ActNorm ``a = s * (x + b)`` with ``s = exp(log_scale)``, followed by ``z = W a``, is ``z = M x + v`` with
``M = W diag(s)`` and ``v = M b`` (Kingma and Dhariwal, "Glow", 2018, sections 3.1 and 3.2). So there are two halves:

* *folding*, C x C work that does not depend on the batch: ``M``, ``v``, ``M^-1`` and, per position,
  ``log_det = sum(log_scale) + log|det W|``;
* *applying*, one pass over the data.

Backward of applying, with ``g = dL/dz``: ``dx = M^T g``, ``dM = sum_{b,p} g x^T``, ``dv = sum_{b,p} g``.

Backward of folding, with ``A = dL/dM + dL/dv b^T`` and ``l = dL/dlog_det``:
``dW = A diag(s) + l W^-T``, ``dlog_scale_j = s_j sum_i W_ij A_ij + l``, ``db = M^T dL/dv``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_image, check_like, positions
from glow_kernels.ops._registry import Operator, register_backward


def actnorm_conv1x1(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ActNorm followed by an invertible 1x1 convolution: ``z = W (exp(log_scale) * (x + bias))``.

    Arithmetic is in float32 (float64 for float64 ``x``), also under autocast; C x C work is in float64.

    Args:
        x: ``(B, C, *spatial)`` with 0 to 3 spatial dimensions, any floating-point type.
        log_scale: ``(C,)``, logarithm of the scale of ActNorm.
        bias: ``(C,)``, added before scaling.
        weight: ``(C, C)``, the matrix W.
        weight_log_det: ``log|det W|``, a tensor of one element, if it is known, as it is for an LU-decomposed W; it is
            computed from ``weight`` otherwise. Its gradient goes to this tensor instead of ``weight``.

    Returns:
        ``z`` with the shape and type of ``x``, and ``log_det`` ``(B,)`` of the map x -> z, float32 or float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message says which.
    """
    _check("x", x, log_scale, bias, weight, weight_log_det)
    matrix, shift, log_det = _fold(*_in_compute_dtype(x, log_scale, bias, weight, weight_log_det))
    return _apply(x, matrix, shift), (positions(x) * log_det).repeat(x.shape[0])


def actnorm_conv1x1_inverse(
    z: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`actnorm_conv1x1`: ``x = exp(-log_scale) * (W^-1 z) - bias``.

    The inverse of W is computed in float64 and then rounded.

    Args:
        z: ``(B, C, *spatial)``; the other arguments as for :func:`actnorm_conv1x1`.

    Returns:
        ``x`` with the shape and type of ``z``, and ``log_det`` ``(B,)`` of the map z -> x.

    Raises:
        TypeError, ValueError: as for :func:`actnorm_conv1x1`; also if ``weight`` is singular.
    """
    _check("z", z, log_scale, bias, weight, weight_log_det)
    matrix, shift, log_det = _fold_inverse(*_in_compute_dtype(z, log_scale, bias, weight, weight_log_det))
    return _apply(z, matrix, shift), (positions(z) * log_det).repeat(z.shape[0])


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
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def _fold_fake(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    log_det = log_scale.new_empty(log_scale.shape[:-1])
    return (
        torch.empty_like(weight, memory_format=contiguous),
        torch.empty_like(bias, memory_format=contiguous),
        log_det,
    )


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _fold_backward(backend: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(backend.fold_backward(*grads, *ctx.saved_tensors))


def _fold_inverse_backward(backend: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(backend.fold_inverse_backward(*grads, *ctx.saved_tensors))


def _apply_fake(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))


def _apply_backward_fake(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(matrix, memory_format=torch.contiguous_format), matrix.new_empty(x.shape[1])


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, matrix, _ = inputs
    ctx.save_for_backward(x, matrix)


def _apply_backward(backend: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, matrix = ctx.saved_tensors
    return tuple(backend.apply_backward(grad, x, matrix, ctx.needs_input_grad[0]))


# Leading dimensions, written (*K), fold many steps in one call.
_FOLD_SCHEMA = "(Tensor log_scale, Tensor bias, Tensor weight, Tensor? weight_log_det) -> (Tensor, Tensor, Tensor)"
_MODULE = "actnorm_conv1x1"

_fold = Operator(
    _MODULE,
    "fold",
    _FOLD_SCHEMA,
    fake=_fold_fake,
    setup_context=_fold_setup,
    backward=_fold_backward,
)
_fold_inverse = Operator(
    _MODULE,
    "fold_inverse",
    _FOLD_SCHEMA,
    fake=_fold_fake,
    setup_context=_fold_setup,
    backward=_fold_inverse_backward,
)
_apply = Operator(
    _MODULE,
    "apply",
    "(Tensor x, Tensor matrix, Tensor shift) -> Tensor",
    fake=_apply_fake,
    setup_context=_apply_setup,
    backward=_apply_backward,
    native=True,
)
register_backward(
    "actnorm_conv1x1_apply_backward_native",
    "(Tensor grad, Tensor x, Tensor matrix, bool needs_grad_x) -> (Tensor, Tensor, Tensor)",
    _apply_backward_fake,
)
