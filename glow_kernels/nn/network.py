"""The network of a coupling layer: 3x3, 1x1 and 3x3 convolutions (Kingma and Dhariwal, "Glow", 2018, section 4).

Its hidden layers are 10 times as large as everything else, so what matters is to save passes over them. All scales are
folded into the filters, which leaves a single pass for bias and ReLU between two convolutions. It does not use cuDNN's
fused epilogue (``torch.ops.aten.cudnn_convolution_relu``), which is undocumented, has no derivative, and falls back to
slower convolutions for some sizes and formats (PyTorch issue 68506).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.backends.numerics import is_autocast_enabled
from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.ops import bias_relu, scale_filters
from glow_kernels.ops._checks import check_whole

# Size in bytes from which saving a hidden buffer is worth the Python overhead of an autograd function; and on a GPU
# also worth a second pass, since the in-place ReLU is not fused with the bias.
_LARGE = 4 * 2**20
LARGE_ON_GPU = 64 * 2**20


class HiddenConv2d(nn.Module):
    """A convolution without bias, then ActNorm and ReLU, computed as a convolution with folded scale and one pass.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size: odd; the input is padded with zeros so that height and width stay the same.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) * 0.05)
        self.actnorm = ActNorm(out_channels)
        self.padding = kernel_size // 2

    def forward(self, x: Tensor, frugal: bool = False) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W).

        With ``frugal``, the backward of ReLU overwrites large gradients in place; nothing else may use them.
        """
        weight, bias = self.folded(x)
        fuses = adds_bias_separately(x)
        nbytes = x[:, 0].numel() * len(weight) * weight.itemsize
        overwrites = frugal and nbytes >= (LARGE_ON_GPU if fuses else _LARGE)
        if fuses and not overwrites:
            return bias_relu(F.conv2d(x, weight, padding=self.padding), bias)
        x = F.conv2d(x, weight, bias, padding=self.padding)
        return _FrugalReLU.apply(x) if overwrites else F.relu_(x)  # type: ignore[no-untyped-call]

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with ActNorm folded in; ``x`` initialises ActNorm if necessary."""
        if not self.actnorm.is_initialized():
            self.actnorm.prepare(F.conv2d(x, self.weight, padding=self.padding))
        dtype = convolution_dtype(self.weight)
        return scale_filters(self.weight, self.actnorm.bias, self.actnorm.log_scale, dtype=dtype)


class ZeroConv2d(nn.Module):
    """A 3x3 convolution that starts at zero, scaled by ``exp(3 * log_scale)`` per output channel.

    Starting at zero makes a coupling the identity up to its constant scale; the factor 3 lets it leave zero quickly.

    Args:
        in_channels, out_channels: channels of the input and of the output.

    Raises:
        TypeError, ValueError: one of them is not a whole number of at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_whole("in_channels", in_channels, 1)
        check_whole("out_channels", out_channels, 1)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        dtype = convolution_dtype(self.weight)
        return F.conv2d(x, *scale_filters(self.weight, self.bias, self.log_scale, 3.0, dtype), padding=1)


class CouplingNetwork(nn.Module):
    """3x3 convolution, ActNorm, ReLU, 1x1 convolution, ActNorm, ReLU, 3x3 convolution that starts at zero.

    Args:
        in_channels: channels of the half that it reads.
        out_channels: channels of its output, twice those of the other half for an affine coupling.
        hidden_channels: width of the hidden layers.

    Raises:
        TypeError, ValueError: one of them is not a whole number of at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int = 512) -> None:
        super().__init__()
        check_whole("in_channels", in_channels, 1)
        check_whole("hidden_channels", hidden_channels, 1)
        # If set, backward overwrites the gradients of hidden layers in place, which saves a buffer.
        self.frugal = False
        self.first = HiddenConv2d(in_channels, hidden_channels, 3)
        self.second = HiddenConv2d(hidden_channels, hidden_channels, 1)
        self.last = ZeroConv2d(hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        output: Tensor = self.last(self.second(self.first(x, self.frugal), self.frugal))
        return output


class _FrugalReLU(torch.autograd.Function):
    """ReLU that overwrites its input and, in backward, the incoming gradient, which nothing else may use."""

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


def convolution_dtype(weight: Tensor) -> torch.dtype:
    """The type that autocast would convert ``weight`` to at every use; without autocast its own."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def adds_bias_separately(x: Tensor) -> bool:
    """Whether a convolution of ``x`` adds its bias in a separate pass: cuDNN does, the CPU does not."""
    return not x.is_cpu
