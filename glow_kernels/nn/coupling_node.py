"""A coupling with its own network as one node of autograd.

Composed of operators it is some twenty nodes, and what autograd does between them costs more than the coupling: halves
of a gradient are padded with zeros and added, small gradients are converted one by one, every node takes the host its
time. Here every pass is one that the mathematics asks for. What backward keeps is the same, and so is every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels import backends
from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.nn import network_passes as passes
from glow_kernels.ops import ScaleMap
from glow_kernels.ops.affine_coupling import backward as affine_backward
from glow_kernels.ops.affine_coupling import forward as affine_forward


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
    y, log_det = _CouplingNode.apply(x, kind, *passes.parameters_of(network))  # type: ignore[no-untyped-call]
    return y, log_det


def is_one_node(x: Tensor, kind: Kind, network: nn.Module) -> bool:
    """Whether a coupling of ``x`` (B, C, H, W) with this network can be :func:`coupling_node`.

    It must be differentiated, by a backend that is not the reference, whose gradients have gradients; not traced or
    transformed; and the network must have passes.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if backends.select() == "reference" or x.dim() != 4 or not passes.has_passes(network):
        return False
    weight, _, last, *_ = passes.parameters_of(network)
    outputs = (x.shape[1] - kind.channels) * (1 if kind.scale_map is None else 2)
    return (
        x.device == weight.device
        and (x.dtype == weight.dtype or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)))
        and (weight.shape[1], last.shape[0]) == (kind.channels, outputs)
    )


class _CouplingNode(torch.autograd.Function):
    """``apply(x, kind, weights, biases, log_scales)``, three of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        conditioning, transformed = x[:, : kind.channels], x[:, kind.channels :]
        h, kept = passes.forward(conditioning, parameters)
        if kind.scale_map is None:
            y, log_det = (transformed + h).to(x.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))
        else:
            y, log_det = affine_forward(transformed, h, *kind.options)
        y = torch.cat((conditioning, y), 1)
        ctx.kind, ctx.backend = kind, backends.choice()
        ctx.save_for_backward(y, h, *kept.inputs, *kept.weights, *parameters)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kind: Kind = ctx.kind
        grad, grad_log_det = grads
        # Asked for once: torch.utils.checkpoint hands out what is saved only once.
        y, h, *saved = ctx.saved_tensors
        kept, parameters = passes.Kept(saved[:3], saved[3:6]), saved[6:]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
        with backends.restored(ctx.backend):
            if kind.scale_map is None:
                grad_h = grad_transformed.to(h.dtype)
            else:
                of_y = y[:, kind.channels :]
                grad_transformed, grad_h, _ = affine_backward(grad_transformed, grad_log_det, of_y, h, *kind.options)
            below, found = passes.backward(grad_h, kept, parameters, needs_x, any(needs))
        grad_x = None if below is None else torch.cat((grad_conditioning + below, grad_transformed), 1)
        return grad_x, None, *(value if need else None for value, need in zip(found, needs, strict=True))
