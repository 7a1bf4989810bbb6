"""The fast way back through a :class:`~glow_kernels.nn.FlowStep`: inverse and gradients in one pass per operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from glow_kernels.nn import AdditiveCoupling, AffineCoupling, CouplingNetwork, FlowStep
from glow_kernels.ops import actnorm_conv1x1_reversible_backward, affine_coupling_reversible_backward
from glow_kernels.reversible.tensors import differentiate, inverse_of, leaf


def is_flow_step(step: nn.Module) -> bool:
    """Whether ``step`` computes what a :class:`~glow_kernels.nn.FlowStep` does, in the way that it does."""
    if not isinstance(step, FlowStep) or type(step.coupling) not in (AffineCoupling, AdditiveCoupling):
        return False
    # Nobody has patched them.
    inverse = getattr(inverse_of(step), "__func__", None)
    parts = (step.actnorm, step.mixing, step.coupling)
    patched = any(name in module.__dict__ for module in parts for name in ("forward", "inverse", "matrix"))
    own_forward = type(step).forward is FlowStep.forward and "forward" not in step.__dict__
    return own_forward and inverse is FlowStep.inverse and not patched


def way_back(step: nn.Module) -> Callable[..., Any] | None:
    """The ``backward_from_output`` of a flow step, or that which ``step`` has itself; None if there is none."""
    if is_flow_step(step):
        return functools.partial(backward_from_output, cast(FlowStep, step))
    return getattr(step, "backward_from_output", None)


@contextmanager
def frugal(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the networks of this package take a hidden buffer less in a backward that nobody watches."""
    networks = [module for module in modules if isinstance(module, CouplingNetwork)]
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


def is_standard(step: nn.Module) -> bool:
    """Whether all of ``step`` is this package's own, its network included, so that it need not be tried out."""
    return is_flow_step(step) and type(step.coupling.network) is CouplingNetwork  # type: ignore[union-attr]
