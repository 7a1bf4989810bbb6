"""The network of a coupling layer: 3x3, 1x1 and 3x3 convolutions (Kingma and Dhariwal, "Glow", 2018, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.nn.actnorm import ActNorm


class ActNormConv2d(nn.Module):
    """A convolution without bias, followed by ActNorm, computed as one convolution with the scale folded in.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_size: odd; the input is padded with zeros so that the size stays.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) * 0.05)
        self.actnorm = ActNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        if not self.actnorm._is_initialized:
            self.actnorm.prepare(F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2))
        return _scaled_convolution(x, *self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias, and the scale of both: ``(C', C, k, k)``, ``(C',)``, ``(C',)`` for C' output channels."""
        return self.weight, self.actnorm.bias, self.actnorm.log_scale.exp()


class ZeroConv2d(nn.Module):
    """A 3x3 convolution that starts at zero, scaled by ``exp(3 * log_scale)`` per output channel.

    Starting at zero makes a coupling the identity up to its constant scale; the factor 3 lets it leave zero fast.

    Args:
        in_channels, out_channels: channels before and after.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        return _scaled_convolution(x, *self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and scale, as those of :class:`ActNormConv2d`."""
        return self.weight, self.bias, (3.0 * self.log_scale).exp()


def _scaled_convolution(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return F.conv2d(x, weight * scale[:, None, None, None], bias * scale, padding=weight.shape[-1] // 2)


class _Frugal(torch.autograd.Function):
    """Convolutions with ReLU between them, whose backward frees every hidden buffer as soon as it can, and runs once.

    ``apply(x, weight, bias, scale, weight, bias, scale, ...)``: a convolution with ``scale * weight`` and
    ``scale * bias`` after the other. The scales are those of the output channels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtype, x = x.dtype, x.to(dtype)
        ctx.parameters, ctx.inputs, ctx.weights = _in_threes(parameters), [], []
        for weight, bias, scale in ctx.parameters:
            if ctx.inputs:
                x.relu_()
            ctx.inputs.append(x)
            ctx.weights.append((weight * scale[:, None, None, None]).to(dtype))
            x = F.conv2d(x, ctx.weights[-1], (bias * scale).to(dtype), padding=weight.shape[-1] // 2)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        needs = _in_threes(ctx.needs_input_grad[1:])
        results: list[Tensor | None] = []
        for (weight, bias, scale), needed in zip(reversed(ctx.parameters), reversed(needs), strict=True):
            x, folded = ctx.inputs.pop(), ctx.weights.pop()
            is_hidden = bool(ctx.inputs)
            same, half = [1, 1], [weight.shape[-1] // 2] * 2
            wanted = [is_hidden or ctx.needs_input_grad[0], needed[0] or needed[2], needed[1] or needed[2]]
            grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, folded, [len(weight)], same, half, same, False, [0, 0], 1, wanted
            )
            if is_hidden:
                # The gradient is fresh from a convolution, and nobody else's.
                torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
            del x
            results = [*_unfold(weight, bias, scale, grad_weight, grad_bias, needed), *results]
        return None if grad is None else grad.to(ctx.dtype), *results


def _in_threes(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + 3] for start in range(0, len(values), 3)]


def _unfold(
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``weight``, ``bias`` and ``scale`` from those of ``scale * weight`` and ``scale * bias``."""
    results: list[Tensor | None] = [None, None, None]
    if grad_weight is not None and grad_bias is not None:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
        results[2] = (grad_weight * weight).sum((1, 2, 3)) + grad_bias * bias if needed[2] else None
    if grad_weight is not None and needed[0]:
        results[0] = grad_weight.to(weight.dtype) * scale[:, None, None, None]
    if grad_bias is not None and needed[1]:
        results[1] = grad_bias.to(bias.dtype) * scale
    return results


class CouplingNetwork(nn.Module):
    """3x3 convolution, ActNorm, ReLU, 1x1 convolution, ActNorm, ReLU, 3x3 convolution that starts at zero.

    Args:
        in_channels: channels of the half that it reads.
        out_channels: channels of its output, twice those of the other half for an affine coupling.
        hidden_channels: width of the hidden layers.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int = 512) -> None:
        super().__init__()
        self.frugal = False
        self.first = ActNormConv2d(in_channels, hidden_channels, 3)
        self.second = ActNormConv2d(hidden_channels, hidden_channels, 1)
        self.last = ZeroConv2d(hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        if self.frugal:
            parts = (*self.first.parts(), *self.second.parts(), *self.last.parts())
            output: Tensor = _Frugal.apply(x, *parts)  # type: ignore[no-untyped-call]
        else:
            output = self.last(F.relu_(self.second(F.relu_(self.first(x)))))
        return output
