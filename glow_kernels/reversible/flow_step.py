"""Fast backward of a ``FlowStep`` from its output: inverse and gradients in one pass per operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from glow_kernels.nn import AdditiveCoupling, AffineCoupling, CouplingNetwork, FlowStep
from glow_kernels.nn import network_passes as passes
from glow_kernels.nn.coupling_node import Overwritable, couple_reversible_backward, has_passes, in_place
from glow_kernels.ops import actnorm_conv1x1_reversible_backward, affine_coupling_reversible_backward
from glow_kernels.ops.actnorm_conv1x1 import apply_reversible_backward
from glow_kernels.reversible.general_step import GeneralStep
from glow_kernels.reversible.tensors import Start, differentiate, leaf, passed, sum_of


def backward_from_output_of(step: GeneralStep, overwritable: Overwritable) -> Callable[..., Any] | None:
    """The ``backward_from_output`` for a flow step, or the step's own method of that name; None if it has none."""
    if step.is_flow_step:
        return functools.partial(backward_from_output, step, overwritable)
    return getattr(step.module, "backward_from_output", None)


@contextmanager
def frugal(step: GeneralStep) -> Iterator[None]:
    """Let this package's networks overwrite hidden gradients in place (one buffer less): nothing else holds them."""
    networks = [module for module in step.modules if isinstance(module, CouplingNetwork)]
    for network in networks:
        network.frugal = True
    try:
        yield
    finally:
        for network in networks:
            network.frugal = False


def backward_from_output(
    step: GeneralStep,
    overwritable: Overwritable,
    z: Tensor,
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    context: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    all_leaves_known: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The input of the step, its gradient, and the gradients of ``context`` and ``parameters``.

    ``z`` and its gradient are overwritten if they are ``overwritable``.
    """
    module = cast(FlowStep, step.module)
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_log_det is None:
        grad_log_det = z.new_zeros(len(z))
    coupling = module.coupling
    conditioning, transformed = coupling._split("z", z)
    grad_conditioning, grad_transformed = coupling._split("z", grad_z)
    tensors = [tensor for tensor in context if tensor is not None]
    if (
        not context
        and step.is_standard
        and coupling.condition_on == "first"
        and has_passes(z, coupling._kind(), coupling.network)
    ):
        return _backward_by_passes(step, overwritable, module, z, grad_z, grad_log_det, parameters)
    with torch.enable_grad():
        conditioning = leaf(conditioning, True)
        h = coupling.network(*passed([conditioning, *context]))
    before, grad_before, grad_h = _undo_coupling(coupling, grad_transformed, grad_log_det, transformed, h.detach())
    transformed = in_place(transformed, before, overwritable.state)
    if grad_before is not grad_transformed:
        grad_transformed = in_place(grad_transformed, grad_before, overwritable.grad)
    del before, grad_before
    start = Start.of(h, grad_h)
    del h, grad_h
    grad_extra, *grads = differentiate([start], [conditioning, *tensors, *parameters], all_leaves_known)
    if grad_extra is not None:
        grad_conditioning = torch.add(
            grad_conditioning, grad_extra, out=grad_conditioning if overwritable.grad else None
        )
    y = z if overwritable.state else coupling._merge(conditioning.detach(), transformed)
    grad_y = grad_z if overwritable.grad else coupling._merge(grad_conditioning, grad_transformed)
    x, grad_x, linear_grads = _undo_linear_map(step, module, grad_y, grad_log_det, y, parameters)
    for number, grad in enumerate(linear_grads, start=len(tensors)):
        grads[number] = sum_of(grads[number], grad)
    return x, grad_x, grads


def _backward_by_passes(
    step: GeneralStep,
    overwritable: Overwritable,
    module: FlowStep,
    z: Tensor,
    grad_z: Tensor,
    grad_log_det: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """:func:`backward_from_output` without autograd, for this package's own network."""
    own = passes.parameters_of(module.coupling.network)
    needed = any(parameter.requires_grad for parameter in own)
    y, grad_y, found = couple_reversible_backward(
        grad_z, grad_log_det, z, module.coupling._kind(), own, needed, overwritable
    )
    x, grad_x, grads = _undo_linear_map(step, module, grad_y, grad_log_det, y, parameters)
    grad_of: dict[int, Tensor | None] = {}
    for parameter, grad in zip(own, found, strict=True):
        grad_of[id(parameter)] = sum_of(grad_of.get(id(parameter)), grad)
    both = [
        sum_of(grad, grad_of.get(id(p))) if p.requires_grad else grad for p, grad in zip(parameters, grads, strict=True)
    ]
    return x, grad_x, both


def _undo_linear_map(
    step: GeneralStep, module: FlowStep, grad: Tensor, grad_log_det: Tensor, y: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    if step.linear:
        assert step.inverse_map is not None
        x, grad_x, *found = apply_reversible_backward(grad, y, step.linear["matrix"].detach(), *step.inverse_map)
        return x, grad_x, [*found, *[None] * (len(parameters) - len(found))]
    # A step of this package's own layers needs no graph: ``matrix_gradients`` is the backward of ``matrix``.
    with torch.set_grad_enabled(not step.is_standard):
        weight, weight_log_det = module.mixing.matrix()
    inputs = (module.actnorm.log_scale, module.actnorm.bias, weight, weight_log_det)
    values = [None if tensor is None else tensor.detach() for tensor in inputs]
    results = actnorm_conv1x1_reversible_backward(grad, grad_log_det, y, *values)  # type: ignore[arg-type]
    x, grad_x, grads = results[0], results[1], results[2:]
    if not step.is_standard:
        pairs = [(tensor, grad) for tensor, grad in zip(inputs, grads, strict=True) if tensor is not None]
        return x, grad_x, differentiate([Start.of(*pair) for pair in pairs], parameters, all_leaves_known=False)
    grad_of: dict[int, Tensor | None] = {}
    linear_grads = zip(inputs[:2], grads[:2], strict=True)
    for tensor, grad in (*linear_grads, *module.mixing.matrix_gradients(grads[2], grads[3])):
        grad_of[id(tensor)] = sum_of(grad_of.get(id(tensor)), grad)
    return x, grad_x, [grad_of.get(id(parameter)) if parameter.requires_grad else None for parameter in parameters]


def _undo_coupling(
    coupling: AffineCoupling | AdditiveCoupling, grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(coupling, AdditiveCoupling):
        return (y - h).to(y.dtype), grad, grad
    x, grad_x, grad_h, _ = affine_coupling_reversible_backward(
        grad, grad_log_det, y, h, coupling.scale_map, coupling.layout, coupling.order
    )
    return x, grad_x, grad_h
