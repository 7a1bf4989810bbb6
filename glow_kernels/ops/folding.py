"""The C x C half of ``actnorm_conv1x1``: folding ActNorm and convolution into one matrix, and assembling W.

The mathematics is in :mod:`glow_kernels.ops.actnorm_conv1x1`. With leading dimensions ``(*K)``, one call folds many
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops._checks import check_floating, check_like
from glow_kernels.ops._registry import Operator


def lu_weight(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    """``W = P L (U + diag(s))`` and ``log|det W| = sum log|s|`` (Kingma and Dhariwal, "Glow", 2018, equation 10).

    With leading dimensions ``(*K)``, one call assembles many matrices. Arithmetic is in float64, even under autocast.

    Args:
        permutation: ``(*K, C, C)``, the matrix P, fixed.
        lower: ``(*K, C, C)``; its strictly lower triangle is that of L, whose diagonal is ones. The rest is ignored.
        upper: ``(*K, C, C)``; its strictly upper triangle is U. The rest is ignored.
        log_diagonal: ``(*K, C)``, ``log|s|``.
        diagonal_sign: ``(*K, C)``, the signs of s, fixed.

    Returns:
        ``weight`` ``(*K, C, C)`` and ``weight_log_det`` ``(*K)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    check_floating("lower", lower)
    if lower.dim() < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower must be (*K, C, C), got {tuple(lower.shape)}")
    check_like("permutation", permutation, lower.shape, "the shape of lower", lower)
    check_like("upper", upper, lower.shape, "the shape of lower", lower)
    check_like("log_diagonal", log_diagonal, lower.shape[:-1], "(*K, C) for this lower", lower)
    check_like("diagonal_sign", diagonal_sign, lower.shape[:-1], "(*K, C) for this lower", lower)
    dtype = compute_dtype(lower)
    weight, log_det = _lu(*(tensor.to(dtype) for tensor in (permutation, lower, upper, log_diagonal, diagonal_sign)))
    return weight, log_det


def lu_weight_backward(
    grad_weight: Tensor,
    grad_log_det: Tensor,
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    diagonal_sign: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`lu_weight` in ``lower``, ``upper`` and ``log_diagonal``, for a caller that keeps no graph.

    Args:
        grad_weight, grad_log_det: ``(*K, C, C)`` and ``(*K)``; the other arguments as for :func:`lu_weight`.

    Returns:
        Three tensors with the shapes and types of ``lower``, ``upper`` and ``log_diagonal``. They cannot be
        differentiated again.
    """
    dtype = compute_dtype(lower)
    factors = (permutation, lower, upper, log_diagonal, diagonal_sign)
    grads = _lu_backward(*(tensor.to(dtype) for tensor in (grad_weight, grad_log_det, *factors)))
    grad_lower, grad_upper, grad_log_diagonal = grads
    return grad_lower.to(lower.dtype), grad_upper.to(upper.dtype), grad_log_diagonal.to(log_diagonal.dtype)


def fold(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M ``(*K, C, C)``, shift v ``(*K, C)`` and log-determinant per position ``(*K)`` of x -> z.

    Args:
        log_scale, bias, weight, weight_log_det: ``(*K, C)``, ``(*K, C)``, ``(*K, C, C)`` and ``(*K)``, of one type;
            not checked here.
    """
    matrix, shift, log_det = _fold(log_scale, bias, weight, weight_log_det)
    return matrix, shift, log_det


def fold_inverse(
    log_scale: Tensor, bias: Tensor, weight: Tensor, weight_log_det: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix M^-1, shift -b and log-determinant of z -> x; arguments as for :func:`fold`.

    Raises:
        ValueError: a weight is singular.
    """
    matrix, shift, log_det = invertible(_fold_inverse, log_scale, bias, weight, weight_log_det)
    return matrix, shift, log_det


def invertible(operator: Callable[..., Any], *args: Any) -> Any:
    """``operator(*args)``, raising a ValueError if a weight is singular."""
    try:
        return operator(*args)
    except RuntimeError as error:  # the shared library cannot raise a ValueError
        message = str(error)
        if "weight must be invertible" not in message:
            raise
        raise ValueError(message[message.index("weight must") :]) from None


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


def _fold_backward_fake(
    grad_matrix: Tensor,
    grad_shift: Tensor,
    grad_log_det: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = 0 if weight_log_det is None else weight_log_det.shape
    inputs = (log_scale, bias, weight)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    return grads[0], grads[1], grads[2], weight.new_empty(size)


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _fold_rule(backend: str, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _fold_gradients(ctx, _fold_backward.on, backend, *grads)


def _fold_inverse_rule(backend: str, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _fold_gradients(ctx, _fold_inverse_backward.on, backend, *grads)


def _fold_gradients(ctx: Any, operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
    # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
    *parameters, weight_log_det = ctx.saved_tensors
    grads = operator(*arguments, *parameters, weight_log_det)
    return (*grads[:3], None if weight_log_det is None else grads[3])


def _lu_fake(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    weight = torch.empty_like(lower, memory_format=torch.contiguous_format)
    return weight, lower.new_empty(lower.shape[:-2])


def _lu_backward_fake(
    grad_weight: Tensor, grad_log_det: Tensor, permutation: Tensor, lower: Tensor, upper: Tensor, *diagonal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (lower, upper, diagonal[0])
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    return grads[0], grads[1], grads[2]


def _lu_rule(backend: str, ctx: Any, grad_weight: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return (None, *_lu_backward.on(backend, grad_weight, grad_log_det, *ctx.saved_tensors), None)


_MODULE = "actnorm_conv1x1"
# All have the same leading dimensions (*K), of the steps that one call folds.
PARAMETERS = "Tensor log_scale, Tensor bias, Tensor weight, Tensor? weight_log_det"
_FOLD_SCHEMA = f"({PARAMETERS}) -> (Tensor, Tensor, Tensor)"
# The last result is the gradient of weight_log_det, empty if there is none.
_FOLD_BACKWARD_SCHEMA = (
    f"(Tensor grad_matrix, Tensor grad_shift, Tensor grad_log_det, {PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)"
)

_LU = "Tensor permutation, Tensor lower, Tensor upper, Tensor log_diagonal, Tensor diagonal_sign"

_lu = Operator(
    _MODULE,
    "lu_weight",
    f"({_LU}) -> (Tensor, Tensor)",
    fake=_lu_fake,
    setup_context=_fold_setup,
    backward=_lu_rule,
)
_lu_backward = Operator(
    _MODULE,
    "lu_weight_backward",
    f"(Tensor grad_weight, Tensor grad_log_det, {_LU}) -> (Tensor, Tensor, Tensor)",
    fake=_lu_backward_fake,
    plain_reference=True,
)
_fold = Operator(
    _MODULE,
    "fold",
    _FOLD_SCHEMA,
    fake=_fold_fake,
    setup_context=_fold_setup,
    backward=_fold_rule,
)
_fold_backward = Operator(
    _MODULE,
    "fold_backward",
    _FOLD_BACKWARD_SCHEMA,
    fake=_fold_backward_fake,
    plain_reference=True,
)
_fold_inverse = Operator(
    _MODULE,
    "fold_inverse",
    _FOLD_SCHEMA,
    fake=_fold_fake,
    setup_context=_fold_setup,
    backward=_fold_inverse_rule,
)
_fold_inverse_backward = Operator(
    _MODULE,
    "fold_inverse_backward",
    _FOLD_BACKWARD_SCHEMA,
    fake=_fold_backward_fake,
    plain_reference=True,
)
