"""Bias and ReLU after a hidden convolution of a coupling network: one pass over the largest tensors there are.

``y = max(x + b, 0)`` with b a number per channel. Backward, with ``g = dL/dy``: ``dx = g`` where ``y > 0`` and 0
elsewhere, ``db = sum_{b,p} dx``, from the output alone and in one pass. Without a ReLU there is only
``db = sum_{b,p} g``: :data:`bias_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_image, check_like
from glow_kernels.ops._registry import Operator


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """``max(x + bias, 0)``.

    Args:
        x: ``(B, C, *spatial)`` with 0 to 3 spatial dimensions, any floating-point type.
        bias: ``(C,)``, any floating-point type.

    Returns:
        ``y`` with the shape and type of ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    check_image("x", x)
    check_like("bias", bias, x.shape[1:2], "(C,) with C = x.shape[1]", x)
    y: Tensor = forward(x, bias)
    return y


def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))


def _backward_fake(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y, memory_format=output_format(y)), y.new_empty(y.shape[1], dtype=compute_dtype(y))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = inputs[1].dtype
    ctx.save_for_backward(output)


def _rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = backward.on(backend, grad, *ctx.saved_tensors)
    return grad_x, grad_bias.to(ctx.bias_dtype)


forward = Operator(
    "bias_relu", "forward", "(Tensor x, Tensor bias) -> Tensor", fake=_fake, setup_context=_setup, backward=_rule
)
backward = Operator(
    "bias_relu", "backward", "(Tensor grad, Tensor y) -> (Tensor, Tensor)", fake=_backward_fake, plain_reference=True
)
bias_backward = Operator(
    "bias_relu",
    "bias_backward",
    "(Tensor grad) -> Tensor",
    fake=lambda grad: grad.new_empty(grad.shape[1], dtype=compute_dtype(grad)),
    plain_reference=True,
)
