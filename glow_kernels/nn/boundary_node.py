"""The boundary between two steps of flow as one autograd node: a coupling with its network, and the next linear map.

Both work position by position, so one operator goes from the input of a coupling to that of the next one, in forward
and in backward, and the two halves of the channels are never concatenated. Backward saves no more than otherwise: the
input of every coupling instead of its output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glow_kernels import backends
from glow_kernels.nn import network_passes as passes
from glow_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from glow_kernels.nn.coupling_node import Kind, coupling_node, node_parameters
from glow_kernels.nn.network import convolution_dtype
from glow_kernels.nn.step import FlowStep, LinearMap
from glow_kernels.ops._registry import differentiable_once
from glow_kernels.ops.actnorm_conv1x1 import apply
from glow_kernels.ops.coupling_conv1x1 import backward as boundary_backward
from glow_kernels.ops.coupling_conv1x1 import forward as boundary_forward


class PlainCoupling(NamedTuple):
    """The coupling of a step that can be a node: its kind, and the parameters of its network."""

    kind: Kind
    parameters: list[Tensor]


def in_turn(steps: Sequence[nn.Module], maps: Sequence[LinearMap], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``x`` (B, C, H, W) after all ``steps``, whose linear ``maps`` have been folded, and the log-determinants (B,) of
    their couplings.

    A coupling is in a boundary node with the next linear map if possible, otherwise in a node of its own step; if
    neither is possible, the step is called as a module.
    """
    log_dets = []
    is_mapped = False  # whether the boundary node before the step has already applied the step's linear map to x
    for step, linear, following in zip(steps, maps, [*maps[1:], None], strict=True):
        flow_step = cast(FlowStep, step)
        plain = plain_coupling(x, flow_step)
        if plain is None:
            x, log_det = flow_step.coupling(x) if is_mapped else step(x, linear=linear)
            is_mapped = False
        elif following is not None and _has_operator(x, plain, following):
            x, log_det = boundary_node(x if is_mapped else apply(x, *linear), plain, following)
            is_mapped = True
        else:
            x, log_det = coupling_node(x, *plain, *(() if is_mapped else (linear,)))
            is_mapped = False
        log_dets.append(log_det)
    return x, log_dets


def plain_coupling(x: Tensor, step: FlowStep) -> PlainCoupling | None:
    """The coupling of ``step`` for ``x`` (B, C, H, W) if it can be a node and has no hooks; None otherwise."""
    coupling: Any = step._modules["coupling"]
    if type(coupling) not in (AffineCoupling, AdditiveCoupling) or coupling.condition_on != "first":
        return None
    if passes.is_overridden_or_hooked(coupling) or x.size(1) != coupling.channels:
        return None
    kind = coupling._kind()
    parameters = node_parameters(x, kind, coupling._modules["network"])
    return None if parameters is None else PlainCoupling(kind, parameters)


def is_boundary_node(z: Tensor, step: FlowStep, linear: LinearMap) -> bool:
    """Whether the coupling of ``step``, for ``z`` (B, C, H, W), and the next ``linear`` map can be one node.

    The coupling must be affine, without hooks, and able to be a node by itself; and a backend other than the reference
    must have the operator.
    """
    plain = plain_coupling(z, step)
    return plain is not None and _has_operator(z, plain, linear)


def _has_operator(z: Tensor, plain: PlainCoupling, linear: LinearMap) -> bool:
    if plain.kind.scale_map is None:
        return False
    # A stand-in for h: only type and device matter, as h has at most as many elements as z.
    dtype = convolution_dtype(plain.parameters[0])
    h = z if z.dtype == dtype else z.new_empty((0, 0), dtype=dtype)
    return boundary_forward.is_fast(z, h, *linear, *_options(plain.kind))


def boundary_node(z: Tensor, plain: PlainCoupling, linear: LinearMap) -> tuple[Tensor, Tensor]:
    """The next ``z``, after a ``plain`` coupling and the ``linear`` map, and the ``log_det`` (B,) of the former."""
    kind, parameters = plain
    if not torch.is_grad_enabled():
        h, _ = passes.forward(z[:, : kind.channels], parameters)
        following, log_det = boundary_forward(z, h, *linear, *_options(kind))
    else:
        following, log_det = _BoundaryNode.apply(z, kind, *linear, *parameters)  # type: ignore[no-untyped-call]
    return following, log_det


def _options(kind: Kind) -> tuple[Any, ...]:
    return kind.options[1:]  # without a gain


class _BoundaryNode(torch.autograd.Function):
    """``apply(z, kind, matrix, shift, *parameters)``: three each of weights, biases and log_scales."""

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
    @functools.partial(differentiable_once, "a coupling and the next linear map")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
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
