"""Convolutions in coupling networks whose output is scaled per channel, in any dialect.

``exp(k p) * conv(x)``, the zero-initialised convolution, and ``exp(logs) * (conv(x) + bias)``, a convolution with
ActNorm, scale the weights instead of the output, which saves a pass over the largest tensors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.interop.copies import faithful_copy
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.openai import ActNorm2d, is_initialized
from glow_kernels.interop.patch import (
    Call,
    Mismatch,
    Patch,
    has_hooks,
    is_unchanged,
    options_of,
    original_class,
    patch_of,
)
from glow_kernels.interop.scale_map import round_number
from glow_kernels.interop.stand_ins import SPATIAL


@dataclass(frozen=True)
class Scaling:
    """``exp(factor * p)``, and the border with which the layer pads its input.

    Attributes:
        name: of the parameter p.
        factor: of p in the exponent.
        border, value: width and value of the padding.
    """

    name: str
    factor: float
    border: int = 0
    value: float = 0.0

    def describe(self) -> str:
        """For the report."""
        border = f", input padded with {self.value:g}" if self.border else ""
        return f"scaled by exp({self.factor:g} {self.name}){border}"


class ScaledConv2d(Patch):
    """A convolution times ``exp(k p)``, with one number p per output channel."""

    dialect, kind = "network", "ScaledConv2d"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        convolution = _convolution(module)
        return convolution is not None and _scale_name(module, convolution) is not None

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Scaling:
        convolution = _convolution(module)
        if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
            raise Mismatch("its padding is not zeros")
        if "weight" not in convolution._parameters:
            raise Mismatch("the weight of its convolution is computed, as by weight_norm")
        name = str(_scale_name(module, convolution))
        copied = faithful_copy(module).double().cpu()
        x = torch.randn(2, convolution.in_channels, *SPATIAL, dtype=torch.float64)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
            inner = _convolution(copied)
            inner.bias.fill_(1.0)
            getattr(copied, name).fill_(1.0)
            factor = copied(x)[0, 0, 1, 1].log().item()
            inner.bias.zero_()
            getattr(copied, name).zero_()
            inner.weight.fill_(1.0)
            corner = copied(0 * x)[0, 0, 0, 0].item()
        size = convolution.kernel_size[0]
        border = 0 if copied(x).shape == inner(x).shape else size // 2
        plain = (set(convolution.stride) | set(convolution.dilation) | {convolution.groups}) == {1}
        if border and not (plain and set(convolution.kernel_size) == {size}):
            raise Mismatch("it pads its input itself and has strides, dilation, groups or a kernel that is not square")
        value = 0.0
        if border:
            outside = size**2 - (size - border) ** 2
            value = round_number(corner / (outside * convolution.in_channels), 1e-9)
        return Scaling(name, round_number(factor, 1e-9), border, value)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(_convolution(module))

    @classmethod
    def inner(cls, module: Any) -> list[nn.Module]:
        return _inner(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        convolution, scaling = _convolution(self), options_of(self)
        if convolution is not self and has_hooks(convolution):
            result: Tensor = original_class(self).forward(self, x)
            return result
        scale = (scaling.factor * getattr(self, scaling.name).flatten()).exp()
        if not scaling.border:
            return _scaled(convolution, x, scale, convolution.bias)
        # The border adds the same to every sample, so the input need not be copied into a larger tensor. What it adds
        # is a product of small matrices, because PyTorch's convolution of a single channel is slow.
        weight = convolution.weight * scale[:, None, None, None]
        border = F.pad(x.new_zeros(1, 1, *x.shape[2:]), [scaling.border] * 4, value=scaling.value)
        outside = F.unfold(border, convolution.kernel_size)[0]
        at_border = torch.addmm((convolution.bias * scale)[:, None], weight.sum(1).flatten(1), outside)
        return F.conv2d(x, weight, padding=scaling.border).add_(at_border.view(-1, *x.shape[2:]))


class ActNormConv2d(Patch):
    """A convolution followed by ActNorm of OpenAI's dialect."""

    dialect, kind = "network", "ActNormConv2d"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        convolution, actnorm = _convolution(module), getattr(module, "actnorm", None)
        return convolution is not None and isinstance(actnorm, nn.Module) and ActNorm2d.matches(actnorm)

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        examiner.require((module.actnorm, ActNorm2d))
        if _convolution(module).padding_mode != "zeros":
            raise Mismatch("its padding is not zeros")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(_convolution(module))

    @classmethod
    def inner(cls, module: Any) -> list[nn.Module]:
        return _inner(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        convolution, actnorm = _convolution(self), self.actnorm
        watched = has_hooks(actnorm, *([convolution] if convolution is not self else []))
        if watched or not is_unchanged(actnorm) or not is_initialized(actnorm):
            result: Tensor = original_class(self).forward(self, x)
            return result
        shift = actnorm.bias.flatten()
        if convolution.bias is not None:
            shift = shift + convolution.bias
        return _scaled(convolution, x, actnorm.logs.flatten().exp(), shift)


class _InPlaceLeakyReLU(torch.autograd.Function):
    """Leaky ReLU that overwrites its input and, in backward, its gradient; nothing else may use either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.slope = slope
        ctx.save_for_backward(_activated(x, slope))
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (result,), (grad,) = ctx.saved_tensors, grads
        # For double backward, or for a batch of gradients.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return torch.where(result > 0, grad, ctx.slope * grad), None
        return torch.ops.aten.leaky_relu_backward.grad_input(grad, result, ctx.slope, True, grad_input=grad), None


class InPlaceSequential(Patch):
    """A sequence whose activations overwrite the results of the convolutions before them, which nothing else reads.

    Between two convolutions they overwrite the gradient too: allocating a tensor of that size costs more than they do.
    """

    dialect, kind = "network", "Sequential"

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        # Not ReLU, of which PyTorch keeps only the result anyway.
        kept = any(type(layer) is nn.LeakyReLU and not layer.inplace for layer in module)
        return ("leaky ReLUs overwrite their input: half the hidden activations are kept",) if kept else ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        pairs = itertools.pairwise(module.children())
        return plain and any(
            (_is_plain_convolution(before) or ActNormConv2d.matches(before)) and _is_activation(layer)
            for before, layer in pairs
        )

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
        return _calls(first)

    def forward(self: Any, x: Any) -> Any:
        """The layers one after another."""
        layers = list(self)
        is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        plain = is_traced or torch._C._are_functorch_transforms_active()
        for before, layer, after in zip([None, *layers], layers, [*layers[1:], None], strict=False):
            may_overwrite = before is not None and _is_unhooked_convolution(before, ActNormConv2d)
            if not may_overwrite or not _is_activation(layer) or has_hooks(layer):
                x = layer(x)
                continue
            slope = getattr(layer, "negative_slope", 0.0)
            between_convolutions = after is not None and _is_unhooked_convolution(after, ActNormConv2d, ScaledConv2d)
            overwrite: Any = (
                _activated if plain or not between_convolutions or not x.requires_grad else _InPlaceLeakyReLU.apply
            )
            x = overwrite(x, slope)
        return x


def _activated(x: Tensor, slope: float) -> Tensor:
    """The leaky ReLU of ``x``, in place."""
    # Leaky ReLU with a slope of zero would turn minus infinity into NaN.
    return F.leaky_relu_(x, slope) if slope else F.relu_(x)


def _is_activation(layer: nn.Module) -> bool:
    """Whether ``layer`` is an activation whose backward needs only its result."""
    known = type(layer) is nn.ReLU or (type(layer) is nn.LeakyReLU and layer.negative_slope >= 0)
    return known and "forward" not in vars(layer)


def _is_plain_convolution(layer: nn.Module) -> bool:
    return type(layer).forward is nn.Conv2d.forward and "forward" not in vars(layer)


def _is_unhooked_convolution(layer: nn.Module, *patches: type[Patch]) -> bool:
    """Whether ``layer`` is a convolution, plain or in a layer with one of ``patches``, and no hook gets its result or
    its gradient."""
    if patch_of(layer) not in patches:
        return _is_plain_convolution(layer) and not has_hooks(layer)
    parts = (layer, *layer.children())
    return is_unchanged(*parts) and not has_hooks(*parts)


def _scaled(convolution: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``scale * (W x + bias)``."""
    weight = convolution.weight * scale[:, None, None, None]
    options = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return F.conv2d(x, weight, bias * scale, *options)


def _convolution(module: nn.Module) -> Any:
    """``module`` if it is a convolution, or its ``conv`` if that is one; otherwise None."""
    if isinstance(module, nn.Conv2d):
        return module
    inner = getattr(module, "conv", None)
    return inner if isinstance(inner, nn.Conv2d) else None


def _inner(module: Any) -> list[nn.Module]:
    """The current ``conv`` of ``module``; nothing if ``module`` is the convolution itself."""
    return [] if isinstance(module, nn.Conv2d) else [module.conv]


def _scale_name(module: nn.Module, convolution: nn.Conv2d) -> str | None:
    """Name of the only parameter besides the convolution's, if it has one element per output channel."""
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if name not in ("weight", "bias")}
    others = {name for name, _ in module.named_children()} - {"conv"}
    if len(parameters) != 1 or others or convolution.bias is None:
        return None
    name, parameter = parameters.popitem()
    return name if parameter.numel() == convolution.out_channels else None


def _calls(convolution: nn.Conv2d) -> list[Call]:
    return [Call("forward", lambda module, x: module(x), ((2, convolution.in_channels, *SPATIAL),))]


PATCHES = (ScaledConv2d, ActNormConv2d)
# Only within the networks of couplings.
NETWORK_PATCHES = (InPlaceSequential,)
