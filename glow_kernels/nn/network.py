"""The network of a coupling layer: 3x3, 1x1 and 3x3 convolutions (Kingma and Dhariwal, "Glow", 2018, section 4)."""

from __future__ import annotations

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
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        if not self.actnorm._is_initialized:
            self.actnorm.prepare(F.conv2d(x, self.weight, padding=self.padding))
        scale = self.actnorm.log_scale.exp()
        return F.conv2d(x, self.weight * scale[:, None, None, None], self.actnorm.bias * scale, padding=self.padding)


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
        scale = (3.0 * self.log_scale).exp()
        return F.conv2d(x, self.weight * scale[:, None, None, None], self.bias * scale, padding=1)


# Bytes of a hidden buffer that is worth the time of the interpreter in an autograd function.
_LARGE = 4 * 2**20


class _FrugalReLU(torch.autograd.Function):
    """ReLU that overwrites its input and, in backward, the gradient that it gets, which must be nobody else's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.relu_())
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        grad = grads[0]
        torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
        return grad


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
        x = self.first(x)
        # Gradients of the hidden layers come from convolutions, fresh: one buffer less where they may be overwritten.
        relu = _FrugalReLU.apply if self.frugal and x.nbytes >= _LARGE else F.relu_
        x = relu(self.second(relu(x)))
        output: Tensor = self.last(x)
        return output
