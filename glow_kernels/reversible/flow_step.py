"""The fast way back through a :class:`~glow_kernels.nn.FlowStep`: inverse and gradients in one pass per operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from glow_kernels.nn import AdditiveCoupling, AffineCoupling, CouplingNetwork, FlowStep
from glow_kernels.ops import actnorm_conv1x1_reversible_backward, affine_coupling_reversible_backward
from glow_kernels.reversible.anatomy import Anatomy
from glow_kernels.reversible.tensors import differentiate, leaf


@contextmanager
def frugal(anatomy: Anatomy) -> Iterator[None]:
    """Let the networks of this package free their hidden buffers early, in a backward that nobody watches."""
    networks = [m for m in anatomy.modules if isinstance(m, CouplingNetwork)] if anatomy.is_standard else []
    for network in networks:
        network.frugal = True
    try:
        yield
    finally:
        for network in networks:
            network.frugal = False


def backward_from_output(
    step: FlowStep,
    z: Tensor,
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    context: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    closed: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The input of the step, its gradient, and those of ``context`` and ``parameters``, with which it computes."""
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_log_det is None:
        grad_log_det = z.new_zeros(len(z))
    coupling = step.coupling
    conditioning, transformed = coupling._split("z", z)
    grad_conditioning, grad_transformed = coupling._split("z", grad_z)
    tensors = [tensor for tensor in context if tensor is not None]
    with torch.enable_grad():
        conditioning = leaf(conditioning, True)
        h = coupling.network(conditioning, *context)
    transformed, grad_transformed, grad_h = _undo_coupling(
        coupling, grad_transformed, grad_log_det, transformed, h.detach()
    )
    leaves = [conditioning, *tensors, *parameters]
    grad_extra, *grads = differentiate([h], [grad_h], leaves, closed)
    del h, grad_h
    if grad_extra is not None:
        grad_conditioning = grad_conditioning + grad_extra
    y = coupling._merge(conditioning.detach(), transformed)
    grad_y = coupling._merge(grad_conditioning, grad_transformed)

    with torch.enable_grad():
        weight, weight_log_det = step.mixing.matrix()
    log_scale, bias = step.actnorm.log_scale, step.actnorm.bias
    x, grad_x, grad_log_scale, grad_bias, grad_weight, grad_weight_log_det = actnorm_conv1x1_reversible_backward(
        grad_y,
        grad_log_det,
        y,
        log_scale.detach(),
        bias.detach(),
        weight.detach(),
        None if weight_log_det is None else weight_log_det.detach(),
    )
    outputs = [log_scale, bias, weight] if weight_log_det is None else [log_scale, bias, weight, weight_log_det]
    linear_grads = [grad_log_scale, grad_bias, grad_weight, grad_weight_log_det]
    more = differentiate(outputs, linear_grads[: len(outputs)], parameters, closed=True)
    offset = len(tensors)
    for number, grad in enumerate(more, start=offset):
        earlier = grads[number]
        if grad is not None:
            grads[number] = grad if earlier is None else earlier + grad
    return x, grad_x, grads


def _undo_coupling(
    coupling: AffineCoupling | AdditiveCoupling, grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(coupling, AdditiveCoupling):
        return (y - h).to(y.dtype), grad, grad
    x, grad_x, grad_h, _ = affine_coupling_reversible_backward(
        grad, grad_log_det, y, h, coupling.scale_map, coupling.layout, coupling.order
    )
    return x, grad_x, grad_h
