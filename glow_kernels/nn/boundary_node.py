"""The boundary between two steps of flow as one node of autograd: a coupling with its network, and the next linear map.

Both touch the same positions, so that one operator goes from the input of the coupling to that of the next, in either
direction, and no half of the channels is copied to lie beside the other. Backward keeps no more: the input of every
coupling in place of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glow_kernels import backends
from glow_kernels.nn import network_passes as passes
from glow_kernels.nn.coupling import AffineCoupling
from glow_kernels.nn.coupling_node import Kind, is_one_node
from glow_kernels.nn.network import type_of_convolution
from glow_kernels.nn.step import FlowStep, LinearMap
from glow_kernels.ops.actnorm_conv1x1 import apply
from glow_kernels.ops.coupling_conv1x1 import backward as boundary_backward
from glow_kernels.ops.coupling_conv1x1 import forward as boundary_forward


def in_turn(steps: Sequence[nn.Module], maps: Sequence[LinearMap], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``x`` (B, C, H, W) after all ``steps``, whose linear ``maps`` have been folded, and the log-determinants (B,) of
    their couplings.

    Steps are called one after the other but where a boundary is one node.
    """
    log_dets = []
    z: Tensor | None = None  # x after the linear map of the step, where the boundary before it was a node
    for number, (step, linear) in enumerate(zip(steps, maps, strict=True)):
        flow_step = cast(FlowStep, step)
        if number + 1 < len(steps) and is_boundary_node(x if z is None else z, flow_step, maps[number + 1]):
            z, log_det = boundary_node(apply(x, *linear) if z is None else z, flow_step, maps[number + 1])
        elif z is None:
            x, log_det = step(x, linear=linear)
        else:
            x, log_det = flow_step.coupling(z)
            z = None
        log_dets.append(log_det)
    return x, log_dets


def is_boundary_node(z: Tensor, step: FlowStep, linear: LinearMap) -> bool:
    """Whether the coupling of ``step``, for ``z`` (B, C, H, W), and the next ``linear`` map can be a node.

    The coupling must be one by itself, affine, and nobody's who waits for it to be called; and a backend that is not
    the reference must have the operator.
    """
    coupling = step.coupling
    if type(coupling) is not AffineCoupling or coupling.condition_on != "first" or passes.is_altered(coupling):
        return False
    kind = coupling._kind()
    if z.dim() != 4 or z.shape[1] != coupling.channels or not is_one_node(z, kind, coupling.network):
        return False
    shape = (len(z), kind.outputs(z.shape[1]), *z.shape[2:])
    weight, *_ = passes.parameters_of(coupling.network)
    h = torch.empty(shape, dtype=type_of_convolution(weight), device=z.device)
    return boundary_forward.is_fast(z, h, *linear, *_options(kind))


def boundary_node(z: Tensor, step: FlowStep, linear: LinearMap) -> tuple[Tensor, Tensor]:
    """The next ``z``, after the coupling of ``step`` and the ``linear`` map, and the ``log_det`` (B,) of the former."""
    kind, parameters = step.coupling._kind(), passes.parameters_of(step.coupling.network)
    if not torch.is_grad_enabled():
        h, _ = passes.forward(z[:, : kind.channels], parameters)
        following, log_det = boundary_forward(z, h, *linear, *_options(kind))
    else:
        following, log_det = _BoundaryNode.apply(z, kind, *linear, *parameters)  # type: ignore[no-untyped-call]
    return following, log_det


def _options(kind: Kind) -> tuple[Any, ...]:
    return kind.options[1:]  # without a gain


class _BoundaryNode(torch.autograd.Function):
    """``apply(z, kind, matrix, shift, weights, biases, log_scales)``, three each of the last."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, kind: Kind, matrix: Tensor, shift: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, kept = passes.forward(z[:, : kind.channels], parameters)
        following, log_det = boundary_forward(z, h, matrix, shift, *_options(kind))
        ctx.kind, ctx.backend = kind, backends.choice()
        ctx.save_for_backward(z, h, matrix, *kept.inputs, *kept.weights, *parameters)
        return following, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: torch.utils.checkpoint hands out what is saved only once.
        z, h, matrix, *saved = ctx.saved_tensors
        kept, parameters = passes.Kept(saved[:3], saved[3:6]), saved[6:]
        needs_z, _, needs_matrix, needs_shift, *needs = ctx.needs_input_grad
        with backends.restored(ctx.backend):
            grad_z, grad_h, grad_matrix, grad_shift = boundary_backward(*grads, z, h, matrix, *_options(ctx.kind))
            below, found = passes.backward(grad_h, kept, parameters, needs_z, any(needs))
            if below is not None:
                grad_z[:, : ctx.kind.channels].add_(below)
        every = (grad_z, None, grad_matrix, grad_shift, *found)
        wanted = (needs_z, False, needs_matrix, needs_shift, *needs)
        return tuple(grad if want else None for grad, want in zip(every, wanted, strict=True))
