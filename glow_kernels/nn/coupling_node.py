"""A coupling with its own network as one node of autograd.

Composed of operators it is some twenty nodes, and what autograd does between them costs more than the coupling: halves
of a gradient are padded with zeros and added, small gradients are converted one by one, every node takes the host its
time. Here every pass is one that the mathematics asks for. What backward keeps is the same, and so is every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from glow_kernels import backends
from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.nn import network as networks
from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.network import CouplingNetwork, HiddenConv2d, ZeroConv2d
from glow_kernels.ops import ScaleMap
from glow_kernels.ops.affine_coupling import backward as affine_backward
from glow_kernels.ops.affine_coupling import forward as affine_forward
from glow_kernels.ops.bias_relu import backward as bias_relu_backward
from glow_kernels.ops.bias_relu import bias_backward
from glow_kernels.ops.bias_relu import forward as bias_relu_forward
from glow_kernels.ops.scale_filters import scale_all, scale_all_backward

# Of log_scale in the three convolutions.
_FACTORS = [1.0, 1.0, 3.0]
_TYPES: tuple[tuple[str, type[nn.Module]], ...] = (
    ("first", HiddenConv2d),
    ("second", HiddenConv2d),
    ("last", ZeroConv2d),
)


@dataclass(frozen=True)
class Kind:
    """What a coupling does with the network's output: additive without a scale map.

    Attributes:
        channels: of the half that conditions.
        scale_map, layout, order: of :func:`glow_kernels.affine_coupling`.
    """

    channels: int
    scale_map: ScaleMap | None
    layout: str = ""
    order: str = ""

    @property
    def options(self) -> tuple[Any, ...]:
        """The last arguments of the operators."""
        assert self.scale_map is not None
        return None, self.scale_map.kind, self.scale_map.parameters, self.layout, self.order


def coupling_node(x: Tensor, kind: Kind, network: nn.Module) -> tuple[Tensor, Tensor]:
    """``y`` and ``log_det`` (B,) of ``x`` (B, C, H, W), whose first ``kind.channels`` channels condition the others."""
    layers = cast(CouplingNetwork, network)
    hidden, last = (layers.first, layers.second), layers.last
    weights = [*(layer.weight for layer in hidden), last.weight]
    biases = [*(layer.actnorm.bias for layer in hidden), last.bias]
    log_scales = [*(layer.actnorm.log_scale for layer in hidden), last.log_scale]
    y, log_det = _CouplingNode.apply(x, kind, *weights, *biases, *log_scales)  # type: ignore[no-untyped-call]
    return y, log_det


def is_one_node(x: Tensor, kind: Kind, network: nn.Module) -> bool:
    """Whether a coupling of ``x`` (B, C, H, W) with this network can be :func:`coupling_node`.

    It must be differentiated, by a backend that is not the reference, whose gradients have gradients; not traced or
    transformed; and the network must be this package's own, initialised, and nobody's who waits for its modules to be
    called.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(network) is not CouplingNetwork or backends.select() == "reference" or x.dim() != 4:
        return False
    if _has_any_global_hook() or _is_altered(network):  # type: ignore[no-untyped-call]
        return False
    for name, expected in _TYPES:
        layer = network._modules[name]
        if type(layer) is not expected or _is_altered(layer):
            return False
        actnorm = layer._modules.get("actnorm")
        if actnorm is not None and (
            type(actnorm) is not ActNorm or not actnorm._is_initialized or _is_altered(actnorm)
        ):
            return False
    weight = network.first.weight
    outputs = (x.shape[1] - kind.channels) * (1 if kind.scale_map is None else 2)
    return (
        x.device == weight.device
        and (x.dtype == weight.dtype or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)))
        and (weight.shape[1], network.last.weight.shape[0]) == (kind.channels, outputs)
    )


def _is_altered(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


class _CouplingNode(torch.autograd.Function):
    """``apply(x, kind, weights, biases, log_scales)``, three of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases, log_scales = parameters[:3], parameters[3:6], parameters[6:]
        dtype = networks.type_of_convolution(weights[0])
        filters = scale_all(weights, biases, log_scales, _FACTORS, dtype)
        conditioning, transformed = x[:, : kind.channels], x[:, kind.channels :]
        h, inputs, scaled = _network(conditioning, filters[::2], filters[1::2])
        if kind.scale_map is None:
            y, log_det = (transformed + h).to(x.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))
        else:
            y, log_det = affine_forward(transformed, h, *kind.options)
        y = torch.cat((conditioning, y), 1)
        ctx.kind, ctx.backend = kind, backends.choice()
        ctx.save_for_backward(y, h, *inputs, *scaled, *parameters)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kind: Kind = ctx.kind
        grad, grad_log_det = grads
        # Asked for once: torch.utils.checkpoint hands out what is saved only once.
        y, h, *saved = ctx.saved_tensors
        inputs, scaled, parameters = saved[:3], saved[3:6], saved[6:]
        needs_x, needs = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
        found: list[Tensor | None] = [None] * len(parameters)
        with backends.restored(ctx.backend):
            if kind.scale_map is None:
                grad_h = grad_transformed.to(h.dtype)
            else:
                of_y = y[:, kind.channels :]
                grad_transformed, grad_h, _ = affine_backward(grad_transformed, grad_log_det, of_y, h, *kind.options)
            weights, biases, log_scales = parameters[:3], parameters[3:6], parameters[6:]
            below, filters = _network_backward(grad_h, inputs, scaled, weights, needs_x, needs)
            if needs:
                flat = scale_all_backward(filters, weights, biases, log_scales, _FACTORS)
                by_kind = [*flat[::3], *flat[1::3], *flat[2::3]]
                found = [found.to(of.dtype) for found, of in zip(by_kind, parameters, strict=True)]
        grad_x = None if below is None else torch.cat((grad_conditioning + below, grad_transformed), 1)
        return grad_x, None, *(g if need else None for g, need in zip(found, ctx.needs_input_grad[2:], strict=True))


def _network(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output of the network, the inputs of its convolutions, and the weights as they computed with them."""
    (first, second, last), bias = weights, biases[2]
    outputs, format_ = len(last), memory_format_of(first)
    if has_tensor_cores(x.device, first.dtype):
        inner, outer = aligned(first.shape[1]), aligned(outputs)
        x = _padded(x, len(x), inner, first.dtype, format_)
        first = _padded(first, len(first), inner, first.dtype, format_)
        last = _padded(last, outer, last.shape[1], last.dtype, memory_format_of(last))
        bias = F.pad(bias, (0, outer - outputs)) if outer > outputs else bias
    elif x.dtype != first.dtype or format_ == torch.channels_last:
        x = x.to(first.dtype, memory_format=format_)  # one pass for both
    inputs = [x]
    for weight, hidden_bias in zip((first, second), biases[:2], strict=True):
        inputs.append(_hidden(inputs[-1], weight, hidden_bias))
    return _convolve(inputs[-1], last, bias)[:, :outputs], inputs, [first, second, last]


def _network_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    scaled: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs_x: bool,
    needs_filters: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients in the input and in the scaled filters, weight and bias of each; none of what was padded."""
    apart = networks.is_bias_apart(grad)
    grad_bias = bias_backward(grad) if apart and needs_filters else None
    if len(scaled[2]) > grad.shape[1]:
        grad = _padded(grad, len(grad), len(scaled[2]), grad.dtype, memory_format_of(inputs[2]))
    filters: list[Tensor] = []
    for index in (2, 1, 0):
        if apart and index < 2:
            grad, grad_bias = bias_relu_backward(grad, inputs[index + 1])
        elif index < 2:
            grad = torch.ops.aten.threshold_backward(grad, inputs[index + 1], 0)
        mask = [needs_x or index > 0, needs_filters, needs_filters and not apart]
        grad, grad_weight, of_bias = _convolve_backward(grad, inputs[index], scaled[index], mask)
        if needs_filters:
            like = weights[index]
            own = grad_weight[: like.shape[0], : like.shape[1]].contiguous(memory_format=memory_format_of(like))
            filters = [own, of_bias if grad_bias is None else grad_bias, *filters]
    return grad[:, : weights[0].shape[1]] if needs_x else None, filters


def _hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    in_rows = weight.shape[2:] == (1, 1) and x.is_contiguous(memory_format=torch.channels_last)
    if in_rows and has_tensor_cores(x.device, x.dtype):
        # A matrix product of all positions, whose library adds the bias and cuts off at zero before it stores.
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        result: Tensor = torch.ops.aten._addmm_activation(bias, rows, weight.flatten(1).t())
        return result.view(batch, height, width, -1).permute(0, 3, 1, 2)
    if networks.is_bias_apart(x):
        hidden: Tensor = bias_relu_forward(_convolve(x, weight, None), bias)
        return hidden
    return torch.relu_(_convolve(x, weight, bias))


def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions run on matrix units, to which numbers of channels matter and that have epilogues."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def aligned(channels: int) -> int:
    """Channels with which a convolution is fast; cuDNN pads others to 8 itself, in passes of their own.

    Measured on an H100: 3x3 from 12 to 512 channels at 8x8 positions takes 28 us, from 16 to 512 it takes 8 us.
    """
    return channels if channels % 8 == 0 else -(-channels // 16) * 16


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last where that is the only one: a convolution computes in that of its weight."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _padded(x: Tensor, rows: int, columns: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """``x`` with zeros up to these sizes of its first two dimensions, converted in the same pass."""
    if x.shape[:2] == (rows, columns):
        return x.to(dtype, memory_format=memory_format)
    shape = (rows, columns, *x.shape[2:])
    result = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format).zero_()
    result[: x.shape[0], : x.shape[1]].copy_(x)
    return result


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.aten.convolution(x, weight, bias, *_geometry(weight))
    return result


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, weight and bias; None where ``mask`` does not ask for one."""
    filters, geometry = weight.shape[:1], _geometry(weight)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, filters, *geometry, mask
    )
    return found


def _geometry(weight: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, no transposition, output padding and groups of a convolution that keeps the size."""
    padding = [size // 2 for size in weight.shape[2:]]
    return (1, 1), padding, (1, 1), False, (0, 0), 1
