"""The affine coupling of one flow step and the linear map of the next, as one operator across their boundary.

The input of the coupling is ``z = [z1, z2]``, whose first ``C1`` channels condition and whose others are transformed,
and the network's output ``h``. The coupling computes ``x = [z1, y]`` with ``y, log_det`` as in
:mod:`glow_kernels.ops.affine_coupling`; the next step's ActNorm and 1x1 convolution compute ``M x + v`` as in
:mod:`glow_kernels.ops.actnorm_conv1x1`. Both work position by position, so ``x`` is never stored.

Backward, with ``g = dL/d(M x + v)`` and ``l = dL/dlog_det``, needs only the inputs ``z`` and ``h``, and computes ``x``
again: ``dM = sum_{b,p} g x^T``, ``dv = sum_{b,p} g``, ``dx = M^T g``; then ``dz1 = dx1``, and ``dz2`` and ``dh`` are
those of the coupling with ``dL/dy = dx2``. The contribution of ``h = net(z1)`` to ``dz1`` is left to the network's
backward.

A reversible chain uses the forward, and the backward for steps whose ``z`` it has kept. Given only the output, it
cannot invert both in one pass: the network must be evaluated between the linear map and the coupling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._registry import Operator


def _fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z, memory_format=output_format(z)), z.new_empty(z.shape[0], dtype=compute_dtype(z))


def _backward_fake(
    grad: Tensor, grad_log_det: Tensor, z: Tensor, h: Tensor, matrix: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(z, memory_format=output_format(z)),
        torch.empty_like(h, memory_format=output_format(h)),
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty(z.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, h, matrix, _, *ctx.options = inputs
    ctx.save_for_backward(z, h, matrix)


def _rule(backend: str, ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward.on(backend, grad, grad_log_det, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_MODULE = "coupling_conv1x1"
_OPTIONS = "str kind, float[] scale_parameters, str layout, str order"

# Arguments, which are not checked: z (B, C, *spatial); h (B, 2 (C - C1), *spatial) with 1 <= C1 < C; matrix (C, C) and
# shift (C,) from ``folding.fold``, in the type of arithmetic. Results: the next z, like z, and log_det (B,) of the
# coupling alone.
forward = Operator(
    _MODULE,
    "forward",
    f"(Tensor z, Tensor h, Tensor matrix, Tensor shift, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_rule,
)
# Results: the gradients of z, h, matrix and shift.
backward = Operator(
    _MODULE,
    "backward",
    f"(Tensor grad, Tensor grad_log_det, Tensor z, Tensor h, Tensor matrix, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    plain_reference=True,
)
