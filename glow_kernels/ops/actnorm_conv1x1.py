"""ActNorm and the invertible 1x1 convolution: one linear map per position.

ActNorm ``a = s * (x + b)`` with ``s = exp(log_scale)``, followed by ``z = W a``, is ``z = M x + v`` with
``M = W diag(s)`` and ``v = M b`` (Kingma and Dhariwal, "Glow", 2018, sections 3.1 and 3.2). So there are two halves:

* *folding*, C x C work that does not depend on the batch: ``M``, ``v``, ``M^-1`` and, per position,
  ``log_det = sum(log_scale) + log|det W|``;
* *applying*, one pass over the data.

Backward of applying, with ``g = dL/dz``: ``dx = M^T g``, ``dM = sum_{b,p} g x^T``, ``dv = sum_{b,p} g``. The reversible
backward does it in one pass from the output, with ``x = M^-1 z - b`` where it is needed.

The LU-decomposed W (section 3.2 there) is assembled by :func:`lu_weight`.

Backward of folding, with ``A = dL/dM + dL/dv b^T`` and ``l = dL/dlog_det``:
``dW = A diag(s) + l W^-T``, ``dlog_scale_j = s_j sum_i W_ij A_ij + l``, ``db = M^T dL/dv``. Of assembling, with
``A = P^T dL/dW``: ``dL = A (U + diag(s))^T`` below the diagonal, ``dU = L^T A`` above it, and
``dlog|s_j| = s_j (L^T A)_jj + l``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_image, check_like, positions
from glow_kernels.ops._registry import Operator


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
    return _apply(x, matrix, shift), log_det.expand(x.shape[0]) * positions(x)


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
    matrix, shift, log_det = _invert(*_in_compute_dtype(z, log_scale, bias, weight, weight_log_det))
    return _apply(z, matrix, shift), log_det.expand(z.shape[0]) * positions(z)


def actnorm_conv1x1_reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    weight_log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Undo and differentiate :func:`actnorm_conv1x1` in one pass over the data, from its output.

    Args:
        grad: ``(B, C, *spatial)``, gradient of the output ``z``, of its type.
        grad_log_det: ``(B,)``, gradient of ``log_det``.
        z: ``(B, C, *spatial)``, the output; the other arguments as for :func:`actnorm_conv1x1`.

    Returns:
        The input ``x``, its gradient, and the gradients of ``log_scale``, ``bias``, ``weight`` and, if it was given,
        ``weight_log_det``. They cannot be differentiated again.

    Raises:
        TypeError, ValueError: as for :func:`actnorm_conv1x1`; also if ``weight`` is singular.
    """
    _check("z", z, log_scale, bias, weight, weight_log_det)
    check_like("grad", grad, z.shape, "the shape of z", z)
    check_like("grad_log_det", grad_log_det, z.shape[:1], "(B,) with B = z.shape[0]", z)
    parameters = _in_compute_dtype(z, log_scale, bias, weight, weight_log_det)
    matrix, _, _ = _fold(*parameters)
    inverse, inverse_shift, _ = _invert(*parameters)
    x, grad_x, grad_matrix, grad_shift = _reversible_backward(grad.to(z.dtype), z, matrix, inverse, inverse_shift)
    total = positions(z) * grad_log_det.to(matrix.dtype).sum()
    grads = _fold_backward(grad_matrix, grad_shift, total, *parameters)
    grad_log_scale, grad_bias, grad_weight, grad_weight_log_det = (
        None if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(grads, (log_scale, bias, weight, weight_log_det), strict=True)
    )
    return x, grad_x, grad_log_scale, grad_bias, grad_weight, grad_weight_log_det  # type: ignore[return-value]


def lu_weight(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, diagonal_sign: Tensor
) -> tuple[Tensor, Tensor]:
    """``W = P L (U + diag(s))`` and ``log|det W| = sum log|s|`` (Kingma and Dhariwal, "Glow", 2018, equation 10).

    Leading dimensions ``(*K)`` assemble many matrices at once. Arithmetic is in float64, also under autocast.

    Args:
        permutation: ``(*K, C, C)``, the matrix P, fixed.
        lower: ``(*K, C, C)``, of which what lies below the diagonal is L; L has a diagonal of ones.
        upper: ``(*K, C, C)``, of which what lies above the diagonal is U.
        log_diagonal: ``(*K, C)``, ``log|s|``.
        diagonal_sign: ``(*K, C)``, the signs of s, fixed.

    Returns:
        ``weight`` ``(*K, C, C)`` and ``weight_log_det`` ``(*K)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    if not isinstance(lower, Tensor) or lower.dim() < 2 or lower.shape[-1] != lower.shape[-2]:
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
        Three tensors of the shapes and types of those arguments. They cannot be differentiated again.
    """
    dtype = compute_dtype(lower)
    factors = (permutation, lower, upper, log_diagonal, diagonal_sign)
    grads = _lu_backward(*(tensor.to(dtype) for tensor in (grad_weight, grad_log_det, *factors)))
    grad_lower, grad_upper, grad_log_diagonal = grads
    return grad_lower.to(lower.dtype), grad_upper.to(upper.dtype), grad_log_diagonal.to(log_diagonal.dtype)


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


def _invert(*parameters: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    try:
        matrix, shift, log_det = _fold_inverse(*parameters)
    except RuntimeError as error:  # a shared library cannot raise a ValueError
        message = str(error)
        if "weight must be invertible" not in message:
            raise
        raise ValueError(message[message.index("weight must") :]) from None
    return matrix, shift, log_det


def _in_compute_dtype(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = compute_dtype(x)
    # Asking first is cheaper than a conversion that does nothing.
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


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
    # Asked for once: torch.utils.checkpoint hands out what is saved only once.
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


def _apply_fake(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))


def _apply_backward_fake(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(matrix, memory_format=torch.contiguous_format), matrix.new_empty(x.shape[1])


def _reversible_backward_fake(
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
# Leading dimensions, written (*K), fold many steps in one call.
_PARAMETERS = "Tensor log_scale, Tensor bias, Tensor weight, Tensor? weight_log_det"
_FOLD_SCHEMA = f"({_PARAMETERS}) -> (Tensor, Tensor, Tensor)"
# The last result is the gradient of weight_log_det, empty if there is none.
_FOLD_BACKWARD_SCHEMA = (
    f"(Tensor grad_matrix, Tensor grad_shift, Tensor grad_log_det, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)"
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
_reversible_backward = Operator(
    _MODULE,
    "apply_reversible_backward",
    "(Tensor grad, Tensor z, Tensor matrix, Tensor inverse, Tensor inverse_shift) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_reversible_backward_fake,
)
