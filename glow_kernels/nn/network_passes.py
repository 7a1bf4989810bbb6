"""The network of a coupling without autograd: its forward, and its backward from the tensors that forward has saved.

There is no pass over the hidden layers that the mathematics does not require, small tensors are processed together, and
a caller that is itself an autograd node need not record another one. The saved tensors are those that autograd would
save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from glow_kernels.nn import network as networks
from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.network import CouplingNetwork, HiddenConv2d, ZeroConv2d
from glow_kernels.ops.bias_relu import backward as bias_relu_backward
from glow_kernels.ops.bias_relu import bias_backward, pad
from glow_kernels.ops.bias_relu import forward as bias_relu_forward
from glow_kernels.ops.scale_filters import scale_all, scale_all_backward

# The factors of log_scale in the three convolutions.
_FACTORS = [1.0, 1.0, 3.0]
# Looked up once: looking up an overload takes as long as a small operator.
_convolution_backward = torch.ops.aten.convolution_backward.default
_threshold_backward_into = torch.ops.aten.threshold_backward.grad_input
# Number of shares of the batch in which to differentiate a convolution that would take too much memory at once.
_SHARES = 4
# Number of thread blocks that fill a large GPU; minimum number of elements per block; channels per block in
# channels-last memory.
_BLOCKS, _ELEMENTS, _CHANNELS = 768, 2048, 256


class Kept(NamedTuple):
    """What backward needs: the inputs of the three convolutions, and their scaled weights."""

    inputs: list[Tensor]
    weights: list[Tensor]


def plain_parameters(network: nn.Module) -> list[Tensor] | None:
    """The result of :func:`parameters_of` if the passes here compute the same as calling ``network``, None otherwise.

    It must be this package's own network, initialised, without hooks and with no method overridden.
    """
    if type(network) is not CouplingNetwork or _has_any_global_hook() or is_overridden_or_hooked(network):  # type: ignore[no-untyped-call]
        return None
    layers: dict[str, Any] = network._modules
    first, second, last = layers["first"], layers["second"], layers["last"]
    if not _is_plain(first, HiddenConv2d) or not _is_plain(second, HiddenConv2d) or not _is_plain(last, ZeroConv2d):
        return None
    for layer in (first, second):
        actnorm = layer._modules["actnorm"]
        if not _is_plain(actnorm, ActNorm) or not actnorm._is_initialized:
            return None
    return parameters_of(network)


def parameters_of(network: nn.Module) -> list[Tensor]:
    """The weights, biases and log_scales of the network, three each."""
    layers: dict[str, Any] = network._modules
    first, second, last = layers["first"], layers["second"], layers["last"]
    actnorms = first._modules["actnorm"], second._modules["actnorm"]
    return [
        *(parameter_of(first, "weight"), parameter_of(second, "weight"), parameter_of(last, "weight")),
        *(parameter_of(actnorms[0], "bias"), parameter_of(actnorms[1], "bias"), parameter_of(last, "bias")),
        *(
            parameter_of(actnorms[0], "log_scale"),
            parameter_of(actnorms[1], "log_scale"),
            parameter_of(last, "log_scale"),
        ),
    ]


def forward(x: Tensor, parameters: Sequence[Tensor], frugal: bool = False) -> tuple[Tensor, Kept]:
    """The output of the network for ``x`` (B, C, H, W), and what backward needs; ``frugal`` as for the network."""
    weights, biases, log_scales = parameters[:3], parameters[3:6], parameters[6:]
    dtype, format_ = networks.convolution_dtype(weights[0]), memory_format_of(weights[0])
    inner, outputs = x.shape[1], len(weights[2])
    outer = outputs
    if has_tensor_cores(x.device, dtype):
        inner, outer = aligned(inner), aligned(outputs)
    width = len(weights[0])
    sizes = [(width, inner), (width, width), (outer, width)]
    filters = scale_all(weights, biases, log_scales, _FACTORS, dtype, sizes)
    scaled, (*hidden_biases, bias) = filters[::2], filters[1::2]
    if inner > x.shape[1]:
        x, _ = pad(x, inner, dtype, format_ == torch.channels_last, 0)
    elif x.dtype != dtype or format_ == torch.channels_last:
        x = x.to(dtype, memory_format=format_)  # one pass for both
    inputs = [x]
    for weight, hidden_bias in zip(scaled[:2], hidden_biases, strict=True):
        inputs.append(_hidden(inputs[-1], weight, hidden_bias, frugal))
    h = _convolve(inputs[-1], scaled[2], bias)
    return h if outer == outputs else h[:, :outputs], Kept(inputs, scaled)


def backward(
    grad: Tensor,
    kept: Kept,
    parameters: Sequence[Tensor],
    needs_x: bool = True,
    needs_parameters: bool = True,
    frugal: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input, in the type of the convolutions, and of ``parameters``; None where not needed.

    Tensors are removed from ``kept`` as soon as they are no longer needed, which frees them.
    """
    inputs, scaled = kept
    weights, biases, log_scales = parameters[:3], parameters[3:6], parameters[6:]
    apart = networks.adds_bias_separately(grad)
    parts = _partial_sum_count(grad) if apart and needs_parameters else 0
    grad_bias: Tensor | None = None
    if len(scaled[2]) > grad.shape[1]:
        in_last = memory_format_of(inputs[2]) == torch.channels_last
        grad, sums = pad(grad, len(scaled[2]), grad.dtype, in_last, parts)
        grad_bias = sums if parts > 0 else None
    elif parts > 0:
        grad_bias = bias_backward(grad, parts)
    filters: list[Tensor] = []
    for index in (2, 1, 0):
        mask = [needs_x or index > 0, needs_parameters, needs_parameters and grad_bias is None]
        # Memory is at its peak here: only at the last convolution are all hidden layers still there.
        divides = index == 2 and frugal and needs_workspace(grad) and _is_large(grad, inputs[index].shape[1])
        differentiate = _convolve_backward_in_shares if divides else _convolve_backward
        grad, grad_weight, of_bias = differentiate(grad, inputs[index], scaled[index], mask)
        if needs_parameters:
            own = grad_weight.contiguous(memory_format=memory_format_of(weights[index]))
            filters = [own, of_bias if grad_bias is None else grad_bias, *filters]
        if index == 0:
            break
        result, grad_bias = inputs.pop(), None
        if apart and not (frugal and _is_large(result, result.shape[1])):
            grad, grad_bias = bias_relu_backward(grad, result, _partial_sum_count(result))
        else:  # the convolution has just made the gradient, so nothing else uses it
            _threshold_backward_into(grad, result, 0, grad_input=grad)
        del result
    found: list[Tensor | None] = [None] * len(parameters)
    if needs_parameters:
        flat = scale_all_backward(filters, weights, biases, log_scales, _FACTORS)
        by_kind = [*flat[::3], *flat[1::3], *flat[2::3]]
        # Checking first is cheaper than a conversion that does nothing.
        found = [
            value if value.dtype == of.dtype else value.to(of.dtype)
            for value, of in zip(by_kind, parameters, strict=True)
        ]
    if not needs_x:
        return None, found
    channels = weights[0].size(1)
    return grad if grad.size(1) == channels else grad[:, :channels], found


def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions run on tensor cores, which need aligned numbers of channels and have fused epilogues."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def needs_workspace(x: Tensor) -> bool:
    """Whether convolutions of data like ``x`` need workspace as large as a hidden layer.

    On an H200 cuDNN copies all float32 data to the layout of its tensor cores, whatever layout the data have.
    """
    return x.device.type == "cuda" and not has_tensor_cores(x.device, x.dtype)


def aligned(channels: int) -> int:
    """``channels``, rounded up to a number with which convolutions are fast; cuDNN would pad in separate passes.

    Measured on an H100: 3x3 from 12 to 512 channels at 8x8 positions takes 28 us, from 16 to 512 it takes 8 us.
    """
    return channels if channels % 8 == 0 else -(-channels // 16) * 16


def _partial_sum_count(x: Tensor) -> int:
    """The number of partial sums of ``x`` over positions, which :func:`scale_all_backward` then adds up."""
    in_rows = x.is_contiguous(memory_format=torch.channels_last)
    across = -(-x.shape[1] // _CHANNELS) if in_rows else x.shape[1]
    return max(1, min(_BLOCKS, x.numel() // _ELEMENTS) // max(1, across))


def _hidden(x: Tensor, weight: Tensor, bias: Tensor, frugal: bool) -> Tensor:
    in_rows = weight.shape[2:] == (1, 1) and x.is_contiguous(memory_format=torch.channels_last)
    if in_rows and has_tensor_cores(x.device, x.dtype):
        # One matrix product for all positions, with bias and ReLU in the epilogue of cuBLAS.
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        result: Tensor = torch.ops.aten._addmm_activation(bias, rows, weight.flatten(1).t())
        return result.view(batch, height, width, -1).permute(0, 3, 1, 2)
    if networks.adds_bias_separately(x) and not (frugal and _is_large(x, len(weight))):
        hidden: Tensor = bias_relu_forward(_convolve(x, weight, None), bias)
        return hidden
    return torch.relu_(_convolve(x, weight, bias))


def _is_large(x: Tensor, channels: int) -> bool:
    """Whether saving a buffer with ``channels`` channels and the positions of ``x`` is worth a second pass over it."""
    return x[:, 0].numel() * channels * x.element_size() >= networks.LARGE_ON_GPU


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last if ``x`` is not also contiguous: a convolution computes in the memory format of its weight."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.convolution(x, weight, bias, *_geometry(weight))


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; None where ``mask`` is false."""
    found: tuple[Tensor, Tensor, Tensor] = _convolution_backward(
        grad, x, weight, [weight.size(0)], *_geometry(weight), mask
    )
    return found


def _convolve_backward_in_shares(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_convolve_backward` for one share of the batch after the other, all of which use the same workspace."""
    in_x = torch.empty_like(x)
    totals: list[Tensor] = []
    samples = -(-len(x) // _SHARES)
    for some in (slice(first, first + samples) for first in range(0, len(x), samples)):
        in_x[some], *found = _convolve_backward(grad[some], x[some], weight, mask)
        for total, one, asked in zip(totals, found, mask[1:], strict=False):
            if asked:
                total.add_(one)
        totals = totals or found
    return in_x, totals[0], totals[1]


def _geometry(weight: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups of a convolution that keeps height and width."""
    padding = [weight.size(2) // 2, weight.size(3) // 2]
    return [1, 1], padding, [1, 1], False, [0, 0], 1


def is_overridden_or_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does something other than the forward of its class, or also runs hooks."""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def _is_plain(module: Any, expected: type[nn.Module]) -> bool:
    return type(module) is expected and not is_overridden_or_hooked(module)


def parameter_of(module: Any, name: str) -> Tensor:
    """``getattr(module, name)``, but faster: that searches several other places for a parameter first."""
    registered = module._parameters
    parameter: Tensor = (
        registered[name] if name in registered and name not in module.__dict__ else getattr(module, name)
    )
    return parameter
