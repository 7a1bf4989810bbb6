"""Bias and ReLU after a hidden convolution of a coupling network: one pass over the largest tensors of a flow.

``y = max(x + b, 0)`` with one number b per channel. Backward, with ``g = dL/dy``: ``dx = g`` where ``y > 0`` and 0
elsewhere, ``db = sum_{b,p} dx``, in one pass over ``g`` and the output. Without a ReLU there is only
``db = sum_{b,p} g``: :data:`bias_backward`.

A sum over all positions takes two launches, unless the caller accepts partial sums over ``parts`` of the positions: the
result is then ``(parts, C)``, and how positions are assigned to parts is unspecified. :data:`pad` prepares the small
tensors at both ends of the network for convolutions on tensor cores: it converts type and memory format, and appends
channels of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, empty_padded, output_format
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


def _sums_fake(x: Tensor, parts: int) -> Tensor:
    return x.new_empty((parts, x.shape[1]), dtype=compute_dtype(x))


def _backward_fake(grad: Tensor, y: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y, memory_format=output_format(y)), _sums_fake(y, parts)


def _pad_fake(x: Tensor, channels: int, dtype: torch.dtype, channels_last: bool, parts: int) -> tuple[Tensor, Tensor]:
    return empty_padded(x, channels, dtype, channels_last), _sums_fake(x, parts)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias_dtype = inputs[1].dtype
    ctx.save_for_backward(output)


def _rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, sums = backward.on(backend, grad, *ctx.saved_tensors, 1)
    return grad_x, sums[0].to(ctx.bias_dtype)


forward = Operator(
    "bias_relu", "forward", "(Tensor x, Tensor bias) -> Tensor", fake=_fake, setup_context=_setup, backward=_rule
)
# Results: dx, and db in partial sums (parts, C) with parts >= 1.
backward = Operator(
    "bias_relu",
    "backward",
    "(Tensor grad, Tensor y, int parts) -> (Tensor, Tensor)",
    fake=_backward_fake,
    plain_reference=True,
)
bias_backward = Operator(
    "bias_relu", "bias_backward", "(Tensor grad, int parts) -> Tensor", fake=_sums_fake, plain_reference=True
)
# Results: x (B, C, H, W) padded to (B, channels, H, W), and partial sums (parts, C) of x over samples and positions;
# parts may be 0.
pad = Operator(
    "bias_relu",
    "pad",
    "(Tensor x, int channels, ScalarType dtype, bool channels_last, int parts) -> (Tensor, Tensor)",
    fake=_pad_fake,
    plain_reference=True,
)
